"""The commands about datasets: scenes, annotate, caption, inspect, fit-clip, fit-verifier, encode.

annotate, caption and encode may be run by all ranks of a launch; of these the first one speaks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import tyro

from miro.inspect.inspect_dataset import InspectConfig
from miro.prepare.annotate import AnnotateConfig
from miro.prepare.caption import CaptionConfig
from miro.prepare.encode import EncodeConfig
from miro.utils.distributed import dist_env
from miro.utils.progress import console, counting

Inline = tyro.conf.arg(name="")
Positional = tyro.conf.Positional


@contextmanager
def _by_ranks(
    name: str,
) -> Iterator[tuple[Callable[[int, int | None], None], Callable[[str], None]]]:
    """How a stage counts samples, and says what it did."""
    if dist_env(os.environ).first:
        with counting(name) as progress:
            yield progress, console.print
    else:
        logging.getLogger().setLevel(logging.WARNING)
        yield (lambda done, total: None), (lambda text: None)


def annotate(
    source: Positional[Path],
    dest: Positional[Path],
    rewards: tuple[str, ...] = ("colourfulness", "sharpness"),
    config: Annotated[AnnotateConfig, Inline] = AnnotateConfig(),  # noqa: B008 frozen
) -> None:
    """Score captioned images with rewards: SOURCE to a dataset folder of shards and scores.

    Args:
        source: a folder of images with .txt or .json captions beside them; WebDataset tars, as a
            folder or "a/{000..099}.tar"; a .csv, .tsv, .jsonl or .parquet table; a Hugging Face
            dataset on disk; or a dataset folder.
        dest: the dataset folder to make or to complete.
        rewards: names, or name=weights where a reward needs them, as in alignment=runs/clip.
        config: how to go about it.
    """
    from miro.prepare.annotate import annotate as run

    with _by_ranks("annotate") as (progress, say):
        summary = run(source, dest, rewards=rewards, config=config, progress=progress)
        say(
            f"{dest}: {summary.samples} samples, {summary.rejected} set aside "
            f"({dest / 'rejected.jsonl'}), {summary.images_per_second:.0f} images/s"
        )


def caption(
    source: Positional[Path],
    dest: Positional[Path],
    config: Annotated[CaptionConfig, Inline] = CaptionConfig(),  # noqa: B008 frozen
) -> None:
    """Give a dataset's images further captions, by a vision-language model or from a table.

    Args:
        source: a dataset folder that `miro annotate` made; its scores are not needed.
        dest: the dataset folder to make, without scores: annotate it afterwards.
        config: who writes the captions, and how.
    """
    from miro.prepare.caption import caption as run

    with _by_ranks("caption") as (progress, say):
        summary = run(source, dest, config=config, progress=progress)
        say(
            f"{dest}: {summary.samples} samples, {summary.rejected} captions set aside "
            f"({dest / 'rejected.jsonl'}), {summary.images_per_second:.1f} images/s\n"
            f"score it with `miro annotate {dest} {dest} --rewards ...`"
        )


def inspect(
    data: Positional[Path],
    out: Path | None = None,
    config: Annotated[InspectConfig, Inline] = InspectConfig(),  # noqa: B008 frozen
) -> None:
    """Show a dataset on one HTML page: counts, scores, what was set aside, the best and worst.

    Args:
        data: a dataset folder of `miro annotate` or `miro encode`.
        out: the page, NAME.html, with the numbers in NAME.json; DATA/inspect.html if not given.
        config: how much to look at, and what to show.
    """
    from miro.inspect.inspect_dataset import inspect as run

    with counting("inspect") as progress:
        page = run(data, out, config=config, progress=progress)
    console.print(f"{page}: the numbers are in {page.with_suffix('.json')}")


def encode(
    source: Positional[Path],
    dest: Positional[Path],
    config: Annotated[EncodeConfig, Inline] = EncodeConfig(),  # noqa: B008 frozen
) -> None:
    """Encode a dataset's images to latents and its captions to text states, once.

    Args:
        source: a dataset folder that `miro annotate` made.
        dest: the encoded dataset to make.
        config: which encoders, and how.
    """
    from miro.prepare.encode import encode as run

    with _by_ranks("encode") as (progress, say):
        summary = run(source, dest, config=config, progress=progress)
        cut = f", {summary.cut} captions cut to the encoder's length" if summary.cut else ""
        say(f"{dest}: {summary.samples} samples{cut}, {summary.images_per_second:.0f}/s")
