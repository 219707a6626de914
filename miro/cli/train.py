"""The commands for training runs: train and export."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import sys
import typing
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from miro.training.config import TrainConfig
from miro.training.metrics import TrainingProgress
from miro.training.presets import PRESETS, preset
from miro.utils.distributed import dist_env, shutdown
from miro.utils.progress import bar, console

Inline = tyro.conf.arg(name="")
Positional = tyro.conf.Positional
KEY_VALUE = re.compile(r"[A-Za-z_][\w.\-]*=.*", re.DOTALL)


@dataclass(frozen=True)
class _Options:
    config: Annotated[TrainConfig, Inline]
    run: Path | None = None
    """The run's folder: configuration, metrics, checkpoints and weights."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues from the newest complete checkpoint in the folder, if there is one."""
    plan: str | None = None
    """Print the plan for a cluster of GPUSxGB, such as 8x80, and train nothing."""


def train(args: Sequence[str]) -> None:
    """Train a model: miro train PRESET --run DIR --data DIR [options]."""
    if not args or args[0] in ("-h", "--help"):
        print(
            f"usage: miro train PRESET --run DIR --data DIR [options]\n\nPresets: "
            f"{', '.join(PRESETS)}. `miro train PRESET --help` lists every option.",
            file=sys.stdout if args else sys.stderr,
        )
        if not args:
            raise SystemExit(2)
        return
    options = tyro.cli(
        _Options,
        default=_Options(preset(args[0])),
        args=[word for given in args[1:] for word in _option_words(given)],
        prog=f"miro train {args[0]}",
        # So that compile=False can be written like every other key=value.
        config=(tyro.conf.FlagConversionOff,),
    )
    if options.plan is not None:
        print(_plan(options.config, options.plan))
        return
    if options.run is None:
        raise ValueError("train: the run's folder is not set: --run DIR")
    from miro.training.loop import train as run

    first = dist_env(os.environ).first
    if not first:
        # Only rank 0 logs below WARNING and has a progress bar.
        logging.getLogger().setLevel(logging.WARNING)
    with bar("train", options.config.images) if first else nullcontext() as show:

        def report(progress: TrainingProgress) -> None:
            assert show is not None  # Only rank 0 reports.
            show(progress.images, progress.total, progress_detail(progress))

        weights = run(options.config, options.run, resume=options.resume, report=report)
    shutdown()
    if first:
        console.print(
            f"weights are in {weights}; sample with `miro sample {options.run} --prompt ...`"
        )


def _option_words(given: str) -> list[str]:
    """Write KEY=VALUE as an option; of a key with several values, VALUE is a list with commas."""
    if not KEY_VALUE.fullmatch(given.removeprefix("--")):
        return [given]
    key, _, value = given.removeprefix("--").partition("=")
    hint: Any = TrainConfig
    for name in key.replace("-", "_").split("."):
        hint = typing.get_type_hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
    if tuple in (typing.get_origin(kind) for kind in (hint, *typing.get_args(hint))):
        return [f"--{key}", *filter(None, value.split(","))]
    return [f"--{key}={value}"]


def _plan(config: TrainConfig, cluster: str) -> str:
    """The table of `choose_plan`, for the shapes of the data or, without it, of the paper's."""
    from miro.data.mixture import open_data
    from miro.training.planner import Cluster, Problem, choose_plan

    problem = Problem(config, Cluster.parse(cluster))
    if config.data is not None and not config.on_the_fly:
        dataset = open_data(config.data, config.conditioning.reward_slots)
        problem = Problem(
            config,
            problem.cluster,
            max(dataset.shapes, key=math.prod),
            dataset.text_dim,
            len(dataset.rewards),
        )
    return choose_plan(problem)[1]


def progress_detail(progress: TrainingProgress) -> str:
    """Return the text beside the progress bar."""
    detail = f"loss {progress.loss:.4f}  {progress.images_per_second:,.0f} images/s"
    if progress.mfu is not None:
        detail += f"  {progress.mfu:.0%} MFU"
    if progress.skipped:
        detail += f"  {progress.skipped} skipped steps"
    if progress.data_wait > 0.02:
        detail += f"  {progress.data_wait:.0%} waiting for data"
    return detail


def export(run: Positional[Path], dest: Positional[Path], images: int | None = None) -> None:
    """Copy a run's weights with all that sampling needs: DEST is enough for `miro sample`.

    Args:
        run: a run's folder, or one of its checkpoints.
        dest: the folder to write.
        images: which weights, by the images trained on; the newest if not given.
    """
    from miro.sampling.export import export as write

    console.print(f"{write(run, dest, images)}: sample with `miro sample {dest} --prompt ...`")
