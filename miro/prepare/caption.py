"""`miro caption`: a dataset's images get further captions, by a model or from a table.

    SOURCE (kind "images")                     DEST (kind "images")
    shards/00000.tar  {key}.jpg                shards/00000.tar  {key}.jpg   as it was
                      {key}.json "captions"                      {key}.json  "captions", and more
    scores/00000.parquet                       none: each caption gets scores of its own

A shard of SOURCE becomes the shard of the same name, whole or not at all, in the same order, and
the ranks of a launch divide them. So a run that was stopped goes on where it was, and its files
equal an undisturbed run's byte for byte.
DEST is a dataset of its own: `miro annotate DEST DEST --rewards ...` scores old captions and new.

The paper (arXiv 2510.25897) captions its web images with google/gemma-3-12b-it: a long one of
about 200 tokens, for which the model reads the web's text too, and a short one. The wording here is
ours; the paper's is not published.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from miro.data.shards import Manifest, ShardIndex, ShardInfo, check_shard, shard_path, write_shard
from miro.images.decoder import DecodeError, Decoder, decode_ahead
from miro.images.open_decoder import DecoderName, build_decoder
from miro.prepare.caption_table import CaptionTable
from miro.prepare.completed_shards import (
    CompletedShard,
    commit_completed,
    read_completed,
    write_completed,
)
from miro.prepare.rejected_log import RejectedLog
from miro.rewards.vlm import VisionLanguage, load_vision_language
from miro.sources.sample import RawSample, RejectedSample, read_caption, read_sample
from miro.sources.tar import iterate_shard
from miro.utils.distributed import dist_env
from miro.utils.locks import blocking_lock, exclusive_lock
from miro.utils.serialize import differences

log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]  # samples looked at by this call, of how many

ORIGINAL = "original"
PROMPTS = {
    "long": "Describe this picture in one paragraph of about 150 words: what there is, how it looks"
    " and where it is. {alt}Write the description and nothing else.",
    "short": "Describe this picture in one short sentence. Write the sentence and nothing else.",
}
ALT = 'The web says of it "{text}", which may be wrong or about something else. '


@dataclass(frozen=True)
class CaptionConfig:
    """Where captions come from, and how they are written."""

    model: str = "google/gemma-3-12b-it"  # folder or hub id of a vision-language model
    table: Path | None = None  # captions.parquet, .csv or .jsonl with key, kind, caption: no model
    kinds: tuple[Literal["long", "short"], ...] = ("long", "short")  # what the model writes
    long_tokens: int = 256  # the most of a long caption
    short_tokens: int = 64
    temperature: float = 0.0  # 0: the likeliest words; else drawn, each caption from its own stream
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    batch_size: int = 16  # images of one generation
    workers: int = 0  # threads that decode; 0: one per core, at most 16
    decoder: DecoderName = "auto"  # DALI where it is installed, Pillow elsewhere
    device: str = "cpu"
    allow_code: bool = False  # run Python code that comes with the model's weights

    def __post_init__(self) -> None:
        for name in ("long_tokens", "short_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.temperature < 0 or self.workers < 0:
            raise ValueError("temperature and workers must be 0 or more")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds must be 'long', 'short' or both, got {self.kinds}")


@dataclass(frozen=True)
class CaptionSummary:
    """What DEST holds now, and what this call did for it."""

    samples: int
    rejected: int  # lines of rejected.jsonl: captions that could not be had, and why
    captioned: int  # samples this call looked at
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Samples captioned in a second, reading, writing and loading the model included."""
        return self.captioned / max(self.seconds, 1e-9)


class _Writer(Protocol):
    """Who captions. `kinds`: those every sample should get."""

    kinds: tuple[str, ...]

    def captions(
        self, items: Sequence[RawSample], images: Sequence[Tensor | None]
    ) -> list[dict[str, Any]]:
        """For each sample {kind: caption as found}, without those there are none of."""
        ...

    reads_images: bool
    silence: str
    """Why there is none, for rejected.jsonl."""


def caption(
    source: Path,
    dest: Path,
    *,
    config: CaptionConfig | None = None,
    progress: Progress | None = None,
) -> CaptionSummary:
    """Make or complete `dest`: the images and captions of the dataset `source`, and new captions.

    A caption that is empty or missing is listed in `rejected.jsonl`; its sample keeps its other
    captions. ValueError before any work where `source` is no dataset of images or has captions of
    these kinds already, the model or the table cannot be used, the table names a sample that does
    not exist or one twice, or `dest` was made with other settings. OSError if the disk is
    full. Completed shards remain, and the same call resumes.
    """
    started = time.perf_counter()
    source, dest, config = Path(source), Path(dest), config or CaptionConfig()
    source_manifest = Manifest.read(source)
    if source_manifest.kind != "images":
        raise ValueError(f"{source}: is encoded already; caption the images it was made from")
    if source.resolve() == dest.resolve():
        raise ValueError(f"{dest}: DEST must not be SOURCE, whose shards never change")
    table = CaptionTable(config.table) if config.table is not None else None
    if table is not None:
        table.check(ShardIndex(source, source_manifest).keys)
    kinds = config.kinds if table is None else table.kinds
    for kind in kinds:
        if kind in source_manifest.captions:
            raise ValueError(f"{source}: has captions of kind {kind!r} already; ask for others")
    for shard in source_manifest.shards:
        check_shard(source, shard)
    settings = _settings(config, kinds)
    ranks = dist_env(os.environ)
    with exclusive_lock(dest, ranks.rank), RejectedLog(dest / "rejected.jsonl") as rejected:
        with blocking_lock(dest):
            if not (dest / "manifest.json").is_file():
                _first_manifest(source_manifest, kinds, settings).write(dest)
            manifest = _check_same_encoding(source, dest, source_manifest, settings)
        todo = [
            shard
            for position, shard in enumerate(source_manifest.shards)
            if position % ranks.world == ranks.rank
            and position >= len(manifest.shards)
            and read_completed(dest, shard) is None
        ]
        if todo:
            config = replace(config, device=str(ranks.device(config.device)))
            writer = table or _Model(config)
            decoder = build_decoder(
                config.decoder, config.device, config.batch_size, config.workers
            )
            with closing(decoder):
                work = _Work(source, dest, writer, config, decoder, rejected, progress)
                work.run(source_manifest.shards, todo)
        manifest = commit_completed(dest, source_manifest.shards, _extended)
        return CaptionSummary(
            samples=manifest.samples,
            rejected=len(rejected),
            captioned=sum(shard.samples for shard in todo),
            seconds=time.perf_counter() - started,
        )


def _settings(config: CaptionConfig, kinds: Sequence[str]) -> dict[str, Any]:
    """All that decides what the captions are, as the manifest records it."""
    if config.table is not None:
        digest = hashlib.sha256(config.table.read_bytes()).hexdigest()
        return {"table": config.table.name, "sha256": digest, "kinds": list(kinds)}
    names = ("model", "long_tokens", "short_tokens", "temperature", "seed", "precision")
    return {name: getattr(config, name) for name in names} | {
        "kinds": list(kinds),
        "batch_size": config.batch_size,  # what stands beside a prompt can move a likeliest word
    }


def _first_manifest(
    source_manifest: Manifest, kinds: Sequence[str], settings: dict[str, Any]
) -> Manifest:
    state = {"settings": settings, "shards": {}, "of": source_manifest.source}
    captions = (*source_manifest.captions, *kinds)
    return Manifest("images", captions, (), source={"caption": state})


def _check_same_encoding(
    source: Path, dest: Path, source_manifest: Manifest, settings: dict[str, Any]
) -> Manifest:
    """The manifest of an existing DEST; ValueError where it is not what this call would make."""
    manifest = Manifest.read(dest)
    there = manifest.source.get("caption")
    if there is None:
        raise ValueError(f"{dest}: was not made by `miro caption`; choose a new folder")
    differ = differences(settings, there["settings"])
    if differ:
        raise ValueError(
            f"{dest}: was captioned with other settings ({'; '.join(differ)}); use the same "
            "settings, or choose a new folder"
        )
    for position, shard in enumerate(manifest.shards):
        now = source_manifest.shards[position] if position < len(source_manifest.shards) else None
        if now is None or now.name != shard.name or now.sha256 != there["shards"].get(shard.name):
            raise ValueError(
                f"{dest}: its shard {shard.name} was made from other images than {source} holds"
                " now; choose a new folder"
            )
    return manifest


def _extended(manifest: Manifest, shard: ShardInfo, made: CompletedShard) -> Manifest:
    state = manifest.source["caption"]
    shards = {**state["shards"], shard.name: shard.sha256}
    return replace(
        manifest,
        shards=(*manifest.shards, made.shard),
        source={"caption": {**state, "shards": shards}},
    )


class _Model:
    """Captions by a vision-language model."""

    reads_images = True
    silence = "the model wrote nothing, or could not be shown the image"

    def __init__(self, config: CaptionConfig) -> None:
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.kinds: tuple[str, ...] = config.kinds
        self._config = config
        self._limits = {"long": config.long_tokens, "short": config.short_tokens}
        self._model: VisionLanguage = load_vision_language(
            config.model, config.device, dtype=dtype, allow_code=config.allow_code
        )

    def captions(
        self, items: Sequence[RawSample], images: Sequence[Tensor | None]
    ) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = [{} for _ in items]
        seen = [(row, image) for row, image in enumerate(images) if image is not None]
        if not seen:
            return made
        shown = [image for _, image in seen]
        for kind in self.kinds:
            written = self._model.answer(
                shown,
                [self._prompt(kind, items[row]) for row, _ in seen],
                self._limits[kind],
                self._config.temperature,
                [(self._config.seed, kind, items[row].key) for row, _ in seen],
            )
            for (row, _), text in zip(seen, written, strict=True):
                made[row][kind] = " ".join(text.split())  # a caption is one line
        return made

    def _prompt(self, kind: str, item: RawSample) -> str:
        said = self._model.plain(item.captions.get(ORIGINAL, "")).strip()
        return PROMPTS[kind].format(alt=ALT.format(text=said) if said else "")


class _Work:
    """What one call of `caption` needs to make shards."""

    def __init__(
        self,
        source: Path,
        dest: Path,
        writer: _Writer,
        config: CaptionConfig,
        decoder: Decoder,
        rejected: RejectedLog,
        progress: Progress | None,
    ) -> None:
        self._source, self._dest, self._writer = source, dest, writer
        self._config, self._decoder = config, decoder
        self._rejected, self._progress = rejected, progress
        self._looked_at = self._total = 0

    def run(self, shards: Sequence[ShardInfo], todo: Sequence[ShardInfo]) -> None:
        """Caption those of the source's shards that are to do."""
        self._total = sum(shard.samples for shard in todo)
        for shard in todo:
            made = write_shard(shard_path(self._dest, shard), self._captioned(shard))
            write_completed(self._dest, shard, CompletedShard(made))
            manifest = commit_completed(self._dest, shards, _extended)
            log.info("%s: %d samples captioned", self._dest, manifest.samples)

    def _captioned(self, shard: ShardInfo) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The samples of a shard as `write_shard` takes them."""
        unit = (
            (item, members)
            for key, members in iterate_shard(shard_path(self._source, shard))
            for item in read_sample(f"{shard.name}:{key}", key, members)
        )
        size = self._config.batch_size
        for batch in decode_ahead(unit, self._image_of, size, self._decoder):
            items: list[tuple[RawSample, dict[str, bytes]]] = []
            images: list[Tensor | None] = []
            for (item, members), image in batch:
                if isinstance(item, RejectedSample):
                    self._reject(item)
                    continue
                if isinstance(image, DecodeError):
                    self._reject(RejectedSample(item.origin, "image", str(image)))
                items.append((item, members))
                images.append(image if isinstance(image, Tensor) else None)
            new = self._writer.captions([item for item, _ in items], images)
            for (item, members), captions in zip(items, new, strict=True):
                yield from self._joined(item, members, captions)
            self._looked_at += sum(
                not isinstance(i, RejectedSample) or i.whole for (i, _), _ in batch
            )
            if self._progress is not None:
                self._progress(self._looked_at, self._total)

    def _image_of(self, sample: tuple[RawSample | RejectedSample, Any]) -> bytes | None:
        item, _ = sample
        if isinstance(item, RejectedSample) or not self._writer.reads_images:
            return None
        return item.image

    def _joined(
        self, item: RawSample, members: dict[str, bytes], new: dict[str, Any]
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The sample with its captions, old and new; nothing where it has none at all."""
        captions = dict(item.captions)
        for kind in self._writer.kinds:
            found = read_caption(new.get(kind) or "")
            if found.text:
                captions[kind] = found.text
            else:
                reason = found.problem if new.get(kind) else self._writer.silence
                self._reject(RejectedSample(item.origin, f"captions.{kind}", reason, whole=False))
        if captions:
            content = json.dumps({"captions": captions, **item.extra}).encode()
            yield item.key, {**members, "json": content}

    def _reject(self, rejection: RejectedSample) -> None:
        self._rejected.add(rejection.source, rejection.field, rejection.reason)
