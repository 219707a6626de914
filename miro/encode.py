"""`miro encode`: pictures and captions become latents and token states, once, before training.

    SOURCE (kind "images")                 DEST (kind "encoded")
    shards/00000.tar  {key}.png            shards/00000.tar  {key}.latent.npy       float16
                      {key}.json                             {key}.text.{kind}.npy  float16
                                                             {key}.json             as it was
    scores/00000.parquet                   scores/00000.parquet                     copied

A shard of SOURCE becomes the shard of the same name. A run that was stopped goes on where it was,
and its files equal an undisturbed run's byte for byte: which captions are encoded together depends
on the source alone. Running it on a finished folder only copies the scores anew, so a reward that
was added to SOURCE reaches DEST without encoding anything.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from miro.config import differences
from miro.data.decode import Decoder, DecoderName, build_decoder, decode_ahead, resize_crop
from miro.data.encoded import LATENT, RECORD, copy_scores, text_extension
from miro.data.npy import npy_bytes, npy_view
from miro.data.rejected import RejectedLog
from miro.data.shards import (
    Manifest,
    ShardIndex,
    ShardInfo,
    iterate_shard,
    shard_path,
    write_shard,
)
from miro.data.sources import Candidate, Rejection, read_sample
from miro.latents import LatentCodec, build_codec
from miro.locks import alone_in
from miro.text import TextEncoder, build_text_encoder

log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]  # samples looked at by this call, of how many

# Samples read, and whose captions are encoded, together: many of each length, bounded memory.
WINDOW = 1024
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EncodeConfig:
    """How pictures and captions are encoded, and with how much of the machine."""

    latents: str = "pixels"  # or a folder or hub id of a diffusers AutoencoderKL
    text: str = "minilm"  # or a folder or hub id of a transformers encoder, e.g. google/flan-t5-xl
    size: int | None = None  # pictures are cropped and resized to size x size; None: as they are
    max_tokens: int | None = None  # longer captions are cut; None: 256 or what the encoder takes
    precision: Literal["fp32", "bf16"] = "fp32"  # of both encoders' weights and arithmetic
    batch_size: int = 64  # pictures decoded, and encoded by the autoencoder, at a time
    cache_bytes: int = 1 << 28  # memory for token states of captions that may come again
    max_rejected: float = 0.01  # stop above this share of SOURCE that cannot be decoded
    workers: int = 0  # threads that decode; 0: one per core, at most 16
    decoder: DecoderName = "auto"  # DALI where it is installed, Pillow elsewhere
    device: str = "cpu"  # where the encoders compute, and DALI decodes

    def __post_init__(self) -> None:
        for name in ("size", "max_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("cache_bytes", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"max_rejected must be between 0 and 1, got {self.max_rejected}")
        if self.precision not in _DTYPES:
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")


@dataclass(frozen=True)
class EncodeSummary:
    """What DEST holds now, in however many calls it was made; the last two in this call alone."""

    samples: int
    rejected: int  # lines of rejected.jsonl: what could not be decoded, and why
    cut: int  # captions longer than max_tokens, whose ends were not encoded
    encoded: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Samples encoded in a second, reading, writing and loading the encoders included."""
        return self.encoded / max(self.seconds, 1e-9)


def encode(
    source: Path,
    dest: Path,
    *,
    config: EncodeConfig | None = None,
    progress: Progress | None = None,
) -> EncodeSummary:
    """Encode the images folder `source` into `dest`, or go on with what is there.

    ValueError before any work where `source` is no images folder, an encoder's name is not known,
    or `dest` was made otherwise (the message names the difference); later where pictures differ in
    size and no size was given, or too many cannot be decoded. OSError where the disk is full. All
    that was complete is kept, and the same call goes on.
    """
    started = time.perf_counter()
    source, dest, config = Path(source), Path(dest), config or EncodeConfig()
    pictures = Manifest.read(source)
    if pictures.kind != "images":
        raise ValueError(f"{source}: is encoded already; encode the images it was made from")
    if not pictures.samples:
        raise ValueError(f"{source}: holds no samples; let `miro annotate` complete a shard first")
    found = (dest / "manifest.json").is_file()
    before = _made_alike(source, dest, pictures, config) if found else None
    with alone_in(dest), RejectedLog(dest / "rejected.jsonl") as rejected:
        for shard in before.shards if before else ():
            copy_scores(source, dest, shard)
        after = before
        if after is None or len(after.shards) < len(pictures.shards):
            # Only here: a finished folder needs no encoders, and they take seconds to load.
            decoder = build_decoder(
                config.decoder, config.device, config.batch_size, config.workers
            )
            with closing(decoder):
                work = _Work(source, dest, pictures, config, decoder, rejected, progress)
                after = work.run(before)
        if after.rewards != pictures.rewards:
            after = replace(after, rewards=pictures.rewards)
            after.write(dest)
        assert after.encoding is not None
    return EncodeSummary(
        samples=after.samples,
        rejected=len(rejected),
        cut=after.encoding["cut"],
        encoded=after.samples - (before.samples if before else 0),
        seconds=time.perf_counter() - started,
    )


def _made_alike(source: Path, dest: Path, pictures: Manifest, config: EncodeConfig) -> Manifest:
    """The manifest of an existing DEST; ValueError where it is not what this call would make."""
    manifest = Manifest.read(dest)
    if manifest.kind != "encoded" or manifest.encoding is None:
        raise ValueError(f"{dest}: holds images, not latents; choose a new folder")
    there = manifest.encoding
    asked = {
        "latents": config.latents,
        "text_encoder": config.text,
        "size": config.size,
        "precision": config.precision,
        "max_tokens": config.max_tokens or there.get("max_tokens"),
    }
    differ = differences(asked, {name: there.get(name) for name in asked})
    if differ:
        raise ValueError(
            f"{dest}: was encoded otherwise ({'; '.join(differ)}); ask for the same, or choose a "
            "new folder"
        )
    made_from = manifest.source.get("encoded_from", {})
    for position, shard in enumerate(manifest.shards):
        now = pictures.shards[position] if position < len(pictures.shards) else None
        if now is None or now.name != shard.name or now.sha256 != made_from.get(shard.name):
            raise ValueError(
                f"{dest}: its shard {shard.name} was encoded from other pictures than {source} "
                "holds now; choose a new folder"
            )
    return manifest


class _TextCache:
    """The encoded members (.npy files) of captions: first come, and closed when full.

    What it holds depends on the captions before, in their order, and not on who asked: so a run
    that goes on can fill it again from the shards that are there, and then encodes in the same
    batches.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._members: dict[str, bytes] = {}
        self.full = False

    def get(self, caption: str) -> bytes | None:
        return self._members.get(caption)

    def put(self, caption: str, member: bytes) -> None:
        if self.full or caption in self._members:
            return
        self._left -= len(member)
        if self._left < 0:
            self.full = True
        else:
            self._members[caption] = member


class _Work:
    """What one call of `encode` needs to make shards."""

    def __init__(
        self,
        source: Path,
        dest: Path,
        pictures: Manifest,
        config: EncodeConfig,
        decoder: Decoder,
        rejected: RejectedLog,
        progress: Progress | None,
    ):
        dtype = _DTYPES[config.precision]
        self._source, self._dest, self._pictures = source, dest, pictures
        self._config, self._decoder = config, decoder
        self._rejected, self._progress = rejected, progress
        self._codec: LatentCodec = build_codec(config.latents, config.device, dtype=dtype)
        self._encoder: TextEncoder = build_text_encoder(
            config.text, config.device, max_tokens=config.max_tokens, dtype=dtype
        )
        self._cache = _TextCache(config.cache_bytes)
        self._latent_shape: list[int] = []
        self._looked_at = self._total = self._cut = 0

    def run(self, manifest: Manifest | None) -> Manifest:
        """Encode the shards that `manifest` lacks; the last manifest that was written."""
        if manifest is None:
            manifest = self._first_manifest()
            manifest.write(self._dest)
        else:
            self._remember(manifest)
        assert manifest.encoding is not None
        settings, made_from = manifest.encoding, dict(manifest.source["encoded_from"])
        self._latent_shape, self._cut = settings["latent_shape"], settings["cut"]
        todo = self._pictures.shards[len(manifest.shards) :]
        self._total = sum(shard.samples for shard in todo)
        for shard in todo:
            made = write_shard(shard_path(self._dest, shard), self._encoded(shard))
            copy_scores(self._source, self._dest, made)
            made_from[shard.name] = shard.sha256
            manifest = replace(
                self._pictures,
                kind="encoded",
                shards=(*manifest.shards, made),
                encoding={**settings, "cut": self._cut},
                source={**self._pictures.source, "encoded_from": dict(made_from)},
            )
            manifest.write(self._dest)
            log.info("%s: %d samples encoded", self._dest, manifest.samples)
        return manifest

    def _first_manifest(self) -> Manifest:
        """The manifest of a DEST without shards: the first good picture stands for all."""
        samples = (item for shard in self._pictures.shards for item, _ in self._read(shard))
        images = (image for _, image in self._images(samples))
        image = next((image for image in images if isinstance(image, Tensor)), None)
        if image is None:
            raise ValueError(f"{self._source}: none of its pictures can be decoded")
        height, width = image.shape[1:]
        encoding = {
            "latents": self._config.latents,
            "latent_shape": list(self._codec.latent_shape(height, width)),
            "has_std": self._codec.encode(image[None])[1] is not None,
            "text_encoder": self._config.text,
            "text_dim": self._encoder.dim,
            "max_tokens": self._encoder.max_tokens,
            "size": self._config.size,
            "precision": self._config.precision,
            "cut": 0,
        }
        source = {**self._pictures.source, "encoded_from": {}}
        return replace(self._pictures, kind="encoded", shards=(), encoding=encoding, source=source)

    def _remember(self, manifest: Manifest) -> None:
        """Fill the cache as the run that made these shards had filled it."""
        index = ShardIndex(self._dest, manifest)
        for i in range(len(index)):
            # Read as it was then, but for the picture, which only has to be named.
            members = {"png": b"", RECORD: bytes(index.member(i, RECORD))}
            for item in read_sample("", index.keys[i], members):
                captions = item.captions if isinstance(item, Candidate) else {}
                for kind, caption in captions.items():
                    self._cache.put(caption, bytes(index.member(i, text_extension(kind))))
            if self._cache.full:
                return

    def _read(self, shard: ShardInfo) -> Iterator[tuple[Candidate | Rejection, bytes]]:
        """The samples of a shard of SOURCE, each with its .json as it is."""
        for key, members in iterate_shard(shard_path(self._source, shard)):
            for item in read_sample(f"{shard.name}:{key}", key, members):
                yield item, members.get(RECORD, b"")

    def _images(
        self, items: Iterable[Candidate | Rejection]
    ) -> Iterator[tuple[Candidate | Rejection, Tensor | Rejection]]:
        """Each with its picture as the codec gets it, uint8 (3, H, W), or why there is none."""

        def image_of(item: Candidate | Rejection) -> bytes | None:
            return item.image if isinstance(item, Candidate) else None

        size = self._config.size
        for batch in decode_ahead(items, image_of, self._config.batch_size, self._decoder):
            for item, image in batch:
                if isinstance(item, Rejection):
                    yield item, item
                elif isinstance(image, Tensor):
                    yield item, image if size is None else resize_crop(image, size)
                else:
                    yield item, Rejection(item.origin, "image", str(image))

    def _encoded(self, shard: ShardInfo) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The samples of a shard as `write_shard` takes them."""
        samples = self._read(shard)
        while window := list(itertools.islice(samples, WINDOW)):
            images = [image for _, image in self._images(item for item, _ in window)]
            yield from self._encode_window(window, images)

    def _encode_window(
        self, window: list[tuple[Candidate | Rejection, bytes]], images: list[Tensor | Rejection]
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        good: list[tuple[Candidate, bytes, Tensor]] = []
        for (item, record), image in zip(window, images, strict=True):
            if isinstance(image, Rejection):
                self._rejected.add(image.source, image.field, image.reason)
            else:
                assert isinstance(item, Candidate)
                self._check_shape(item, image)
                good.append((item, record, image))
        self._check_share()
        latents = self._latents([image for _, _, image in good])
        texts = self._texts([text for item, _, _ in good for text in item.captions.values()])
        for (item, record, _), latent in zip(good, latents, strict=True):
            members = {text_extension(kind): texts[text] for kind, text in item.captions.items()}
            yield item.key, {LATENT: latent, **members, RECORD: record}
        self._looked_at += sum(isinstance(item, Candidate) or item.whole for item, _ in window)
        if self._progress is not None:
            self._progress(self._looked_at, self._total)

    def _check_shape(self, item: Candidate, image: Tensor) -> None:
        height, width = image.shape[1:]
        shape = self._codec.latent_shape(height, width)
        if list(shape) != self._latent_shape:
            raise ValueError(
                f"{item.origin}: the picture is {width} x {height} pixels, its latents {shape}, "
                f"those of the first {tuple(self._latent_shape)}; give a size, to which all are "
                "cropped and resized"
            )

    def _check_share(self) -> None:
        share = len(self._rejected) / self._pictures.samples
        if share > self._config.max_rejected:
            raise ValueError(
                f"{len(self._rejected)} of {self._pictures.samples} samples were set aside, more "
                f"than the share of {self._config.max_rejected:g} allowed by max_rejected; "
                f"{self._rejected.path} says why, last: {self._rejected.last}"
            )

    def _latents(self, images: Sequence[Tensor]) -> Iterator[bytes]:
        """Each picture's .npy member: float16 (C, H, W), or (2, C, H, W) mean and deviation."""
        for start in range(0, len(images), self._config.batch_size):
            batch = torch.stack(list(images[start : start + self._config.batch_size]))
            mean, std = self._codec.encode(batch)
            both = mean if std is None else torch.stack([mean, std], 1)
            for latent in both:
                yield npy_bytes(_half(latent, f"latents {self._config.latents!r}"))

    def _texts(self, captions: Sequence[str]) -> dict[str, bytes]:
        """The .npy member of each distinct caption: float16 (length, dim)."""
        members = {caption: self._cache.get(caption) for caption in captions}
        new = [caption for caption, member in members.items() if member is None]
        found = {caption: member for caption, member in members.items() if member is not None}
        for caption, states in zip(new, self._encoder.encode(new), strict=True):
            found[caption] = npy_bytes(_half(states, f"text encoder {self._config.text!r}"))
            self._cache.put(caption, found[caption])
        # Only a caption that fills all tokens can have been cut.
        longest = self._encoder.max_tokens
        filled = [text for text in captions if len(npy_view(found[text])) == longest]
        self._cut += sum(self._encoder.cut(filled))
        return found


def _half(values: Tensor, who: str) -> np.ndarray:
    """As float16; ValueError where that is not finite."""
    half = values.half().cpu().numpy()
    if not np.isfinite(half).all():
        raise ValueError(
            f"{who} gave values that are not finite, or beyond what float16 holds (65,504)"
        )
    return half
