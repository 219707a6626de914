"""`miro annotate`: captioned images to a dataset folder of shards and raw scores.

SOURCE is anything `miro.sources` reads, or a dataset folder. A source is read in partitions, each
of which becomes one shard with its scores; the manifest lists it last, so an interruption loses
only the partition in progress. A dataset folder is linked, not copied, and only scored. Only
missing scores are computed, so a reward can be added later and an interrupted run resumes.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from miro.data.shards import (
    MODELS,
    Manifest,
    ShardInfo,
    check_shard,
    score_columns,
    scores_path,
    shard_path,
    write_shard,
)
from miro.images.open_decoder import DecoderName, build_decoder
from miro.prepare.rejected_log import RejectedLog
from miro.prepare.score_rows import ScoreRows
from miro.prepare.scoring import Outcome, ScoringConfig, scored
from miro.prepare.work_log import (
    STATE,
    CompletedUnit,
    begin,
    gather,
    read_completed_unit,
    write_completed_unit,
)
from miro.rewards.base import Reward, RewardOptions
from miro.rewards.registry import build_reward
from miro.rewards.scorer import Offload
from miro.sources.sample import RawSample, RejectedSample, read_sample
from miro.sources.source import Source, open_source, shard_name
from miro.sources.tables import TableColumns
from miro.sources.tar import iterate_shard
from miro.utils.atomic_io import link_or_copy
from miro.utils.distributed import DistEnv, dist_env
from miro.utils.locks import blocking_lock, exclusive_lock
from miro.utils.reward_names import reward_position

log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]  # samples looked at, of how many (None: not known)


@dataclass(frozen=True)
class AnnotateConfig:
    """How to annotate. Three batches of decoded images are in memory."""

    batch_size: int = 64
    samples_per_shard: int = 5_000  # of the source, skipped ones included
    max_rejected: float = 0.5  # stop above this share of skipped samples ...
    max_rejected_after: int = 100  # ... once so many were looked at
    workers: int = 0  # threads that decode; 0: one per core, at most 16
    decoder: DecoderName = "auto"  # DALI where it is installed, Pillow elsewhere
    device: str = "cpu"  # where rewards compute, and DALI decodes
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of networks; auto: bf16 on a GPU
    compile: Literal["auto", "always", "never"] = "auto"  # networks; auto: on a GPU
    allow_code: bool = False  # run Python code that comes with a model's weights
    offload: Offload = "auto"  # networks on the device one at a time
    window: int = 2_048  # samples decoded before offloaded networks score them
    image_column: str | None = None  # of a table; by default found by its name
    caption_columns: tuple[str, ...] = ()  # of a table; by default all that are named like one

    def __post_init__(self) -> None:
        for name in ("batch_size", "samples_per_shard", "max_rejected_after", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"max_rejected must be between 0 and 1, got {self.max_rejected}")
        if self.workers < 0:
            raise ValueError(f"workers must be 0 or more, got {self.workers}")


@dataclass(frozen=True)
class AnnotateSummary:
    """What DEST holds now (samples, lines of rejected.jsonl), and what this call did for it."""

    samples: int
    rejected: int
    looked_at: int  # samples read in this call
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Samples looked at in a second, reading and writing included."""
        return self.looked_at / max(self.seconds, 1e-9)


def annotate(
    source: Path,
    dest: Path,
    *,
    rewards: Sequence[str | Reward],
    config: AnnotateConfig | None = None,
    progress: Progress | None = None,
) -> AnnotateSummary:
    """Make or complete the dataset folder `dest` from `source`, with a score column per reward.

    rewards: "name" or "name=weights" as `build_reward` takes them, or objects of that protocol.
    None at all is allowed: the shards can be scored later. `source` may be `dest` itself where that
    is a dataset folder. ValueError before any work for a source that is absent or empty, a reward
    that is not known, a `dest` made from something else; later where too many samples are unusable.
    OSError where the disk is full. All that was complete is kept, and the same call goes on.
    """
    started = time.perf_counter()
    source, dest = Path(source), Path(dest)
    config = AnnotateConfig() if config is None else config
    ranks = dist_env(os.environ)
    device = ranks.device(config.device)
    built = _build(rewards, _options(config, device))
    dataset = Manifest.read(source) if (source / "manifest.json").is_file() else None
    if dataset is not None and dataset.kind != "images":
        raise ValueError(f"{source}: is encoded already; annotate the images it was made from")
    if dest.exists() and not dest.is_dir():
        raise ValueError(f"{dest}: is a file; DEST must be a folder")
    if dataset is None and source.resolve() == dest.resolve():
        raise ValueError(f"{dest}: DEST must not be SOURCE, which is not a dataset folder")
    opened = None
    if dataset is None:
        columns = TableColumns(config.image_column, config.caption_columns)
        opened = open_source(source, config.samples_per_shard, columns)
    decoder = build_decoder(config.decoder, device, config.batch_size, config.workers)
    with (
        closing(decoder),
        exclusive_lock(dest, ranks.rank),
        RejectedLog(dest / "rejected.jsonl") as rejected,
    ):
        scoring = ScoringConfig(config.batch_size, decoder, device, config.offload, config.window)
        work = _Work(dest, built, config, scoring, ranks, rejected, progress)
        if opened is not None:
            work.ingest(source, opened)
        elif dataset is not None:
            work.link(source, dataset)
        manifest = work.complete()
        seconds = time.perf_counter() - started
        return AnnotateSummary(manifest.samples, len(rejected), work.looked_at, seconds)


def _options(config: AnnotateConfig, device: torch.device) -> RewardOptions:
    on_gpu = device.type == "cuda"
    automatic: Literal["fp32", "bf16"] = "bf16" if on_gpu else "fp32"
    return RewardOptions(
        device,
        precision=automatic if config.precision == "auto" else config.precision,
        compile=on_gpu if config.compile == "auto" else config.compile == "always",
        batch_size=config.batch_size,
        allow_code=config.allow_code,
    )


def _build(rewards: Sequence[str | Reward], options: RewardOptions) -> list[Reward]:
    """The rewards, in their order; ValueError for one that is not known or comes twice."""
    built = [build_reward(r, options=options) if isinstance(r, str) else r for r in rewards]
    names = [reward.name for reward in built]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the reward {name!r} is given twice")
    return sorted(built, key=lambda reward: reward_position(reward.name))


class _Work:
    """One call of `annotate`: what this process does to the folder, and how far it is."""

    def __init__(
        self,
        dest: Path,
        rewards: list[Reward],
        config: AnnotateConfig,
        scoring: ScoringConfig,
        ranks: DistEnv,
        rejected: RejectedLog,
        progress: Progress | None,
    ):
        self.looked_at = 0
        self._dest, self._rewards, self._config = dest, rewards, config
        self._ranks, self._rejected, self._progress = ranks, rejected, progress
        self._scoring = scoring
        self._total: int | None = None
        self._skipped = 0

    def ingest(self, path: Path, source: Source) -> None:
        """Make the shards that this process's groups of `source` still lack, with their scores."""
        self._check_models(begin(self._dest, path.name, source.fingerprint))
        mine = range(self._ranks.rank, source.groups, self._ranks.world)
        todo = [(group, unit) for group in mine if (unit := self._next(group)) is not None]
        if source.total is not None:  # a group of a source that knows its total has one unit
            most = len(todo) * self._config.samples_per_shard
            self._total = min(most, source.total)
        for group, first in todo:
            units = source.partitions(group, first)
            following = next(units, None)
            for number in itertools.count(first):
                items, following = following, next(units, None)
                if items is None:
                    break
                self._make(group, number, items, last=following is None)
                manifest = gather(self._dest, self._rejected)
                log.info("%s: %d samples", self._dest, manifest.samples)
        manifest = gather(self._dest, self._rejected)
        if manifest.source[STATE]["group"] == source.groups and not manifest.samples:
            raise ValueError(
                f"{path}: not one of its samples can be used, {self._rejected.path} says why;"
                " mend it and annotate into a new folder"
            )

    def _next(self, group: int) -> int | None:
        """The first unit of a group that is not done, or None."""
        for unit in itertools.count():
            done = read_completed_unit(self._dest, group, unit)
            if done is None:
                return unit
            if done.last:
                return None

    def _make(
        self, group: int, number: int, items: Iterator[RawSample | RejectedSample], last: bool
    ) -> None:
        """A unit's shard, its scores and its record."""
        names = tuple(reward.name for reward in self._rewards)
        rows, rejections = ScoreRows(names), []
        try:
            samples = self._good(items, rows, rejections)
            first, shard = next(samples, None), None
            if first is not None:
                tar = self._dest / "shards" / shard_name(group, number)
                shard = write_shard(tar, itertools.chain([first], samples))
                rows.write(scores_path(self._dest, shard))
        except ValueError:  # too many are unusable: the log says which
            for rejection in rejections:
                self._rejected.add(*rejection.line)
            raise
        kinds = tuple(dict.fromkeys(rows.captions))
        done = CompletedUnit(shard, kinds, tuple(rejections), last)
        write_completed_unit(self._dest, group, number, done)

    def _good(
        self,
        items: Iterator[RawSample | RejectedSample],
        rows: ScoreRows,
        rejections: list[RejectedSample],
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """A unit's good samples as `write_shard` takes them; the rest is added to the lists."""
        for batch in scored(items, self._rewards, self._scoring):
            for outcome in batch:
                item, scores, rejection = outcome.sample, outcome.scores, outcome.rejection
                if item and scores is not None and scores.size and np.isnan(scores).all():
                    rejection = RejectedSample(item.origin, "scores", "every reward gave NaN")
                if rejection is not None:
                    rejections.append(rejection)
                    self._skipped += rejection.whole
                elif item and scores is not None:
                    rows.add(item, scores)
                    content = json.dumps({"captions": item.captions, **item.extra})
                    yield item.key, {item.extension: item.image, "json": content.encode()}
            self._looked_at(batch, rejections[-1] if rejections else None)

    def link(self, source: Path, dataset: Manifest) -> None:
        """Make DEST a dataset of the same shards, unless it is one; bytes are shared."""
        self._check_models(dataset)
        if source.resolve() == self._dest.resolve():
            return
        with blocking_lock(self._dest):
            if (self._dest / "manifest.json").is_file():
                if Manifest.read(self._dest).shards != dataset.shards:
                    raise ValueError(
                        f"{self._dest}: has other shards than {source}; choose a new folder"
                    )
                return
            for shard in dataset.shards:
                check_shard(source, shard)
                for path_of in (shard_path, scores_path):
                    if path_of(source, shard).is_file():
                        link_or_copy(path_of(source, shard), path_of(self._dest, shard))
            dataset.write(self._dest)

    def _check_models(self, manifest: Manifest) -> None:
        """ValueError where a column that is there was made by another model than is asked for."""
        models = manifest.source.get(MODELS, {})
        for reward in self._rewards:
            before = models.get(reward.name, reward.model)
            if before != reward.model and reward.name in manifest.rewards:
                raise ValueError(
                    f"{self._dest}: its {reward.name!r} was scored by {before}, not by "
                    f"{reward.model}; scores of two models do not compare: annotate into a new "
                    "folder"
                )

    def complete(self) -> Manifest:
        """Score what this process's shards lack; the manifest then lists what all shards have."""
        manifest = Manifest.read(self._dest)
        lacking: list[tuple[ShardInfo, list[Reward]]] = []
        for shard in manifest.shards[self._ranks.rank :: self._ranks.world]:
            present = _columns(self._dest, shard)
            missing = [reward for reward in self._rewards if reward.name not in (present or ())]
            if missing or present is None:
                lacking.append((shard, missing))
        if lacking:
            self._total = self.looked_at + sum(shard.samples for shard, _ in lacking)
        for shard, _ in lacking:
            check_shard(self._dest, shard)
        for shard, missing in lacking:
            self._add_scores(shard, missing)
        with blocking_lock(self._dest):
            manifest = Manifest.read(self._dest)
            columns = [set(_columns(self._dest, shard) or ()) for shard in manifest.shards]
            everywhere = set.intersection(*columns) if columns else set()
            models = manifest.source.get(MODELS, {}) | {r.name: r.model for r in self._rewards}
            models = {name: models[name] for name in sorted(models, key=reward_position)}
            complete = replace(
                manifest,
                rewards=tuple(sorted(everywhere, key=reward_position)),
                source={**manifest.source, MODELS: models},
            )
            if complete != manifest:
                complete.write(self._dest)
            return complete

    def _add_scores(self, shard: ShardInfo, rewards: list[Reward]) -> None:
        """Add columns to one shard's table, or make the table."""
        rows = ScoreRows(tuple(reward.name for reward in rewards))
        tar = shard_path(self._dest, shard)
        unit = (
            item
            for key, members in iterate_shard(tar)
            for item in read_sample(f"{shard.name}:{key}", key, members)
        )
        for batch in scored(unit, rewards, self._scoring):
            for outcome in batch:
                if outcome.rejection is not None:
                    self._rejected.add(*outcome.rejection.line)
                    self._skipped += outcome.rejection.whole
                if (item := outcome.sample) is not None:
                    # The shard stays as it is: a bad image keeps its rows, not known.
                    unknown = np.full((len(item.captions), len(rewards)), np.nan, np.float32)
                    rows.add(item, unknown if outcome.scores is None else outcome.scores)
            self._looked_at(batch, next((o.rejection for o in batch[::-1] if o.rejection), None))
        rows.add_to(scores_path(self._dest, shard))

    def _looked_at(self, batch: list[Outcome], last: RejectedSample | None) -> None:
        """Report progress; ValueError if the share of skipped samples is too large."""
        self.looked_at += sum(outcome.whole for outcome in batch)
        if self._progress is not None:
            self._progress(self.looked_at, self._total)
        share, limit = self._skipped / max(self.looked_at, 1), self._config.max_rejected
        if self.looked_at >= self._config.max_rejected_after and share > limit:
            said = f", last: {last.source}: {last.reason}" if last else ""
            raise ValueError(
                f"{self._skipped} of the first {self.looked_at} samples were skipped, more than"
                f" the share of {limit:g} allowed by max_rejected; {self._rejected.path} says why"
                f"{said}"
            )


def _columns(dest: Path, shard: ShardInfo) -> list[str] | None:
    """The rewards of a shard's table, or None where it has no table."""
    path = scores_path(dest, shard)
    return score_columns(path) if path.is_file() else None
