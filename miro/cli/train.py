"""The commands about training runs: train, export and launch."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from miro.training.config import TrainConfig
from miro.training.metrics import Progress
from miro.training.presets import PRESETS, preset
from miro.utils.distributed import dist_env, part
from miro.utils.progress import bar, console

Inline = tyro.conf.arg(name="")
Positional = tyro.conf.Positional
SETTING = re.compile(r"[A-Za-z_][\w.\-]*=.*", re.DOTALL)


@dataclass(frozen=True)
class _Train:
    config: Annotated[TrainConfig, Inline]
    run: Path
    """The run's folder: configuration, metrics, checkpoints and weights."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest whole checkpoint in the folder, if there is one."""


def train(args: Sequence[str]) -> None:
    """Train a model: miro train PRESET --run DIR --data DIR [options]."""
    if not args or args[0] in ("-h", "--help"):
        console.print(
            f"usage: miro train PRESET --run DIR --data DIR [options]\n\nPresets: "
            f"{', '.join(PRESETS)}. `miro train PRESET --help` lists every option.",
            markup=False,
            highlight=False,
        )
        if not args:
            raise SystemExit(2)
        return
    options = tyro.cli(
        _Train,
        default=_Train(preset(args[0]), tyro.MISSING),
        args=[f"--{word}" if SETTING.fullmatch(word) else word for word in args[1:]],
        prog=f"miro train {args[0]}",
        # So that compile=False can be written like every other key=value.
        config=(tyro.conf.FlagConversionOff,),
    )
    from miro.training.loop import train as run

    first = dist_env(os.environ).first
    if not first:
        # Of many processes one speaks; the others are heard when something is wrong.
        logging.getLogger().setLevel(logging.WARNING)
    with bar("train", options.config.images) as show:

        def report(progress: Progress) -> None:
            show(progress.images, progress.total, told(progress))

        weights = run(options.config, options.run, resume=options.resume, report=report)
    part()
    if first:
        console.print(
            f"weights are in {weights}; sample with `miro sample {options.run} --prompt ...`"
        )


def told(progress: Progress) -> str:
    """What the screen says of a run beside how far it is."""
    detail = f"loss {progress.loss:.4f}  {progress.images_per_second:,.0f} images/s"
    if progress.mfu is not None:
        detail += f"  {progress.mfu:.0%} MFU"
    if progress.data_wait > 0.02:
        detail += f"  {progress.data_wait:.0%} waiting for data"
    return detail


def launch(
    script: Positional[Path] = Path("launch"),
    arguments: Positional[tuple[str, ...]] = (),
    dry_run: bool = False,
) -> None:
    """Start a run by a launch script; --dry-run prints what it, or each of a folder's, would run.

    Args:
        script: a script, as launch/node.sh, or with --dry-run their folder.
        arguments: those of the script, after `--`.
        dry_run: print and do nothing.
    """
    from miro.cli.launch import launch as run

    raise SystemExit(run(script, arguments, dry_run=dry_run))


def export(run: Positional[Path], dest: Positional[Path], images: int | None = None) -> None:
    """Copy a run's weights with all that sampling needs: DEST is enough for `miro sample`.

    Args:
        run: a run's folder, or one of its checkpoints.
        dest: the folder to make.
        images: which weights; the newest if not given.
    """
    from miro.sampling.export import export as write

    console.print(f"{write(run, dest, images)}: sample with `miro sample {dest} --prompt ...`")
