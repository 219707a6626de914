"""The commands for datasets: annotate, caption, inspect and encode.

annotate, caption and encode may be run by all ranks of a launch; rank 0 shows the progress.
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
from miro.utils.progress import ProgressCallback, console, counting

Inline = tyro.conf.arg(name="")
Positional = tyro.conf.Positional


@contextmanager
def _on_first_rank(name: str) -> Iterator[tuple[ProgressCallback, Callable[[str], None]]]:
    """Yield the functions that show progress and print; they do nothing on other ranks."""
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
        dest: the dataset folder to write or to complete.
        rewards: names, or name=weights where a reward needs them, as in alignment=runs/clip.
        config: decoding, batching and device.
    """
    from miro.prepare.annotate import annotate as run

    with _on_first_rank("annotate") as (progress, say):
        summary = run(source, dest, rewards=rewards, config=config, progress=progress)
        say(
            f"{dest}: {summary.samples} samples, {summary.rejected} rejected "
            f"({dest / 'rejected.jsonl'}), {summary.images_per_second:.0f} images/s"
        )


def caption(
    source: Positional[Path],
    dest: Positional[Path],
    config: Annotated[CaptionConfig, Inline] = CaptionConfig(),  # noqa: B008 frozen
) -> None:
    """Add captions to a dataset's images, by a vision-language model or from a table.

    Args:
        source: a dataset folder of `miro annotate`; its scores are not needed.
        dest: the dataset folder to write, without scores: annotate it afterwards.
        config: the model or table, and its options.
    """
    from miro.prepare.caption import caption as run

    with _on_first_rank("caption") as (progress, say):
        summary = run(source, dest, config=config, progress=progress)
        say(
            f"{dest}: {summary.samples} samples, {summary.rejected} captions rejected "
            f"({dest / 'rejected.jsonl'}), {summary.images_per_second:.1f} images/s\n"
            f"score it with `miro annotate {dest} {dest} --rewards ...`"
        )


def inspect(
    data: Positional[Path],
    out: Path | None = None,
    config: Annotated[InspectConfig, Inline] = InspectConfig(),  # noqa: B008 frozen
) -> None:
    """Show a dataset on one HTML page: counts, scores, rejected samples, the best and worst.

    Args:
        data: a dataset folder of `miro annotate` or `miro encode`.
        out: the page, NAME.html, with the numbers in NAME.json; DATA/inspect.html if not given.
        config: how many samples to read and to show.
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
        source: a dataset folder of `miro annotate`.
        dest: the encoded dataset to write.
        config: encoders, decoding and device.
    """
    from miro.prepare.encode import encode as run

    with _on_first_rank("encode") as (progress, say):
        summary = run(source, dest, config=config, progress=progress)
        truncated = (
            f", {summary.cut} captions truncated to the encoder's length" if summary.cut else ""
        )
        say(f"{dest}: {summary.samples} samples{truncated}, {summary.images_per_second:.0f}/s")
