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
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from miro.data.shards import Manifest, ShardInfo, check_shard, scores_path, write_shard
from miro.images.open_decoder import DecoderName, build_decoder
from miro.prepare.manifests import (
    STATE,
    check_models,
    columns_of,
    commit_rewards,
    link_dataset,
    open_manifest,
    read_images_manifest,
)
from miro.prepare.rejected_log import RejectedLog
from miro.prepare.score_writer import ScoreWriter
from miro.prepare.scoring import ScoringConfig, ScoringResult, score_samples
from miro.prepare.shard_samples import shard_samples
from miro.prepare.work_log import CompletedShard, commit_partitions, read_completed, write_completed
from miro.rewards.base import Reward, RewardOptions
from miro.rewards.registry import build_reward
from miro.rewards.scorer import Offload
from miro.sources.sample import RejectedSample, Samples
from miro.sources.source import Source, open_source, shard_name
from miro.sources.tables import TableColumns
from miro.utils.distributed import DistEnv, dist_env
from miro.utils.locks import exclusive_lock
from miro.utils.progress import ProgressCallback
from miro.utils.reward_names import reward_position

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnnotateConfig:
    """Options of `annotate`."""

    batch_size: int = 64  # three batches of decoded images are in memory
    samples_per_shard: int = 5_000  # of the source, skipped ones included
    max_rejected: float = 0.5  # stop above this share of skipped samples ...
    max_rejected_after: int = 100  # ... once so many were read
    workers: int = 0  # decoder threads; 0: one per core, at most 16
    decoder: DecoderName = "auto"  # auto: DALI if it is installed, else Pillow
    device: str = "cpu"  # of rewards, and of DALI
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, else fp32
    compile: Literal["auto", "always", "never"] = "auto"  # torch.compile; auto: on a GPU
    allow_code: bool = False  # run Python code of the model folder (trust_remote_code)
    offload: Offload = "auto"  # networks on the device one at a time
    window: int = 2_048  # samples decoded before offloaded networks score them
    image_column: str | None = None  # of a table; default: found by name
    caption_columns: tuple[str, ...] = ()  # of a table; default: all with the name of one

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
    """Contents of DEST, and the work of this call."""

    samples: int
    rejected: int  # lines of rejected.jsonl
    processed: int  # samples read by this call
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Samples read per second, including reading, decoding and writing."""
        return self.processed / max(self.seconds, 1e-9)


def annotate(
    source: Path,
    dest: Path,
    *,
    rewards: Sequence[str | Reward],
    config: AnnotateConfig | None = None,
    progress: ProgressCallback | None = None,
) -> AnnotateSummary:
    """Write or complete the dataset folder `dest` with a score column per reward.

    After an error or a kill, the same call resumes after the last completed shard.

    Args:
        source: Anything that `open_source` reads, or a dataset folder, which may be `dest` itself.
        dest: The dataset folder.
        rewards: "name" or "name=weights" as for `build_reward`, or objects. Without any, shards are
            written and can be scored later.
        config: Decoding, batching and device.
        progress: Called after every batch.

    Raises:
        ValueError: Before any work: the source is absent or empty, a reward is unknown, or `dest`
            was made from another source. Later: too many samples are rejected.
        OSError: The disk is full.
    """
    started = time.perf_counter()
    source, dest = Path(source), Path(dest)
    config = AnnotateConfig() if config is None else config
    env = dist_env(os.environ)
    device = env.device(config.device)
    built = _build_rewards(rewards, _reward_options(config, device))
    dataset = None
    if (source / "manifest.json").is_file():
        dataset = read_images_manifest(source, "annotate")
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
        exclusive_lock(dest, env.rank),
        RejectedLog(dest / "rejected.jsonl") as rejected,
    ):
        scoring = ScoringConfig(config.batch_size, decoder, device, config.offload, config.window)
        job = AnnotateJob(dest, built, config, scoring, env, rejected, progress)
        if opened is not None:
            job.write_shards(source, opened)
        elif dataset is not None:
            check_models(dest, dataset, built)
            link_dataset(source, dest, dataset)
        job.add_scores()
        manifest = commit_rewards(dest, built)
        seconds = time.perf_counter() - started
        return AnnotateSummary(manifest.samples, len(rejected), job.processed, seconds)


def _reward_options(config: AnnotateConfig, device: torch.device) -> RewardOptions:
    on_gpu = device.type == "cuda"
    auto_precision: Literal["fp32", "bf16"] = "bf16" if on_gpu else "fp32"
    return RewardOptions(
        device,
        precision=auto_precision if config.precision == "auto" else config.precision,
        compile=on_gpu if config.compile == "auto" else config.compile == "always",
        batch_size=config.batch_size,
        allow_code=config.allow_code,
    )


def _build_rewards(rewards: Sequence[str | Reward], options: RewardOptions) -> list[Reward]:
    """Build the rewards, in column order; ValueError for one that is unknown or repeated."""
    built = [build_reward(r, options=options) if isinstance(r, str) else r for r in rewards]
    names = [reward.name for reward in built]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the reward {name!r} is given twice")
    return sorted(built, key=lambda reward: reward_position(reward.name))


class AnnotateJob:
    """One call of `annotate` in one process.

    Attributes:
        processed: Samples read so far.
    """

    def __init__(
        self,
        dest: Path,
        rewards: list[Reward],
        config: AnnotateConfig,
        scoring: ScoringConfig,
        env: DistEnv,
        rejected: RejectedLog,
        progress: ProgressCallback | None,
    ) -> None:
        self.processed = 0
        self._dest, self._rewards, self._config, self._scoring = dest, rewards, config, scoring
        self._env, self._rejected, self._progress = env, rejected, progress
        self._total: int | None = None
        self._skipped = 0
        self._last_rejection: RejectedSample | None = None

    def write_shards(self, path: Path, source: Source) -> None:
        """Write the missing shards of this rank's groups of `source`, with their scores."""
        manifest = open_manifest(self._dest, path.name, source.fingerprint)
        check_models(self._dest, manifest, self._rewards)
        groups = self._env.shard(range(source.groups))
        todo = [(g, skip) for g in groups if (skip := self._count_completed(g)) is not None]
        if source.total is not None:  # then each group is one partition
            self._total = min(len(todo) * self._config.samples_per_shard, source.total)
        for group, skip in todo:
            partitions = source.partitions(group, skip)
            following = next(partitions, None)
            for partition in itertools.count(skip):
                samples, following = following, next(partitions, None)
                if samples is None:
                    break
                self._write_shard(shard_name(group, partition), samples, last=following is None)
                manifest = commit_partitions(self._dest, self._rejected)
                log.info("%s: %d samples", self._dest, manifest.samples)
        manifest = commit_partitions(self._dest, self._rejected)
        if manifest.source[STATE]["group"] == source.groups and not manifest.samples:
            raise ValueError(
                f"{path}: none of its samples is valid, see {self._rejected.path}; correct them "
                "and annotate into a new folder"
            )

    def _count_completed(self, group: int) -> int | None:
        """The number of completed partitions of a group, None if all are."""
        for partition in itertools.count():
            completed = read_completed(self._dest, shard_name(group, partition))
            if completed is None:
                return partition
            if completed.last:
                return None

    def _write_shard(self, name: str, samples: Samples, last: bool) -> None:
        """Write the shard of a partition, its scores and its record."""
        scores = ScoreWriter([reward.name for reward in self._rewards])
        rejections: list[RejectedSample] = []
        try:
            valid = self._valid_samples(samples, scores, rejections)
            first, shard = next(valid, None), None
            if first is not None:
                shard = write_shard(self._dest / "shards" / name, itertools.chain([first], valid))
                scores.write(scores_path(self._dest, shard))
        except ValueError:  # too many are rejected: log the reasons before the run ends
            for rejection in rejections:
                self._rejected.add(rejection)
            raise
        captions = tuple(dict.fromkeys(scores.captions))
        completed = CompletedShard(
            shard, captions=captions, rejections=tuple(rejections), last=last
        )
        write_completed(self._dest, name, completed)

    def _valid_samples(
        self, samples: Samples, scores: ScoreWriter, rejections: list[RejectedSample]
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yield the valid samples for `write_shard`; the other arguments are appended to."""
        for batch in score_samples(samples, self._rewards, self._scoring):
            for result in batch:
                sample, values, rejection = result.sample, result.scores, result.rejection
                if sample and values is not None and values.size and np.isnan(values).all():
                    rejection = RejectedSample(sample.origin, "scores", "every reward gave NaN")
                if rejection is not None:
                    rejections.append(rejection)
                    self._skip(rejection)
                elif sample and values is not None:
                    scores.add(sample, values)
                    content = json.dumps({"captions": sample.captions, **sample.extra})
                    yield sample.key, {sample.extension: sample.image, "json": content.encode()}
            self._report(batch)

    def add_scores(self) -> None:
        """Compute the missing scores of this rank's shards."""
        todo: list[tuple[ShardInfo, list[Reward]]] = []
        for shard in self._env.shard(Manifest.read(self._dest).shards):
            existing = columns_of(self._dest, shard)
            missing = [reward for reward in self._rewards if reward.name not in (existing or ())]
            if missing or existing is None:
                todo.append((shard, missing))
        if todo:
            self._total = self.processed + sum(shard.samples for shard, _ in todo)
        for shard, _ in todo:
            check_shard(self._dest, shard)
        for shard, missing in todo:
            self._add_columns(shard, missing)

    def _add_columns(self, shard: ShardInfo, rewards: list[Reward]) -> None:
        """Add columns to the score table of a shard."""
        scores = ScoreWriter([reward.name for reward in rewards])
        samples = (sample for sample, _ in shard_samples(self._dest, shard))
        for batch in score_samples(samples, rewards, self._scoring):
            for result in batch:
                if result.rejection is not None:
                    self._rejected.add(result.rejection)
                    self._skip(result.rejection)
                if (sample := result.sample) is not None:
                    # Shards do not change, so an image that cannot be decoded has rows of NaN.
                    nan = np.full((len(sample.captions), len(rewards)), np.nan, np.float32)
                    scores.add(sample, nan if result.scores is None else result.scores)
            self._report(batch)
        scores.write_columns(scores_path(self._dest, shard))

    def _skip(self, rejection: RejectedSample) -> None:
        self._skipped += rejection.whole
        self._last_rejection = rejection

    def _report(self, batch: list[ScoringResult]) -> None:
        """Report progress; ValueError if too large a share of samples was skipped."""
        self.processed += sum(result.whole for result in batch)
        if self._progress is not None:
            self._progress(self.processed, self._total)
        share, limit = self._skipped / max(self.processed, 1), self._config.max_rejected
        if self.processed >= self._config.max_rejected_after and share > limit:
            last = self._last_rejection
            reason = f", last: {last.source}: {last.reason}" if last else ""
            raise ValueError(
                f"{self._skipped} of the first {self.processed} samples were skipped, a share "
                f"above max_rejected={limit:g}; see {self._rejected.path}{reason}"
            )
