"""`miro caption`: additional captions for a dataset, from a model or a table.

    SOURCE (kind "images")                     DEST (kind "images")
    shards/00000.tar  {key}.jpg                shards/00000.tar  {key}.jpg   unchanged
                      {key}.json "captions"                      {key}.json  with more "captions"
    scores/00000.parquet                       none: scores depend on captions

Each shard of SOURCE becomes the shard of the same name, in the same order; the ranks of a launch
divide them. A resumed run writes the same bytes as an uninterrupted one. DEST is a new dataset:
`miro annotate DEST DEST --rewards ...` scores all its captions.

The MIRO paper (arXiv 2510.25897) captions images with google/gemma-3-12b-it: a long caption of
about 200 tokens, whose prompt includes the web's alt text, and a short one. The paper does not
publish its prompts; these are ours.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from miro.data.shards import Manifest, ShardIndex, ShardInfo, check_shard, shard_path, write_shard
from miro.images.decoder import DecodeError, Decoder, prefetch_decoded
from miro.images.open_decoder import DecoderName, build_decoder
from miro.prepare.caption_table import CaptionTable
from miro.prepare.manifests import check_source_shards, read_images_manifest
from miro.prepare.rejected_log import RejectedLog
from miro.prepare.shard_samples import image_of, shard_samples
from miro.prepare.work_log import (
    CompletedShard,
    commit_completed,
    read_completed_from,
    write_completed,
)
from miro.rewards.vlm import VisionLanguage, load_vision_language
from miro.sources.sample import RawSample, RejectedSample, read_caption
from miro.utils.distributed import dist_env
from miro.utils.locks import blocking_lock, exclusive_lock
from miro.utils.progress import ProgressCallback
from miro.utils.serialize import differences

log = logging.getLogger(__name__)

ORIGINAL = "original"
PROMPTS = {
    "long": "Describe this picture in one paragraph of about 150 words: what there is, how it looks"
    " and where it is. {alt}Write the description and nothing else.",
    "short": "Describe this picture in one short sentence. Write the sentence and nothing else.",
}
ALT = 'The web says of it "{text}", which may be wrong or about something else. '


@dataclass(frozen=True)
class CaptionConfig:
    """Options of `caption`."""

    model: str = "google/gemma-3-12b-it"  # folder or hub id of a vision-language model
    table: Path | None = None  # .parquet, .csv, .tsv or .jsonl of captions, instead of a model
    types: tuple[Literal["long", "short"], ...] = ("long", "short")  # captions of the model
    long_tokens: int = 256  # maximum of a long caption
    short_tokens: int = 64
    temperature: float = 0.0  # 0: greedy; else sampled, each caption from its own RNG stream
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    batch_size: int = 16  # images per generation
    workers: int = 0  # decoder threads; 0: one per core, at most 16
    decoder: DecoderName = "auto"  # auto: DALI if it is installed, else Pillow
    device: str = "cpu"
    allow_code: bool = False  # run Python code of the model folder (trust_remote_code)

    def __post_init__(self) -> None:
        for name in ("long_tokens", "short_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.temperature < 0 or self.workers < 0:
            raise ValueError(
                f"temperature and workers must be 0 or more, got {self.temperature}, {self.workers}"
            )
        if not self.types or len(set(self.types)) < len(self.types):
            raise ValueError(f"types must be 'long', 'short' or both, got {self.types}")


@dataclass(frozen=True)
class CaptionSummary:
    """Contents of DEST, and the work of this call."""

    samples: int
    rejected: int  # lines of rejected.jsonl
    captioned: int  # samples read by this call
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Samples captioned per second, including reading, writing and loading the model."""
        return self.captioned / max(self.seconds, 1e-9)


class Captioner(Protocol):
    """A source of captions.

    Attributes:
        types: Caption types that every sample should get.
        reads_images: Whether `captions` needs decoded images.
        missing_reason: The reason in rejected.jsonl if a caption is missing.
    """

    types: tuple[str, ...]
    reads_images: bool
    missing_reason: str

    def captions(
        self, samples: Sequence[RawSample], images: Sequence[Tensor | None]
    ) -> list[dict[str, Any]]:
        """Return {caption type: unchecked caption} of each sample."""
        ...


def caption(
    source: Path,
    dest: Path,
    *,
    config: CaptionConfig | None = None,
    progress: ProgressCallback | None = None,
) -> CaptionSummary:
    """Write or complete a dataset with the images and captions of `source` and new captions.

    An empty or missing caption is listed in rejected.jsonl; its sample has its other captions.
    After an error or a kill, the same call resumes after the last completed shard.

    Args:
        source: A dataset folder of images.
        dest: The dataset folder to write.
        config: Model or table, and decoding.
        progress: Called after every batch.

    Raises:
        ValueError: Before any work: `source` is encoded or has captions of these types, the model
            or the table is invalid, or `dest` was made with other settings.
        OSError: The disk is full.
    """
    started = time.perf_counter()
    source, dest, config = Path(source), Path(dest), config or CaptionConfig()
    images = read_images_manifest(source, "caption")
    if source.resolve() == dest.resolve():
        raise ValueError(f"{dest}: DEST must not be SOURCE, whose shards never change")
    table = CaptionTable(config.table) if config.table is not None else None
    if table is not None:
        table.check(ShardIndex(source, images).keys)
    types = config.types if table is None else table.types
    for name in types:
        if name in images.captions:
            raise ValueError(f"{source}: has captions of type {name!r} already; choose others")
    for shard in images.shards:
        check_shard(source, shard)
    settings = _settings(config, types)
    env = dist_env(os.environ)
    with exclusive_lock(dest, env.rank), RejectedLog(dest / "rejected.jsonl") as rejected:
        manifest = _open_manifest(source, dest, images, types, settings)
        listed = {shard.name for shard in manifest.shards}
        todo = [
            shard
            for shard in env.shard(images.shards)
            if shard.name not in listed and read_completed_from(dest, shard) is None
        ]
        if todo:
            config = replace(config, device=str(env.device(config.device)))
            captioner = table or ModelCaptioner(config)
            decoder = build_decoder(
                config.decoder, config.device, config.batch_size, config.workers
            )
            with closing(decoder):
                job = CaptionJob(source, dest, captioner, config, decoder, rejected, progress)
                job.run(images.shards, todo)
        manifest = commit_completed(dest, images.shards, _extend)
        return CaptionSummary(
            samples=manifest.samples,
            rejected=len(rejected),
            captioned=sum(shard.samples for shard in todo),
            seconds=time.perf_counter() - started,
        )


def _settings(config: CaptionConfig, types: Sequence[str]) -> dict[str, Any]:
    """The manifest's record of everything that determines the captions."""
    if config.table is not None:
        digest = hashlib.sha256(config.table.read_bytes()).hexdigest()
        return {"table": config.table.name, "sha256": digest, "types": list(types)}
    names = ("model", "long_tokens", "short_tokens", "temperature", "seed", "precision")
    # The batch size is recorded because floating-point results depend on it.
    return {name: getattr(config, name) for name in (*names, "batch_size")} | {"types": list(types)}


def _open_manifest(
    source: Path, dest: Path, images: Manifest, types: Sequence[str], settings: dict[str, Any]
) -> Manifest:
    """Read the manifest of DEST or write an empty one; ValueError if it has other settings."""
    with blocking_lock(dest):
        if not (dest / "manifest.json").is_file():
            state = {"settings": settings, "shards": {}, "of": images.source}
            captions = (*images.captions, *types)
            Manifest("images", captions, (), source={"caption": state}).write(dest)
        manifest = Manifest.read(dest)
    state = manifest.source.get("caption")
    if state is None:
        raise ValueError(f"{dest}: was not made by `miro caption`; choose a new folder")
    if differ := differences(settings, state["settings"]):
        raise ValueError(
            f"{dest}: was captioned with other settings ({'; '.join(differ)}); use the same "
            "settings, or choose a new folder"
        )
    check_source_shards(dest, manifest, source, images, state["shards"])
    return manifest


def _extend(manifest: Manifest, source: ShardInfo, completed: CompletedShard) -> Manifest:
    assert completed.shard is not None
    state = manifest.source["caption"]
    checksums = {**state["shards"], source.name: source.sha256}
    return replace(
        manifest,
        shards=(*manifest.shards, completed.shard),
        source={"caption": {**state, "shards": checksums}},
    )


class ModelCaptioner:
    """A `Captioner` that generates captions with a vision-language model."""

    reads_images = True
    missing_reason = "the model wrote nothing, or the image could not be decoded"

    def __init__(self, config: CaptionConfig) -> None:
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.types: tuple[str, ...] = config.types
        self._config = config
        self._max_tokens = {"long": config.long_tokens, "short": config.short_tokens}
        self._model: VisionLanguage = load_vision_language(
            config.model, config.device, dtype=dtype, allow_code=config.allow_code
        )

    def captions(
        self, samples: Sequence[RawSample], images: Sequence[Tensor | None]
    ) -> list[dict[str, Any]]:
        """Generate a caption of each type for each sample that has an image."""
        captions: list[dict[str, Any]] = [{} for _ in samples]
        rows = [row for row, image in enumerate(images) if image is not None]
        decoded = [image for image in images if image is not None]
        for name in self.types if rows else ():
            answers = self._model.answer(
                decoded,
                [self._prompt(name, samples[row]) for row in rows],
                self._max_tokens[name],
                self._config.temperature,
                [(self._config.seed, name, samples[row].key) for row in rows],
            )
            for row, text in zip(rows, answers, strict=True):
                captions[row][name] = " ".join(text.split())  # one line
        return captions

    def _prompt(self, name: str, sample: RawSample) -> str:
        alt_text = self._model.plain(sample.captions.get(ORIGINAL, "")).strip()
        return PROMPTS[name].format(alt=ALT.format(text=alt_text) if alt_text else "")


class CaptionJob:
    """One call of `caption` in one process, with the captioner loaded."""

    def __init__(
        self,
        source: Path,
        dest: Path,
        captioner: Captioner,
        config: CaptionConfig,
        decoder: Decoder,
        rejected: RejectedLog,
        progress: ProgressCallback | None,
    ) -> None:
        self._source, self._dest, self._captioner = source, dest, captioner
        self._config, self._decoder = config, decoder
        self._rejected, self._progress = rejected, progress
        self._processed = self._total = 0

    def run(self, shards: Sequence[ShardInfo], todo: Sequence[ShardInfo]) -> None:
        """Caption the shards `todo` of the source's `shards`."""
        self._total = sum(shard.samples for shard in todo)
        for shard in todo:
            written = write_shard(shard_path(self._dest, shard), self._captioned(shard))
            write_completed(self._dest, shard.name, CompletedShard(written, shard.sha256))
            manifest = commit_completed(self._dest, shards, _extend)
            log.info("%s: %d samples captioned", self._dest, manifest.samples)

    def _captioned(self, shard: ShardInfo) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yield the samples of a shard with their new captions, for `write_shard`."""

        def file_of(item: tuple[RawSample | RejectedSample, Any]) -> bytes | None:
            return image_of(item[0]) if self._captioner.reads_images else None

        stream = shard_samples(self._source, shard)
        for batch in prefetch_decoded(stream, file_of, self._config.batch_size, self._decoder):
            samples: list[tuple[RawSample, dict[str, bytes]]] = []
            images: list[Tensor | None] = []
            for (sample, members), image in batch:
                if isinstance(sample, RejectedSample):
                    self._rejected.add(sample)
                    continue
                if isinstance(image, DecodeError):
                    self._rejected.add(RejectedSample(sample.origin, "image", str(image)))
                samples.append((sample, members))
                images.append(image if isinstance(image, Tensor) else None)
            captions = self._captioner.captions([sample for sample, _ in samples], images)
            for (sample, members), new in zip(samples, captions, strict=True):
                yield from self._merged(sample, members, new)
            self._processed += sum(isinstance(s, RawSample) or s.whole for (s, _), _ in batch)
            if self._progress is not None:
                self._progress(self._processed, self._total)

    def _merged(
        self, sample: RawSample, members: dict[str, bytes], new: dict[str, Any]
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yield the sample with old and new captions, unless it has none at all."""
        captions = dict(sample.captions)
        for name in self._captioner.types:
            checked = read_caption(new.get(name) or "")
            if checked.text:
                captions[name] = checked.text
            else:
                reason = checked.problem if new.get(name) else self._captioner.missing_reason
                field = f"captions.{name}"
                self._rejected.add(RejectedSample(sample.origin, field, reason, whole=False))
        if captions:
            content = json.dumps({"captions": captions, **sample.extra}).encode()
            yield sample.key, {**members, "json": content}
