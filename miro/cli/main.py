"""The command line: `miro COMMAND`, one command per stage, each on a user's own files.

Options are the fields of the configuration classes; `miro COMMAND --help` lists them. Those of
train may also be written key=value. An error prints one message with the remedy and exits with 1; a
command line that cannot be parsed exits with 2.

A command's module, and with it torch and tyro, is imported when the command is chosen.
"""

from __future__ import annotations

import importlib
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from miro.utils import stop_request


class Command(NamedTuple):
    """A command of the command line.

    Attributes:
        target: its function, as module:name.
        summary: the first line of the function's docstring.
        parses_arguments: call the function with the list of arguments, instead of parsing them by
            tyro into its parameters.
        saves_on_signals: SIGTERM, SIGHUP and the first Ctrl-C make it save and stop.
    """

    target: str
    summary: str
    parses_arguments: bool = False
    saves_on_signals: bool = False

    def load(self) -> Callable[..., Any]:
        """Import and return the function."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


COMMANDS: Mapping[str, Command] = {
    "annotate": Command(
        "miro.cli.dataset:annotate",
        "Score captioned images with rewards: SOURCE to a dataset folder of shards and scores.",
    ),
    "caption": Command(
        "miro.cli.dataset:caption",
        "Add captions to a dataset's images, by a vision-language model or from a table.",
    ),
    "inspect": Command(
        "miro.cli.dataset:inspect",
        "Show a dataset on one HTML page: counts, scores, rejected samples, the best and worst.",
    ),
    "encode": Command(
        "miro.cli.dataset:encode",
        "Encode a dataset's images to latents and its captions to text states, once.",
    ),
    "train": Command(
        "miro.cli.train:train",
        "Train a model: miro train PRESET --run DIR --data DIR [options].",
        parses_arguments=True,
        saves_on_signals=True,
    ),
    "sample": Command("miro.cli.inference:sample", "Generate images of prompts."),
    "evaluate": Command("miro.cli.inference:evaluate", "Score a model's images with rewards."),
    "report": Command("miro.cli.inference:report", "Write a run's HTML report."),
    "export": Command(
        "miro.cli.train:export",
        "Copy a run's weights with all that sampling needs: DEST is enough for `miro sample`.",
    ),
    "launch": Command(
        "miro.cli.launch:launch",
        "Start a run by a launch script; --dry-run prints the commands of a script or a folder.",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run `miro` and `python -m miro.cli`."""
    run_command("miro", COMMANDS, argv)


def run_command(
    prog: str, commands: Mapping[str, Command], argv: Sequence[str] | None = None
) -> None:
    """Parse a command line and run its command.

    Args:
        prog: name of the program in usage and error messages.
        commands: by name.
        argv: the arguments; those of the process if not given.

    Raises:
        SystemExit: on errors: 1 after a ValueError, OSError or FloatingPointError, 2 if the command
            line cannot be parsed, 75 when a run was stopped and saved, 130 after Ctrl-C; 0 after
            --help.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if argv is None and args and args[0] in commands and commands[args[0]].saves_on_signals:
        stop_request.listen()  # To the end of the process.
    if not args or args[0] in ("-h", "--help"):
        print(_usage(prog, commands), file=sys.stdout if args else sys.stderr)
        raise SystemExit(0 if args else 2)
    name, rest = args[0], args[1:]
    try:
        import logging

        import tyro

        from miro.utils.progress import ConsoleHandler
        from miro.utils.serialize import unknown_name

        if name not in commands:
            raise unknown_name("command", name, commands)
        # A memory-mapped shard keeps its file open, and the usual soft limit is 1,024 files.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[ConsoleHandler()])
        function = commands[name].load()
        if commands[name].parses_arguments:
            function(rest)
        else:
            tyro.cli(function, args=rest, prog=f"{prog} {name}")
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{prog} {name}: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        saves = commands[name].saves_on_signals
        where = "from its last checkpoint" if saves else "where it stopped"
        print(f"{prog} {name}: interrupted; the same command resumes {where}", file=sys.stderr)
        raise SystemExit(130) from None
    except stop_request.Stopped as message:
        print(f"{prog} {name}: {message}", file=sys.stderr)
        raise SystemExit(stop_request.exit_status()) from None


def _usage(prog: str, commands: Mapping[str, Command]) -> str:
    lines = [f"  {name:14}{command.summary}" for name, command in commands.items()]
    return f"usage: {prog} COMMAND [options]; {prog} COMMAND --help lists them\n\n" + "\n".join(
        lines
    )
