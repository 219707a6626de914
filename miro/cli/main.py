"""The command line: one command a stage, each usable alone on a user's own files.

    miro scenes | annotate | caption | inspect | fit-clip | fit-verifier | encode
    miro train | sample | evaluate | report | export | launch
    miro demo                                              walks them all

Options are the fields of the configuration classes; `miro COMMAND --help` lists them. Those of
train may also be written key=value. An error says what is wrong and what to do, and exits with 1;
a command line that cannot be read exits with 2.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.logging import RichHandler

from miro.cli.dataset import annotate, caption, encode, inspect
from miro.cli.train import export, launch, train
from miro.utils.distributed import EXIT_STOPPED, Stopped
from miro.utils.progress import console
from miro.utils.serialize import unknown_name

Inline = tyro.conf.arg(name="")
Positional = tyro.conf.Positional


def _levels(pairs: Sequence[str], option: str) -> dict[str, float | None]:
    """["aesthetic=0.6", "clip=off"] to levels by name."""
    levels: dict[str, float | None] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            levels[name] = None if value == "off" else float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(
                f"{option} {pair!r} must be NAME=LEVEL, a level from 0 (worst of the data) to 1 "
                "(best), or NAME=off to ask for nothing"
            )
    return levels


@dataclass(frozen=True)
class _Ask:
    """How to ask a model."""

    reward: tuple[str, ...] = ()
    """Targets NAME=LEVEL, 0 to 1, or NAME=off; a trained reward not named is asked for at 1."""
    negative: tuple[str, ...] = ()
    """What reward guidance moves away from, NAME=LEVEL; a reward not named is at 0."""
    reward_scale: float = 0.0
    """ω: how hard to move away from the negative target; 0 for not at all."""
    text_scale: float = 0.0
    """Text guidance; 0 for none."""
    steps: int = 50
    seed: int = 0


def sample(
    run: Positional[Path],
    prompt: tuple[str, ...],
    ask: Annotated[_Ask, Inline] = _Ask(),  # noqa: B008 frozen
    count: int = 1,
    best_of: int = 1,
    best_by: str | None = None,
    aspect: str | None = None,
    out: Path | None = None,
    device: str = "cpu",
) -> None:
    """Draw images of prompts.

    Args:
        run: a run's folder, or one of its weights folders.
        prompt: one or more descriptions.
        ask: targets and guidance.
        count: images of each prompt.
        best_of: candidates for each image, of which the best is kept.
        best_by: the reward that chooses, NAME or NAME=weights.
        aspect: as 4:3; the images are of the nearest shape the run was trained on.
        out: folder for the PNG files; RUN/samples if not given.
        device: where to compute.
    """
    from miro.sampling.command import sample_images

    negative = _levels(ask.negative, "--negative") if ask.negative or ask.reward_scale else None
    written = sample_images(
        run,
        prompt,
        positive=_levels(ask.reward, "--reward"),
        negative=negative,
        reward_scale=ask.reward_scale,
        text_scale=ask.text_scale,
        steps=ask.steps,
        seed=ask.seed,
        count=count,
        candidates=best_of,
        best_by=best_by,
        aspect=aspect,
        out=out,
        device=device,
    )
    for path in written:
        console.print(str(path))


def evaluate(
    run: Positional[Path],
    rewards: tuple[str, ...] = ("colourfulness", "sharpness"),
    *,
    prompts: Path,
    count: int = 192,
    ask: Annotated[_Ask, Inline] = _Ask(steps=16),  # noqa: B008 frozen
) -> None:
    """Measure a model's images with rewards.

    Args:
        run: a run's folder, or one of its weights folders.
        rewards: names, or name=weights.
        prompts: a text file with a prompt a line.
        count: how many prompts.
        ask: targets and guidance.
    """
    from miro.evaluate.run import evaluate as measure

    path = measure(
        run,
        rewards=rewards,
        prompts=prompts,
        count=count,
        positive=_levels(ask.reward, "--reward"),
        negative=_levels(ask.negative, "--negative"),
        reward_scale=ask.reward_scale,
        text_scale=ask.text_scale,
        steps=ask.steps,
        seed=ask.seed,
    )
    console.print(path.read_text())
    console.print(f"written to {path}")


def report(run: Positional[Path]) -> None:
    """Turn a run's folder into one HTML page.

    Args:
        run: the folder of a training run.
    """
    from miro.report.run_page import write_run_report

    console.print(str(write_run_report(run)))


COMMANDS: Mapping[str, Callable[..., None]] = {
    "annotate": annotate,
    "caption": caption,
    "inspect": inspect,
    "encode": encode,
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "report": report,
    "export": export,
    "launch": launch,
}


def _usage(prog: str, commands: Mapping[str, Callable[..., None]]) -> str:
    lines = []
    for name, command in commands.items():
        summary = (command.__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {name:14}{summary}")
    return f"usage: {prog} COMMAND [options]; {prog} COMMAND --help lists them\n\n" + "\n".join(
        lines
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `miro` and `python -m miro.cli`."""
    run_command("miro", COMMANDS, argv)


def run_command(
    prog: str, commands: Mapping[str, Callable[..., None]], argv: Sequence[str] | None = None
) -> None:
    """Parse a command line and run its command.

    Args:
        prog: name of the program in usage and error messages.
        commands: functions by command name; tyro makes their parameters options.
        argv: the arguments; those of the process if not given.

    Raises:
        SystemExit: always on errors: 1 after a ValueError, OSError or FloatingPointError, 2 where
            the command line cannot be parsed, 75 after a SIGTERM, 130 after Ctrl-C.
    """
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False, show_time=False)],
    )
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        console.print(_usage(prog, commands), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(0 if args else 2)
    name, rest = args[0], args[1:]
    try:
        if name not in commands:
            raise unknown_name("command", name, commands)
        if commands[name] is train:
            train(rest)
        else:
            command: Any = commands[name]
            tyro.cli(command, args=rest, prog=f"{prog} {name}")
    except (ValueError, OSError, FloatingPointError) as error:
        console.print(f"[bold red]{prog} {name}:[/] ", end="")
        console.print(str(error), markup=False, highlight=False)
        raise SystemExit(1) from error
    except Stopped as told:
        console.print(f"{prog} {name}: {told}")
        raise SystemExit(EXIT_STOPPED) from None
    except KeyboardInterrupt:
        console.print(f"{prog} {name}: stopped; the same command goes on where it was")
        raise SystemExit(130) from None
