"""`miro inspect`: a dataset folder looked at from all sides, as one HTML page and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from miro.data.shards import MODELS, Manifest, scores_path
from miro.inspect.contact_sheets import contact_sheets, why_no_images
from miro.inspect.rejected_counts import read_rejected
from miro.inspect.sample_stats import look
from miro.inspect.score_stats import (
    correlation,
    dense_ranks,
    order_of,
    read_columns,
    reward_numbers,
)
from miro.inspect.summary import RewardNumbers, Survey
from miro.utils.atomic_io import write_text

Progress = Callable[[int, int | None], None]  # samples whose scores were read, of how many


@dataclass(frozen=True)
class InspectConfig:
    """How much of a dataset to look at, and what to show of it."""

    images: int = 24  # on a contact sheet; 0 for none
    bins: int = 64  # whose edges are marked, as conditioning.bins of the training to come
    look_at: int = 20_000  # samples whose captions and sizes are read; the scores are read of all

    def __post_init__(self) -> None:
        for name, least in (("images", 0), ("bins", 2), ("look_at", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


def inspect(
    folder: Path,
    out: Path | None = None,
    *,
    config: InspectConfig | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the page of the dataset `folder` to `out`, FOLDER/inspect.html if None, and return it.

    The numbers lie beside it, under the same name with .json. ValueError where `folder` is no
    dataset or holds no samples, a shard or a score file is missing or damaged, or `out` is not
    named .html.
    """
    folder, config = Path(folder), config or InspectConfig()
    out = folder / "inspect.html" if out is None else Path(out)
    if out.suffix != ".html":
        raise ValueError(f"{out}: the page's name must end in .html")
    # Here, as matplotlib is loaded with it: `miro --help` need not wait.
    from miro.inspect.inspect_page import write_survey_page

    survey = survey_of(folder, config, progress or (lambda done, total: None))
    write_text(out.with_suffix(".json"), json.dumps(survey.to_json(), indent=1))
    return write_survey_page(out, survey)


def survey_of(folder: Path, config: InspectConfig, progress: Progress) -> Survey:
    """What `inspect` shows; raises what it raises."""
    manifest = Manifest.read(folder)
    if not manifest.samples:
        stage = "annotate" if manifest.kind == "images" else "encode"
        raise ValueError(f"{folder} holds no samples yet; let `miro {stage}` complete a shard")
    scored = bool(manifest.rewards) or all(
        scores_path(folder, shard).is_file() for shard in manifest.shards
    )
    columns = read_columns(folder, manifest, progress) if scored else None
    numbers: list[RewardNumbers] = []
    ranks: dict[str, np.ndarray] = {}
    extremes: dict[tuple[str, str], np.ndarray] = {}
    most = config.images * len(manifest.captions)  # a sample has a pair for each kind at most
    for name, column in columns.values.items() if columns else ():
        order = order_of(column)
        found = reward_numbers(name, column, order, config.bins, _model(manifest, name))
        numbers.append(found)
        ranks[name] = dense_ranks(column, order)
        if found.distinct > 1 and most:
            ends = {"best": order[::-1][:most], "worst": order[:most]}
            extremes |= {(name, end): pairs.copy() for end, pairs in ends.items()}
    sheets = (
        ()
        if columns is None
        else contact_sheets(folder, manifest, columns, extremes, config.images)
    )
    return Survey(
        name=folder.resolve().name,
        kind=manifest.kind,
        samples=manifest.samples,
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        pairs=None if columns is None else int(columns.starts[-1]),
        bins=config.bins,
        looks=look(folder, manifest, config.look_at),
        rewards=tuple(numbers),
        correlation=correlation(ranks) if len(ranks) > 1 else None,
        rejected=read_rejected(folder / "rejected.jsonl"),
        encoding=manifest.encoding or {},
        sheets=sheets,
        no_images=why_no_images(manifest),
    )


def _model(manifest: Manifest, reward: str) -> str | None:
    """What gave a reward's scores, where the manifest says it."""
    models = manifest.source.get(MODELS)
    model = models.get(reward) if isinstance(models, dict) else None
    return None if model is None else str(model)
