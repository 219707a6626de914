"""The command `miro caption`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from miro.caption import CaptionConfig
from miro.progress import console, counting


def caption(
    source: tyro.conf.Positional[Path],
    dest: tyro.conf.Positional[Path],
    config: Annotated[CaptionConfig, tyro.conf.arg(name="")] = CaptionConfig(),  # noqa: B008 frozen
) -> None:
    """Give a dataset's pictures further captions, by a vision-language model or from a table.

    Args:
        source: a dataset folder that `miro annotate` made; its scores are not needed.
        dest: the dataset folder to make, without scores: annotate it afterwards.
        config: who writes the captions, and how.
    """
    from miro.caption import caption as run

    with counting("caption") as progress:
        summary = run(source, dest, config=config, progress=progress)
    console.print(
        f"{dest}: {summary.samples} samples, {summary.rejected} captions set aside "
        f"({dest / 'rejected.jsonl'}), {summary.images_per_second:.1f} images/s\n"
        f"score it with `miro annotate {dest} {dest} --rewards ...`"
    )
