"""`miro launch`: start a run by one of the launch scripts, or print what each of them would do.

The scripts are plain shell and work alone; this knows only that DRY_RUN makes them print.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

# What a script is shown with where no arguments are given: the words of its own first comment.
USAGE = "#   "


def launch(script: Path, arguments: Sequence[str], *, dry_run: bool) -> int:
    """Run a launch script, or print what it would run; returns its exit code.

    Args:
        script: one of the scripts, or with `dry_run` their folder.
        arguments: of the script; with `dry_run` and none, the names in its usage line.

    Raises:
        ValueError: there is no such script.
    """
    scripts = sorted(p for p in script.glob("*.sh") if os.access(p, os.X_OK))
    if script.is_file():
        scripts = [script]
    if not scripts or (script.is_dir() and not dry_run):
        raise ValueError(
            f"{script} is no launch script; give one, as in `miro launch launch/node.sh`, or its "
            "folder and --dry-run"
        )
    if not dry_run:
        os.execv(script.resolve(), [str(script), *arguments])
    for path in scripts:
        given = list(arguments) or _usage(path)
        print(f"# {path} {' '.join(given)}", flush=True)
        done = subprocess.run(["bash", path, *given], env={**os.environ, "DRY_RUN": "1"})
        if done.returncode:
            return done.returncode
    return 0


def _usage(script: Path) -> list[str]:
    """The arguments in the usage line of a script, without the optional ones."""
    for line in script.read_text().splitlines():
        if line.startswith(USAGE) and script.name in line:
            words = line.split(script.name, 1)[1].split("[", 1)[0].split()
            return [_example(script, word) for word in words]
    return []


def _example(script: Path, word: str) -> str:
    """A hostfile that exists stands for one; every other word stands for itself."""
    example = script.with_name("hosts.example")
    return str(example) if word == "HOSTFILE" and example.exists() else word
