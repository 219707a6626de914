"""`miro encode`: images and captions become latents and token states, once, before training.

    SOURCE (kind "images")                 DEST (kind "encoded")
    shards/00000.tar  {key}.png            shards/00000.tar  {key}.latent.npy       float16
                      {key}.json                             {key}.text.{kind}.npy  float16
                                                             {key}.json             as it was
    scores/00000.parquet                   scores/00000.parquet                     copied

A shard of SOURCE becomes the shard of the same name; the ranks of a launch divide them. A run that
was stopped goes on where it was, and its files equal an undisturbed run's byte for byte: which
captions are encoded together depends on the source and the number of processes alone. Running it on
a finished folder only copies the scores anew, so a reward that was added to SOURCE reaches DEST
without encoding anything.

Of several sizes each has a complete folder of its own, DEST/256 and DEST/512. An image is read and
decoded once and a caption encoded once for all; only the files of the token states are repeated.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from miro.sources.sample import RawSample, RejectedSample, read_sample
from miro.sources.tar import iterate_shard
from miro.utils.distributed import dist_env

Progress = Callable[[int, int | None], None]  # samples looked at by this call, of how many

# Samples read, and whose captions are encoded, together: many of each length, bounded memory.
WINDOW = 1024


@dataclass(frozen=True)
class EncodeConfig(EncodingConfig):
    """How images and captions are encoded, and with how much of the machine."""

    sizes: tuple[int, ...] = ()  # several at once, each in a folder of its own: DEST/256, DEST/512
    batch_size: int = 64  # images decoded, and encoded by the autoencoder, at a time
    cache_bytes: int = 1 << 28  # memory for token states of captions that may come again
    max_rejected: float = 0.01  # stop above this share of SOURCE that cannot be decoded
    workers: int = 0  # threads that decode; 0: one per core, at most 16
    decoder: DecoderName = "auto"  # DALI where it is installed, Pillow elsewhere
    device: str = "cpu"  # where the encoders compute, and DALI decodes

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
            raise ValueError(f"sizes {self.sizes} names one twice")
        for encoding in self.encodings():
            encoding.bucket_sizes()

    def encodings(self) -> list[EncodingConfig]:
        """The encoding of each size."""
        own: dict[str, Any] = {
            each.name: getattr(self, each.name) for each in fields(EncodingConfig)
        }
        return [EncodingConfig(**{**own, "size": size}) for size in self.sizes or (self.size,)]


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
    or `dest` was made with other settings (the message names them); later where images differ
    in size and no size was given, or too many cannot be decoded. OSError if the disk is full.
    Completed shards remain, and the same call resumes.
    """
    started = time.perf_counter()
    source, dest, config = Path(source), Path(dest), config or EncodeConfig()
    source_manifest = Manifest.read(source)
    if source_manifest.kind != "images":
        raise ValueError(f"{source}: is encoded already; encode the images it was made from")
    if not source_manifest.samples:
        raise ValueError(f"{source}: holds no samples; let `miro annotate` complete a shard first")
    ranks = dist_env(os.environ)
    config = replace(config, device=str(ranks.device(config.device)))
    with ExitStack() as stack:
        places = [dest / str(size) for size in config.sizes] or [dest]
        folders = [
            EncodedFolder(source, place, source_manifest, encoding, ranks)
            for place, encoding in zip(places, config.encodings(), strict=True)
        ]
        for folder in folders:
            folder.open(stack)
        before = [folder.samples for folder in folders]
        mine = range(ranks.rank, len(source_manifest.shards), ranks.world)
        begun = all(folder.manifest for folder in folders)  # a rank may have no shard at all
        if not begun or any(f.made(position) is None for f in folders for position in mine):
            # Only here: a finished folder needs no encoders, and they take seconds to load.
            decoder = stack.enter_context(
                closing(
                    build_decoder(config.decoder, config.device, config.batch_size, config.workers)
                )
            )
            _Work(source, source_manifest, config, decoder, folders, progress).run(mine)
        for folder in folders:
            folder.sync_reward_columns()
        return EncodeSummary(
            samples=folders[0].samples,
            rejected=len(folders[0].rejected),
            cut=folders[0].record["cut"],
            encoded=max(f.samples - there for f, there in zip(folders, before, strict=True)),
            seconds=time.perf_counter() - started,
        )


class _Work:
    """What one call of `encode` needs to make shards."""

    def __init__(
        self,
        source: Path,
        source_manifest: Manifest,
        config: EncodeConfig,
        decoder: Decoder,
        folders: list[EncodedFolder],
        progress: Progress | None,
    ):
        self._source, self._images, self._folders = source, source_manifest, folders
        self._config, self._decoder, self._progress = config, decoder, progress
        self._encoders = FrozenEncoders(
            config, config.device, batch_size=config.batch_size, cache_bytes=config.cache_bytes
        )
        self._looked_at = self._total = 0

    def run(self, positions: Sequence[int]) -> None:
        """Encode the shards at these positions that any folder lacks."""
        new = [folder for folder in self._folders if folder.manifest is None]
        if new:
            image = self._first_image()
            for folder in new:
                folder.begin(
                    self._encoders.record(folder.encoding, folder.encoding.center_crop(image))
                )
        lacking = {
            position: [folder for folder in self._folders if folder.made(position) is None]
            for position in positions
        }
        shards = self._images.shards
        self._total = sum(shards[position].samples for position, by in lacking.items() if by)
        for position, folders in lacking.items():
            if not folders:
                self._remember(position)
                continue
            with ExitStack() as stack:
                paths = [shard_path(folder.dest, shards[position]) for folder in folders]
                tars = [stack.enter_context(open_shard(path)) for path in paths]
                self._encode(shards[position], folders, tars)
            for folder, tar in zip(folders, tars, strict=True):
                folder.complete(shards[position], tar.info)

    def _first_image(self) -> Tensor:
        """The first good image stands for all."""
        for shard in self._images.shards:
            for item, _ in self._read(shard):
                try:
                    if isinstance(item, RawSample):
                        return decode(item.image)
                except DecodeError:
                    continue  # it is skipped when its batch is decoded
        raise ValueError(f"{self._source}: none of its images can be decoded")

    def _remember(self, position: int) -> None:
        """Fill the cache as the run that made the shard at `position` had filled it."""
        folder = self._folders[0]
        made = folder.made(position)
        if made is None or self._encoders.cache.full:
            return
        index = ShardIndex(folder.dest, Manifest("encoded", (), (made,)))
        for i in range(len(index)):
            # Read as it was then, but for the image, which only has to be named.
            members = {"png": b"", RECORD: bytes(index.member(i, RECORD))}
            for item in read_sample("", index.keys[i], members):
                captions = item.captions if isinstance(item, RawSample) else {}
                for kind, caption in captions.items():
                    states = npy_view(index.member(i, text_extension(kind)))
                    self._encoders.cache.put(caption, states)

    def _read(self, shard: ShardInfo) -> Iterator[tuple[RawSample | RejectedSample, bytes]]:
        """The samples of a shard of SOURCE, each with its .json as it is."""
        for key, members in iterate_shard(shard_path(self._source, shard)):
            for item in read_sample(f"{shard.name}:{key}", key, members):
                yield item, members.get(RECORD, b"")

    def _fitted(
        self, items: Iterable[RawSample | RejectedSample], folders: list[EncodedFolder]
    ) -> Iterator[list[Tensor] | RejectedSample]:
        """Each item's image as each folder has it, or why there is none."""

        def image_of(item: RawSample | RejectedSample) -> bytes | None:
            return item.image if isinstance(item, RawSample) else None

        for batch in prefetch_decoded(items, image_of, self._config.batch_size, self._decoder):
            images = [image for _, image in batch if isinstance(image, Tensor)]
            fitted = zip(
                *(folder.encoding.center_crop_all(images) for folder in folders),
                strict=True,
            )
            for item, image in batch:
                if isinstance(item, RejectedSample):
                    yield item
                elif isinstance(image, Tensor):
                    yield list(next(fitted))
                else:
                    yield RejectedSample(item.origin, "image", str(image))

    def _encode(
        self, shard: ShardInfo, folders: list[EncodedFolder], tars: list[ShardWriter]
    ) -> None:
        """Put the samples of a shard into the tars."""
        samples = self._read(shard)
        while window := list(itertools.islice(samples, WINDOW)):
            images = list(self._fitted((item for item, _ in window), folders))
            self._encode_window(window, images, folders, tars)

    def _encode_window(
        self,
        window: list[tuple[RawSample | RejectedSample, bytes]],
        images: list[list[Tensor] | RejectedSample],
        folders: list[EncodedFolder],
        tars: list[ShardWriter],
    ) -> None:
        good: list[tuple[RawSample, bytes, list[Tensor]]] = []
        for (item, record), fitted in zip(window, images, strict=True):
            if isinstance(fitted, RejectedSample):
                for folder in folders:
                    folder.rejected.add(fitted.source, fitted.field, fitted.reason)
                continue
            assert isinstance(item, RawSample)
            for folder, image in zip(folders, fitted, strict=True):
                shape = self._encoders.codec.latent_shape(*image.shape[1:])
                folder.check_shape(item.origin, image, shape)
            good.append((item, record, fitted))
        for folder in folders:
            folder.check_share(self._config.max_rejected)
        captions = [text for item, _, _ in good for text in item.captions.values()]
        texts = self._encoders.encode_texts(captions)
        cut = self._cut(captions, texts)
        members = {caption: npy_bytes(states) for caption, states in texts.items()}
        for number, (folder, tar) in enumerate(zip(folders, tars, strict=True)):
            folder.cut += cut
            latents = self._encoders.encode_images([fitted[number] for _, _, fitted in good])
            for (item, record, _), latent in zip(good, latents, strict=True):
                own = {text_extension(kind): members[t] for kind, t in item.captions.items()}
                tar.add(item.key, {LATENT: npy_bytes(latent), **own, RECORD: record})
        self._looked_at += sum(isinstance(item, RawSample) or item.whole for item, _ in window)
        if self._progress is not None:
            self._progress(self._looked_at, self._total)

    def _cut(self, captions: Sequence[str], texts: Mapping[str, np.ndarray]) -> int:
        """How many captions are longer than what was read of them."""
        # Only a caption that fills all tokens can have been cut.
        longest = self._encoders.text.max_tokens
        filled = [caption for caption in captions if len(texts[caption]) == longest]
        return sum(self._encoders.text.cut(filled))
