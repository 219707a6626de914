"""`miro encode`: images and captions to latents and text states, once, before training.

    SOURCE (kind "images")                 DEST (kind "encoded")
    shards/00000.tar  {key}.png            shards/00000.tar  {key}.latent.npy       float16
                      {key}.json                             {key}.text.{type}.npy  float16
                                                             {key}.json             unchanged
    scores/00000.parquet                   scores/00000.parquet                     copied

Each shard of SOURCE becomes the shard of the same name; the ranks of a launch divide them. A
resumed run writes the same bytes as an uninterrupted one: the batches of captions depend on the
source and the number of processes alone. On a completed folder only the scores are copied, so
rewards that were added to SOURCE reach DEST without encoding.

With several sizes each has a folder, DEST/256 and DEST/512. Each image is decoded and each caption
encoded once; the text states are stored in every folder.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from miro.data.npy import npy_bytes, npy_view
from miro.data.reader import LATENT, RECORD, text_extension
from miro.data.shards import Manifest, ShardIndex, ShardInfo, ShardWriter, open_shard, shard_path
from miro.encoders.encoder import EncodingConfig, FrozenEncoders
from miro.images.decoder import DecodeError, Decoder, prefetch_decoded
from miro.images.open_decoder import DecoderName, build_decoder
from miro.images.pillow import decode
from miro.prepare.encoded_writer import EncodedFolder
from miro.prepare.manifests import read_images_manifest
from miro.prepare.shard_samples import image_of, shard_samples
from miro.sources.sample import RawSample, RejectedSample, read_sample
from miro.utils.distributed import dist_env
from miro.utils.progress import ProgressCallback

# Samples whose captions are encoded together, so that batches have captions of one length.
WINDOW = 1024


@dataclass(frozen=True)
class EncodeConfig(EncodingConfig):
    """Encoders, image sizes, batching and device of `encode`."""

    sizes: tuple[int, ...] = ()  # several sizes, each in its own folder: DEST/256, DEST/512
    batch_size: int = 64  # images per forward pass of the autoencoder, and per batch of the decoder
    cache_bytes: int = 1 << 28  # memory for the text states of repeated captions
    max_rejected: float = 0.01  # stop above this share of samples that cannot be decoded
    workers: int = 0  # decoder threads; 0: one per core, at most 16
    decoder: DecoderName = "auto"  # auto: DALI if it is installed, else Pillow
    device: str = "cpu"  # of the encoders, and of DALI

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        for name in ("cache_bytes", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"max_rejected must be between 0 and 1, got {self.max_rejected}")
        if self.sizes and self.size is not None:
            raise ValueError(f"give size={self.size} or sizes={self.sizes}, not both")
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"sizes {self.sizes} must be distinct")
        for encoding in self.encodings():
            encoding.bucket_sizes()

    def encodings(self) -> list[EncodingConfig]:
        """The encoding of each size."""
        shared: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(EncodingConfig)}
        return [EncodingConfig(**{**shared, "size": size}) for size in self.sizes or (self.size,)]


@dataclass(frozen=True)
class EncodeSummary:
    """Contents of DEST, and the work of this call."""

    samples: int
    rejected: int  # lines of rejected.jsonl
    cut: int  # captions truncated to max_tokens
    encoded: int  # samples encoded by this call
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Samples encoded per second, including reading, writing and loading the encoders."""
        return self.encoded / max(self.seconds, 1e-9)


def encode(
    source: Path,
    dest: Path,
    *,
    config: EncodeConfig | None = None,
    progress: ProgressCallback | None = None,
) -> EncodeSummary:
    """Encode an images folder.

    After an error or a kill, the same call resumes after the last completed shard.

    Args:
        source: An images folder.
        dest: The encoded folder, or the parent of one folder per size.
        config: Encoders, sizes, decoding and device.
        progress: Called after every window of samples.

    Raises:
        ValueError: Before any work: `source` is not an images folder, an encoder is unknown, or
            `dest` has another encoding or source. Later: images differ in size and no size is
            configured, or too many cannot be decoded.
        OSError: The disk is full.
    """
    started = time.perf_counter()
    source, dest, config = Path(source), Path(dest), config or EncodeConfig()
    images = read_images_manifest(source, "encode")
    if not images.samples:
        raise ValueError(f"{source}: has no samples; let `miro annotate` complete a shard first")
    env = dist_env(os.environ)
    config = replace(config, device=str(env.device(config.device)))
    with ExitStack() as stack:
        paths = [dest / str(size) for size in config.sizes] or [dest]
        folders = [
            EncodedFolder(source, path, images, encoding, env)
            for path, encoding in zip(paths, config.encodings(), strict=True)
        ]
        for folder in folders:
            folder.open(stack)
        before = [folder.samples for folder in folders]
        positions = env.shard(range(len(images.shards)))
        # A new folder needs a manifest, even if this rank has no shard.
        new = any(folder.manifest is None for folder in folders)
        if new or any(f.completed(position) is None for f in folders for position in positions):
            # Loading the encoders takes seconds, so a completed folder skips it.
            decoder = build_decoder(
                config.decoder, config.device, config.batch_size, config.workers
            )
            stack.enter_context(closing(decoder))
            EncodeJob(source, images, config, decoder, folders, progress).run(positions)
        for folder in folders:
            folder.sync_reward_columns()
        return EncodeSummary(
            samples=folders[0].samples,
            rejected=len(folders[0].rejected),
            cut=folders[0].record["cut"],
            encoded=max(f.samples - count for f, count in zip(folders, before, strict=True)),
            seconds=time.perf_counter() - started,
        )


class EncodeJob:
    """One call of `encode` in one process, with the encoders loaded."""

    def __init__(
        self,
        source: Path,
        images: Manifest,
        config: EncodeConfig,
        decoder: Decoder,
        folders: list[EncodedFolder],
        progress: ProgressCallback | None,
    ) -> None:
        self._source, self._images, self._folders = source, images, folders
        self._config, self._decoder, self._progress = config, decoder, progress
        self._encoders = FrozenEncoders(
            config, config.device, batch_size=config.batch_size, cache_bytes=config.cache_bytes
        )
        self._processed = self._total = 0

    def run(self, positions: Sequence[int]) -> None:
        """Encode the source's shards at `positions` for the folders that lack them."""
        new = [folder for folder in self._folders if folder.manifest is None]
        if new:
            image = self._first_image()
            for folder in new:
                cropped = folder.encoding.center_crop(image)
                folder.create(self._encoders.record(folder.encoding, cropped))
        todo = {
            position: [folder for folder in self._folders if folder.completed(position) is None]
            for position in positions
        }
        shards = self._images.shards
        self._total = sum(shards[position].samples for position in todo if todo[position])
        for position, folders in todo.items():
            if not folders:
                self._refill_cache(position)
                continue
            with ExitStack() as stack:
                paths = [shard_path(folder.dest, shards[position]) for folder in folders]
                tars = [stack.enter_context(open_shard(path)) for path in paths]
                self._encode_shard(shards[position], folders, tars)
            for folder, tar in zip(folders, tars, strict=True):
                folder.complete(shards[position], tar.info)

    def _first_image(self) -> Tensor:
        """The first valid image, whose latents have the shape that the manifest records."""
        for shard in self._images.shards:
            for sample, _ in shard_samples(self._source, shard):
                try:
                    if isinstance(sample, RawSample):
                        return decode(sample.image)
                except DecodeError:
                    continue  # it is rejected when its shard is encoded
        raise ValueError(f"{self._source}: none of its images can be decoded")

    def _refill_cache(self, position: int) -> None:
        """Fill the text cache from a completed shard, as the run that encoded it did."""
        folder = self._folders[0]
        encoded = folder.completed(position)
        if encoded is None or self._encoders.cache.full:
            return
        index = ShardIndex(folder.dest, Manifest("encoded", (), (encoded,)))
        for i in range(len(index)):
            # An encoded shard has no images; an empty one makes its captions a valid sample.
            members = {"png": b"", RECORD: bytes(index.member(i, RECORD))}
            for sample in read_sample("", index.keys[i], members):
                captions = sample.captions if isinstance(sample, RawSample) else {}
                for name, caption in captions.items():
                    states = npy_view(index.member(i, text_extension(name)))
                    self._encoders.cache.put(caption, states)

    def _encode_shard(
        self, shard: ShardInfo, folders: list[EncodedFolder], tars: list[ShardWriter]
    ) -> None:
        """Encode the samples of a shard into a tar per folder."""
        samples = shard_samples(self._source, shard)
        while window := list(itertools.islice(samples, WINDOW)):
            cropped = list(self._cropped((sample for sample, _ in window), folders))
            self._encode_window(window, cropped, folders, tars)

    def _cropped(
        self, samples: Iterable[RawSample | RejectedSample], folders: list[EncodedFolder]
    ) -> Iterator[list[Tensor] | RejectedSample]:
        """Yield each sample's image, cropped and resized for each folder, or its rejection."""
        size = self._config.batch_size
        for batch in prefetch_decoded(samples, image_of, size, self._decoder):
            images = [image for _, image in batch if isinstance(image, Tensor)]
            by_folder = [folder.encoding.center_crop_all(images) for folder in folders]
            cropped = zip(*by_folder, strict=True)
            for sample, image in batch:
                if isinstance(sample, RejectedSample):
                    yield sample
                elif isinstance(image, Tensor):
                    yield list(next(cropped))
                else:
                    yield RejectedSample(sample.origin, "image", str(image))

    def _encode_window(
        self,
        window: list[tuple[RawSample | RejectedSample, dict[str, bytes]]],
        cropped: list[list[Tensor] | RejectedSample],
        folders: list[EncodedFolder],
        tars: list[ShardWriter],
    ) -> None:
        valid: list[tuple[RawSample, bytes, list[Tensor]]] = []
        for (sample, members), images in zip(window, cropped, strict=True):
            if isinstance(images, RejectedSample):
                for folder in folders:
                    folder.rejected.add(images)
                continue
            assert isinstance(sample, RawSample)
            for folder, image in zip(folders, images, strict=True):
                shape = self._encoders.codec.latent_shape(*image.shape[1:])
                folder.check_latent_shape(sample.origin, image, shape)
            valid.append((sample, members.get(RECORD, b""), images))
        for folder in folders:
            folder.check_rejected(self._config.max_rejected)
        captions = [text for sample, _, _ in valid for text in sample.captions.values()]
        states = self._encoders.encode_texts(captions)
        cut = self._count_truncated(captions, states)
        texts = {caption: npy_bytes(tokens) for caption, tokens in states.items()}
        for number, (folder, tar) in enumerate(zip(folders, tars, strict=True)):
            folder.cut += cut
            latents = self._encoders.encode_images([images[number] for _, _, images in valid])
            for (sample, record, _), latent in zip(valid, latents, strict=True):
                own = {text_extension(name): texts[t] for name, t in sample.captions.items()}
                tar.add(sample.key, {LATENT: npy_bytes(latent), **own, RECORD: record})
        self._processed += sum(isinstance(s, RawSample) or s.whole for s, _ in window)
        if self._progress is not None:
            self._progress(self._processed, self._total)

    def _count_truncated(self, captions: Sequence[str], states: Mapping[str, np.ndarray]) -> int:
        # Only captions that fill all tokens can be truncated; the others need no tokenizer.
        longest = self._encoders.text.max_tokens
        filled = [caption for caption in captions if len(states[caption]) == longest]
        return sum(self._encoders.text.cut(filled))
