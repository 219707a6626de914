"""Pictures and captions of an images folder, encoded when they are visited and never stored.

What the network reads is what `miro encode` would have stored, rounded to float16 as it is there.
It costs a pass through the encoders at each visit; in exchange nothing is written, and pictures may
be mirrored.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from miro.data.reader import RECORD, EncodedDataset, Shape, text_extension
from miro.data.shards import Manifest, ShardIndex
from miro.encoders.encoder import EncodingConfig, FrozenEncoders
from miro.images.buckets import nearest
from miro.images.decoder import DecodeError, Decoder
from miro.images.open_decoder import build_decoder
from miro.images.pillow import IMAGE_EXTENSIONS, picture_size
from miro.sources.sample import RawSample, read_sample

CACHE = 1 << 28
"""Bytes for token states of captions that come again."""
BATCH = 64
"""Pictures of one forward pass of the autoencoder."""


class OnTheFlyEncoders:
    """What live datasets of a run share: the frozen networks, and who decodes."""

    def __init__(self, encoding: EncodingConfig, device: str | torch.device) -> None:
        self.encoders = FrozenEncoders(encoding, device, batch_size=BATCH, cache_bytes=CACHE)
        self.decoder: Decoder = build_decoder("auto", device, BATCH)


class OnTheFlyDataset(EncodedDataset):
    """An images folder that is read as the encoded folder would be that it can be made into."""

    def __init__(
        self, folder: Path | str, rewards: Sequence[str] | None, live: OnTheFlyEncoders
    ) -> None:
        """`rewards`: the columns of `scores`; all the folder has where it is None.

        ValueError for a folder without images, or whose first picture cannot be decoded.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if manifest.kind != "images":
            raise ValueError(f"{folder} is encoded already; train on it without live encoding")
        if not manifest.samples:
            raise ValueError(f"{folder} holds no samples yet; let `miro annotate` finish a shard")
        self._live, self.folder = live, folder
        self.index = ShardIndex(folder, manifest)
        # The first picture stands for all.
        image = live.encoders.encoding.center_crop(self._images([0])[0])
        record = live.encoders.record(live.encoders.encoding, image)
        self._open(folder, manifest, rewards, self.index, record)

    def latents(self, samples: np.ndarray, mirrored: np.ndarray | None = None) -> np.ndarray:
        """As of an encoded dataset; mirrored: bool (n,), which pictures are seen in a mirror.

        ValueError for a picture that cannot be decoded, or has a size of its own.
        """
        shape = self.shapes[self.shape_of[samples[0]]]
        encoders = self._live.encoders
        pictures = encoders.encoding.center_crop_all(self._images(samples))
        if mirrored is not None:
            pictures = [p.flip(2) if m else p for p, m in zip(pictures, mirrored, strict=True)]
        for sample, picture in zip(samples, pictures, strict=True):
            if encoders.codec.latent_shape(*picture.shape[1:]) != shape:
                raise ValueError(
                    f"{self._name(sample)}: the picture is {picture.shape[2]} x "
                    f"{picture.shape[1]} pixels, the first of the data gives latents of {shape}; "
                    "set encode.size, to which all are cropped and resized"
                )
        return np.stack(encoders.encode_images(pictures)).astype(np.float32)

    def texts(self, samples: np.ndarray, captions: np.ndarray) -> list[np.ndarray]:
        """As of an encoded dataset."""
        said = [
            self._said(int(sample))[self.caption_kinds[caption]]
            for sample, caption in zip(samples, captions, strict=True)
        ]
        states = self._live.encoders.encode_texts(said)
        return [states[caption] for caption in said]

    def latent(self, sample: int) -> np.ndarray:
        """As of an encoded dataset, but not a view."""
        return self.latents(np.array([sample]))[0].astype(np.float16)

    def text(self, sample: int, caption: int) -> np.ndarray:
        """As of an encoded dataset, but not a view."""
        return self.texts(np.array([sample]), np.array([caption]))[0]

    def _picture(self, sample: int) -> bytes:
        held = self.index.extensions(sample)
        extension = next(name for name in IMAGE_EXTENSIONS if name in held)
        return bytes(self.index.member(sample, extension))

    def _images(self, samples: Sequence[int] | np.ndarray) -> list[Tensor]:
        """uint8 (3, H, W) of each; ValueError names one that cannot be decoded."""
        found: list[Tensor] = []
        for start in range(0, len(samples), BATCH):
            part = [int(sample) for sample in samples[start : start + BATCH]]
            decoded = self._live.decoder.start([self._picture(sample) for sample in part])()
            for sample, image in zip(part, decoded, strict=True):
                if isinstance(image, DecodeError):
                    raise ValueError(
                        f"{self._name(sample)}: {image}; `miro annotate` into a new folder sets "
                        "such pictures aside"
                    )
                found.append(image)
        return found

    def _name(self, sample: int) -> str:
        return f"{self.folder}: sample {self.index.keys[sample]!r}"

    def _said(self, sample: int) -> dict[str, str]:
        """The captions of a sample by kind, as `miro encode` reads them."""
        members = {"png": b"", RECORD: bytes(self.index.member(sample, RECORD))}
        for item in read_sample(self._name(sample), self.index.keys[sample], members):
            if isinstance(item, RawSample):
                return item.captions
        return {}

    def _kinds(self, sample: int) -> Collection[str]:
        return [text_extension(kind) for kind in self._said(sample)]

    def _shape(self, sample: int) -> Shape:
        width, height = picture_size(self._picture(sample), upright=True)
        encoding = self._live.encoders.encoding
        side = nearest(encoding.bucket_sizes(), width / height)
        return self._live.encoders.codec.latent_shape(*side)
