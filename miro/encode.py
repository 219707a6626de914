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

Of several sizes each has a complete folder of its own, DEST/256 and DEST/512. A picture is read and
decoded once and a caption encoded once for all; only the files of the token states are repeated.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from miro.data.decode import (
    DecodeError,
    Decoder,
    DecoderName,
    build_decoder,
    decode,
    decode_ahead,
)
from miro.data.encoded import LATENT, RECORD, copy_scores, text_extension
from miro.data.npy import npy_bytes, npy_view
from miro.data.rejected import RejectedLog
from miro.data.shards import (
    Manifest,
    ShardIndex,
    ShardInfo,
    ShardWriter,
    iterate_shard,
    open_shard,
    shard_path,
)
from miro.data.sources import Candidate, Rejection, read_sample
from miro.encoding import Encoders, Encoding
from miro.locks import alone_in

log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]  # samples looked at by this call, of how many

# Samples read, and whose captions are encoded, together: many of each length, bounded memory.
WINDOW = 1024


@dataclass(frozen=True)
class EncodeConfig(Encoding):
    """How pictures and captions are encoded, and with how much of the machine."""

    sizes: tuple[int, ...] = ()  # several at once, each in a folder of its own: DEST/256, DEST/512
    batch_size: int = 64  # pictures decoded, and encoded by the autoencoder, at a time
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
            encoding.sides()

    def encodings(self) -> list[Encoding]:
        """The encoding of each size."""
        own: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(Encoding)}
        return [Encoding(**{**own, "size": size}) for size in self.sizes or (self.size,)]


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
    with ExitStack() as stack:
        folders = [
            _Folder(source, dest / str(size) if size in config.sizes else dest, pictures, encoding)
            for size, encoding in zip(config.sizes or (None,), config.encodings(), strict=True)
        ]
        for folder in folders:
            folder.open(stack)
        before = [folder.samples for folder in folders]
        if any(len(folder.shards) < len(pictures.shards) for folder in folders):
            # Only here: a finished folder needs no encoders, and they take seconds to load.
            decoder = stack.enter_context(
                closing(
                    build_decoder(config.decoder, config.device, config.batch_size, config.workers)
                )
            )
            _Work(source, pictures, config, decoder, folders, progress).run()
        for folder in folders:
            folder.take_rewards()
        return EncodeSummary(
            samples=folders[0].samples,
            rejected=len(folders[0].rejected),
            cut=folders[0].cut,
            encoded=max(f.samples - there for f, there in zip(folders, before, strict=True)),
            seconds=time.perf_counter() - started,
        )


class _Folder:
    """The encoded folder of one size: what it holds, and how it grows."""

    def __init__(self, source: Path, dest: Path, pictures: Manifest, encoding: Encoding) -> None:
        self.source, self.dest, self.pictures, self.encoding = source, dest, pictures, encoding
        found = (dest / "manifest.json").is_file()
        self.manifest = self._made_alike() if found else None
        self.cut = self._record["cut"] if found else 0

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        return self.manifest.shards if self.manifest else ()

    @property
    def samples(self) -> int:
        return self.manifest.samples if self.manifest else 0

    @property
    def _record(self) -> dict[str, Any]:
        assert self.manifest is not None and self.manifest.encoding is not None
        return self.manifest.encoding

    def open(self, stack: ExitStack) -> None:
        """Keep other processes out, and bring the scores of what is there up to date."""
        stack.enter_context(alone_in(self.dest))
        self.rejected = stack.enter_context(RejectedLog(self.dest / "rejected.jsonl"))
        for shard in self.shards:
            copy_scores(self.source, self.dest, shard)

    def begin(self, record: dict[str, Any]) -> None:
        """The manifest of a folder without shards."""
        origin = {**self.pictures.source, "encoded_from": {}}
        self._write(
            replace(self.pictures, kind="encoded", shards=(), encoding=record, source=origin)
        )

    def complete(self, shard: ShardInfo, made: ShardInfo) -> None:
        """A shard of the source was encoded."""
        copy_scores(self.source, self.dest, made)
        assert self.manifest is not None
        made_from = {**self.manifest.source["encoded_from"], shard.name: shard.sha256}
        self._write(
            replace(
                self.pictures,
                kind="encoded",
                shards=(*self.shards, made),
                encoding={**self._record, "cut": self.cut},
                source={**self.pictures.source, "encoded_from": made_from},
            )
        )
        log.info("%s: %d samples encoded", self.dest, self.samples)

    def take_rewards(self) -> None:
        assert self.manifest is not None
        if self.manifest.rewards != self.pictures.rewards:
            self._write(replace(self.manifest, rewards=self.pictures.rewards))

    def _write(self, manifest: Manifest) -> None:
        self.manifest = manifest
        manifest.write(self.dest)

    def check_shape(self, origin: str, image: Tensor, shape: Sequence[int]) -> None:
        """ValueError for a picture of a size of its own, where none was asked for."""
        first, (height, width) = self._record["latent_shape"], image.shape[1:]
        if not self.encoding.buckets and list(shape) != first:
            raise ValueError(
                f"{origin}: the picture is {width} x {height} pixels, its latents {shape}, those of"
                f" the first {tuple(first)}; give a size, to which all are cropped and resized"
            )

    def check_share(self, most: float) -> None:
        share = len(self.rejected) / self.pictures.samples
        if share > most:
            raise ValueError(
                f"{len(self.rejected)} of {self.pictures.samples} samples were set aside, more "
                f"than the share of {most:g} allowed by max_rejected; "
                f"{self.rejected.path} says why, last: {self.rejected.last}"
            )

    def _made_alike(self) -> Manifest:
        """The manifest that is there; ValueError where it is not what this call would make."""
        dest, manifest = self.dest, Manifest.read(self.dest)
        if manifest.kind != "encoded" or manifest.encoding is None:
            raise ValueError(f"{dest}: holds images, not latents; choose a new folder")
        if differ := self.encoding.otherwise(manifest.encoding):
            raise ValueError(
                f"{dest}: was encoded otherwise ({'; '.join(differ)}); ask for the same, or choose "
                "a new folder"
            )
        made_from = manifest.source.get("encoded_from", {})
        for position, shard in enumerate(manifest.shards):
            shards = self.pictures.shards
            now = shards[position] if position < len(shards) else None
            if now is None or now.name != shard.name or now.sha256 != made_from.get(shard.name):
                raise ValueError(
                    f"{dest}: its shard {shard.name} was encoded from other pictures than "
                    f"{self.source} holds now; choose a new folder"
                )
        return manifest


class _Work:
    """What one call of `encode` needs to make shards."""

    def __init__(
        self,
        source: Path,
        pictures: Manifest,
        config: EncodeConfig,
        decoder: Decoder,
        folders: list[_Folder],
        progress: Progress | None,
    ):
        self._source, self._pictures, self._folders = source, pictures, folders
        self._config, self._decoder, self._progress = config, decoder, progress
        self._encoders = Encoders(
            config, config.device, batch_size=config.batch_size, cache_bytes=config.cache_bytes
        )
        self._looked_at = self._total = 0

    def run(self) -> None:
        """Encode the shards that any folder lacks."""
        new = [folder for folder in self._folders if folder.manifest is None]
        if new:
            image = self._first_image()
            for folder in new:
                folder.begin(self._encoders.record(folder.encoding, folder.encoding.fit(image)))
        behind = min(self._folders, key=lambda folder: len(folder.shards))
        self._remember(behind)
        todo = self._pictures.shards[len(behind.shards) :]
        self._total = sum(shard.samples for shard in todo)
        for position, shard in enumerate(todo, len(behind.shards)):
            lacking = [folder for folder in self._folders if len(folder.shards) == position]
            with ExitStack() as stack:
                tars = [
                    stack.enter_context(open_shard(shard_path(folder.dest, shard)))
                    for folder in lacking
                ]
                self._encode(shard, lacking, tars)
            for folder, tar in zip(lacking, tars, strict=True):
                folder.complete(shard, tar.info)

    def _first_image(self) -> Tensor:
        """The first good picture stands for all."""
        for shard in self._pictures.shards:
            for item, _ in self._read(shard):
                try:
                    if isinstance(item, Candidate):
                        return decode(item.image)
                except DecodeError:
                    continue  # it is set aside in its turn
        raise ValueError(f"{self._source}: none of its pictures can be decoded")

    def _remember(self, folder: _Folder) -> None:
        """Fill the cache as the run that made a folder's shards had filled it."""
        index = ShardIndex(folder.dest, folder.manifest)
        for i in range(len(index)):
            # Read as it was then, but for the picture, which only has to be named.
            members = {"png": b"", RECORD: bytes(index.member(i, RECORD))}
            for item in read_sample("", index.keys[i], members):
                captions = item.captions if isinstance(item, Candidate) else {}
                for kind, caption in captions.items():
                    states = npy_view(index.member(i, text_extension(kind)))
                    self._encoders.cache.put(caption, states)
            if self._encoders.cache.full:
                return

    def _read(self, shard: ShardInfo) -> Iterator[tuple[Candidate | Rejection, bytes]]:
        """The samples of a shard of SOURCE, each with its .json as it is."""
        for key, members in iterate_shard(shard_path(self._source, shard)):
            for item in read_sample(f"{shard.name}:{key}", key, members):
                yield item, members.get(RECORD, b"")

    def _fitted(
        self, items: Iterable[Candidate | Rejection], folders: list[_Folder]
    ) -> Iterator[list[Tensor] | Rejection]:
        """Each item's picture as each folder has it, or why there is none."""

        def image_of(item: Candidate | Rejection) -> bytes | None:
            return item.image if isinstance(item, Candidate) else None

        for batch in decode_ahead(items, image_of, self._config.batch_size, self._decoder):
            for item, image in batch:
                if isinstance(item, Rejection):
                    yield item
                elif isinstance(image, Tensor):
                    yield [folder.encoding.fit(image) for folder in folders]
                else:
                    yield Rejection(item.origin, "image", str(image))

    def _encode(self, shard: ShardInfo, folders: list[_Folder], tars: list[ShardWriter]) -> None:
        """Put the samples of a shard into the tars."""
        samples = self._read(shard)
        while window := list(itertools.islice(samples, WINDOW)):
            images = list(self._fitted((item for item, _ in window), folders))
            self._encode_window(window, images, folders, tars)

    def _encode_window(
        self,
        window: list[tuple[Candidate | Rejection, bytes]],
        images: list[list[Tensor] | Rejection],
        folders: list[_Folder],
        tars: list[ShardWriter],
    ) -> None:
        good: list[tuple[Candidate, bytes, list[Tensor]]] = []
        for (item, record), fitted in zip(window, images, strict=True):
            if isinstance(fitted, Rejection):
                for folder in folders:
                    folder.rejected.add(fitted.source, fitted.field, fitted.reason)
                continue
            assert isinstance(item, Candidate)
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
        self._looked_at += sum(isinstance(item, Candidate) or item.whole for item, _ in window)
        if self._progress is not None:
            self._progress(self._looked_at, self._total)

    def _cut(self, captions: Sequence[str], texts: Mapping[str, np.ndarray]) -> int:
        """How many captions are longer than what was read of them."""
        # Only a caption that fills all tokens can have been cut.
        longest = self._encoders.text.max_tokens
        filled = [caption for caption in captions if len(texts[caption]) == longest]
        return sum(self._encoders.text.cut(filled))
