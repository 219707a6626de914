"""`miro launch`: run a launch script, or print what launch scripts would run.

The scripts are plain shell and work without it; with DRY_RUN set they print instead of running.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import tyro

Positional = tyro.conf.Positional

# Arguments for a dry run without any; HOSTS is replaced by the example hosts file.
PLACEHOLDERS = {
    "data.sh": ("COMMAND", "SOURCE", "DEST"),
    "laptop.sh": ("PHOTOS", "RUN"),
    "nodes.sh": ("HOSTS", "PRESET", "--run", "DIR", "--data", "DIR"),
}
TRAIN_PLACEHOLDERS = ("PRESET", "--run", "DIR", "--data", "DIR")


def launch(
    script: Positional[Path] = Path("launch"),
    arguments: Positional[tuple[str, ...]] = (),
    dry_run: bool = False,
) -> None:
    """Start a run by a launch script; --dry-run prints the commands of a script or a folder.

    Args:
        script: a script, as launch/node.sh, or with --dry-run a folder of scripts.
        arguments: of the script, after `--`; placeholders in a dry run without any.
        dry_run: print the commands and run nothing.

    Raises:
        ValueError: the script does not exist.
        SystemExit: a script failed; its exit status.
    """
    if script.is_dir() and dry_run:
        scripts = sorted(p for p in script.glob("*.sh") if os.access(p, os.X_OK))
    else:
        scripts = [script] if script.is_file() else []
    if not scripts:
        raise ValueError(
            f"{script} is no launch script; give one, as in `miro launch launch/node.sh`, or its "
            "folder and --dry-run"
        )
    if not dry_run:
        os.execv(script.resolve(), [str(script), *arguments])
    for path in scripts:
        words = arguments or PLACEHOLDERS.get(path.name, TRAIN_PLACEHOLDERS)
        words = [str(path.with_name("hosts.example")) if w == "HOSTS" else w for w in words]
        print(f"# {path} {' '.join(words)}", flush=True)
        done = subprocess.run(["bash", path, *words], env={**os.environ, "DRY_RUN": "1"})
        if done.returncode:
            raise SystemExit(done.returncode)
