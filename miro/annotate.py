"""From captioned images to a dataset folder with raw scores: shards, Parquet, what was set aside.

SOURCE is a folder of images with captions beside them, WebDataset tars, or a dataset folder of
ours. The first two are read in units (miro.data.sources), each of which becomes a shard with its
scores; the manifest lists it last, so a stop at any moment loses the unit under way and no more. A
dataset folder is linked, not copied, and only scored. Scoring looks at what a shard's table lacks:
that is how a reward is added later, and how a scoring that was stopped goes on.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from miro.data.decode import Decoder, DecoderName, build_decoder, decode_ahead
from miro.data.rejected import RejectedLog
from miro.data.shards import (
    Manifest,
    ShardInfo,
    check_shard,
    iterate_shard,
    read_shard_scores,
    score_columns,
    scores_path,
    shard_path,
    write_scores,
    write_shard,
)
from miro.data.sources import Candidate, Rejection, Source, open_source, read_sample
from miro.data.tar import link_or_copy
from miro.rewards.base import Reward, build_reward, reward_position
from miro.rewards.pictures import Pictures

log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]  # samples looked at, of how many (None: not known)


@dataclass(frozen=True)
class AnnotateConfig:
    """How to annotate. Three batches of decoded images are in memory."""

    batch_size: int = 64
    samples_per_shard: int = 5_000  # of the source, those set aside included
    max_rejected: float = 0.5  # stop above this share of samples set aside ...
    max_rejected_after: int = 100  # ... once so many were looked at
    workers: int = 0  # threads that decode; 0: one per core, at most 16
    decoder: DecoderName = "auto"  # DALI where it is installed, Pillow elsewhere
    device: str = "cpu"  # where rewards compute, and DALI decodes

    def __post_init__(self) -> None:
        for name in ("batch_size", "samples_per_shard", "max_rejected_after"):
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
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    built = _build(rewards, config.device)
    dataset = Manifest.read(source) if (source / "manifest.json").is_file() else None
    if dataset is not None and dataset.kind != "images":
        raise ValueError(f"{source}: is encoded already; annotate the images it was made from")
    if dest.exists() and not dest.is_dir():
        raise ValueError(f"{dest}: is a file; DEST must be a folder")
    if dataset is None and source.resolve() == dest.resolve():
        raise ValueError(f"{dest}: DEST must not be SOURCE, which is not a dataset folder")
    opened = open_source(source, config.samples_per_shard) if dataset is None else None
    decoder = build_decoder(config.decoder, config.device, config.batch_size, config.workers)
    with closing(decoder), RejectedLog(dest / "rejected.jsonl") as rejected:
        work = _Work(dest, built, config, decoder, rejected, progress)
        if opened is not None:
            work.ingest(source, opened)
        elif dataset is not None:
            work.link(source, dataset)
        manifest = work.complete()
        seconds = time.perf_counter() - started
        return AnnotateSummary(manifest.samples, len(rejected), work.looked_at, seconds)


def _build(rewards: Sequence[str | Reward], device: str) -> list[Reward]:
    """The rewards, in their order; ValueError for one that is not known or comes twice."""
    built = [build_reward(r, device) if isinstance(r, str) else r for r in rewards]
    names = [reward.name for reward in built]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the reward {name!r} is given twice")
    return sorted(built, key=lambda reward: reward_position(reward.name))


class _Work:
    """One call of `annotate`: what it does to one folder, and how far it is."""

    def __init__(
        self,
        dest: Path,
        rewards: list[Reward],
        config: AnnotateConfig,
        decoder: Decoder,
        rejected: RejectedLog,
        progress: Progress | None,
    ):
        self.looked_at = 0
        self._dest, self._rewards, self._config = dest, rewards, config
        self._decoder, self._rejected, self._progress = decoder, rejected, progress
        self._total: int | None = None
        self._set_aside = 0

    def ingest(self, path: Path, source: Source) -> None:
        """Make the shards that `source` still lacks in DEST, each with its scores."""
        manifest = self._begin(path, source)
        names = tuple(reward.name for reward in self._rewards)
        done = manifest.source["annotate"]["units"]
        if source.total is not None:
            self._total = max(source.total - done * self._config.samples_per_shard, 0)
        for number, unit in enumerate(source.units(done), done):
            rows = _Rows(names)
            samples = self._good(unit, rows)
            first = next(samples, None)
            shards, kinds = manifest.shards, manifest.captions
            if first is not None:
                tar = self._dest / "shards" / f"{number:05d}.tar"
                shards += (write_shard(tar, itertools.chain([first], samples)),)
                table = scores_path(self._dest, shards[-1])
                write_scores(table, rows.keys, rows.captions, rows.columns())
                kinds = tuple(dict.fromkeys([*kinds, *rows.captions]))
            common = [n for n in names if n in manifest.rewards or not manifest.shards]
            state = {**manifest.source["annotate"], "units": number + 1}
            manifest = replace(
                manifest,
                captions=kinds,
                shards=shards,
                rewards=tuple(common),  # `complete` adds what earlier shards lack
                source={**manifest.source, "annotate": state},
            )
            manifest.write(self._dest)
            log.info("%s: %d samples in %d shards", self._dest, manifest.samples, len(shards))
        if not manifest.samples:
            raise ValueError(
                f"{path}: not one of its samples can be used, {self._rejected.path} says why;"
                " mend it and annotate into a new folder"
            )

    def _begin(self, path: Path, source: Source) -> Manifest:
        """The manifest to go on from; ValueError where DEST was made from something else."""
        if (self._dest / "manifest.json").is_file():
            manifest = Manifest.read(self._dest)
            if manifest.source.get("annotate", {}).get("fingerprint") != source.fingerprint:
                raise ValueError(
                    f"{self._dest}: was made from something else than {path} is now, or with"
                    " another samples_per_shard; annotate into a new folder"
                )
            return manifest
        if (self._dest / "shards").exists():
            raise ValueError(
                f"{self._dest}: holds shards but no manifest.json; choose a new folder"
            )
        state = {"from": path.name, "fingerprint": source.fingerprint, "units": 0}
        manifest = Manifest("images", (), (), source={"annotate": state})
        manifest.write(self._dest)
        return manifest

    def _good(
        self, unit: Iterable[Candidate | Rejection], rows: _Rows
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """A unit's good samples as `write_shard` takes them; their scores are added to `rows`."""
        for item, scores in self._scored(unit, self._rewards):
            if scores is None:
                continue
            if scores.size and np.isnan(scores).all():
                self._reject(Rejection(item.origin, "scores", "every reward gave NaN"))
                continue
            rows.add(item, scores)
            content = json.dumps({"captions": item.captions, **item.extra})
            yield item.key, {item.extension: item.image, "json": content.encode()}

    def link(self, source: Path, dataset: Manifest) -> None:
        """Make DEST a dataset of the same shards, unless it is one; bytes are shared."""
        if source.resolve() == self._dest.resolve():
            return
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

    def complete(self) -> Manifest:
        """Score what the listed shards have no score of; the manifest then lists what all have."""
        manifest = Manifest.read(self._dest)
        columns: list[set[str]] = []
        lacking: list[tuple[ShardInfo, list[Reward]]] = []
        for shard in manifest.shards:
            path = scores_path(self._dest, shard)
            present = set(score_columns(path)) if path.is_file() else set()
            missing = [reward for reward in self._rewards if reward.name not in present]
            columns.append(present | {reward.name for reward in missing})
            if missing or not path.is_file():
                lacking.append((shard, missing))
        if lacking:
            self._total = self.looked_at + sum(shard.samples for shard, _ in lacking)
        for shard, _ in lacking:
            check_shard(self._dest, shard)
        for shard, missing in lacking:
            self._add_scores(shard, missing)
        everywhere = set.intersection(*columns) if columns else set()
        complete = replace(manifest, rewards=tuple(sorted(everywhere, key=reward_position)))
        if complete != manifest:
            complete.write(self._dest)
        return complete

    def _add_scores(self, shard: ShardInfo, rewards: list[Reward]) -> None:
        """Add columns to one shard's table, or make the table."""
        rows = _Rows(tuple(reward.name for reward in rewards))
        tar = shard_path(self._dest, shard)
        unit = (
            item
            for key, members in iterate_shard(tar)
            for item in read_sample(f"{shard.name}:{key}", key, members)
        )
        for item, scores in self._scored(unit, rewards):
            if scores is None:  # the shard stays as it is: the sample keeps its rows, not known
                scores = np.full((len(item.captions), len(rewards)), np.nan, np.float32)
            rows.add(item, scores)
        columns, path = rows.columns(), scores_path(self._dest, shard)
        if path.is_file():
            keys, captions, before = read_shard_scores(path)
            if (keys, captions) != (rows.keys, rows.captions):
                raise ValueError(f"{path}: has rows of other samples; delete it and run again")
            columns = before | columns
        ordered = {name: columns[name] for name in sorted(columns, key=reward_position)}
        write_scores(path, rows.keys, rows.captions, ordered)

    def _scored(
        self, unit: Iterable[Candidate | Rejection], rewards: list[Reward]
    ) -> Iterator[tuple[Candidate, np.ndarray | None]]:
        """Samples with their scores, float32 (captions, rewards), or None for a bad image.

        What is set aside is logged, in the order of the unit.
        """
        for batch in decode_ahead(unit, _image_of, self._config.batch_size, self._decoder):
            images: list[Tensor] = []
            captions: list[dict[str, str]] = []
            for item, image in batch:
                if isinstance(item, Candidate) and isinstance(image, Tensor):
                    images.append(image)
                    captions.append(item.captions)
            scores = iter(_score(rewards, images, captions))
            for item, image in batch:
                if isinstance(item, Rejection):
                    self._reject(item)
                elif isinstance(image, Tensor):
                    yield item, next(scores)
                else:
                    self._reject(Rejection(item.origin, "image", str(image)))
                    yield item, None
            self._looked_at(sum(not isinstance(i, Rejection) or i.whole for i, _ in batch))

    def _reject(self, rejection: Rejection) -> None:
        self._rejected.add(rejection.source, rejection.field, rejection.reason)
        self._set_aside += rejection.whole

    def _looked_at(self, samples: int) -> None:
        """Report progress; ValueError where the share of what was set aside is too large."""
        self.looked_at += samples
        if self._progress is not None:
            self._progress(self.looked_at, self._total)
        share, limit = self._set_aside / max(self.looked_at, 1), self._config.max_rejected
        if self.looked_at >= self._config.max_rejected_after and share > limit:
            raise ValueError(
                f"{self._set_aside} of the first {self.looked_at} samples were set aside, more than"
                f" the share of {limit:g} allowed by max_rejected; {self._rejected.path} says why,"
                f" last: {self._rejected.last}"
            )


@dataclass
class _Rows:
    """The rows of one shard's score table, as they come."""

    rewards: tuple[str, ...]
    keys: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)

    def add(self, item: Candidate, scores: np.ndarray) -> None:
        self.keys += [item.key] * len(item.captions)
        self.captions += item.captions
        self.scores.append(scores)

    def columns(self) -> dict[str, np.ndarray]:
        values = np.concatenate([np.empty((0, len(self.rewards)), np.float32), *self.scores])
        return {name: values[:, i] for i, name in enumerate(self.rewards)}


def _image_of(item: Candidate | Rejection) -> bytes | None:
    return item.image if isinstance(item, Candidate) else None


def _score(
    rewards: list[Reward], images: list[Tensor], captions: list[dict[str, str]]
) -> list[np.ndarray]:
    """For each image and its captions: float32 (captions, rewards); what is not finite is NaN."""
    if not images:
        return []
    counts = [len(texts) for texts in captions]
    rows = np.repeat(np.arange(len(images)), counts)  # the image of each row
    texts = [text for kinds in captions for text in kinds.values()]
    firsts = [next(iter(kinds.values())) for kinds in captions]
    pictures = Pictures(images)
    pairs = pictures.take(rows)
    values = np.empty((len(rows), len(rewards)), np.float32)
    for column, reward in enumerate(rewards):
        if reward.reads_caption:
            scores, expected = reward.score(pairs, texts), len(rows)
        else:
            scores, expected = reward.score(pictures, firsts), len(images)
        if tuple(scores.shape) != (expected,):
            raise ValueError(
                f"the reward {reward.name!r} gave {tuple(scores.shape)} for {expected} pairs"
            )
        found = scores.detach().float().cpu().numpy()
        values[:, column] = found if reward.reads_caption else found[rows]
    values[~np.isfinite(values)] = np.nan
    return np.split(values, np.cumsum(counts)[:-1])
