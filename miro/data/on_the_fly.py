"""Latents and text states of an images folder, computed in each batch and never stored.

They equal what `miro encode` would store, including its rounding to float16. Each batch costs a
pass through the frozen encoders; in exchange nothing is written, and images can be flipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from miro.data.dataset_base import FolderDataset, LatentShape
from miro.data.reader import RECORD
from miro.data.shards import Manifest, ShardIndex
from miro.encoders.encoder import EncodingConfig, FrozenEncoders
from miro.images.buckets import nearest_bucket
from miro.images.decoder import DecodeError, Decoder
from miro.images.open_decoder import build_decoder
from miro.images.pillow import IMAGE_EXTENSIONS, image_size
from miro.sources.sample import RawSample, read_sample

TEXT_CACHE_BYTES = 1 << 28
BATCH = 64
"""Images per forward pass of the autoencoder."""


class OnTheFlyEncoders:
    """The frozen encoders and the image decoder, shared by all datasets of a run."""

    def __init__(self, encoding: EncodingConfig, device: str | torch.device) -> None:
        self.encoders = FrozenEncoders(
            encoding, device, batch_size=BATCH, cache_bytes=TEXT_CACHE_BYTES
        )
        self.decoder: Decoder = build_decoder("auto", device, BATCH)


class OnTheFlyDataset(FolderDataset):
    """An images folder, encoded when a batch is loaded; see `Dataset`.

    Args:
        folder: a folder that `miro annotate` wrote.
        rewards: columns of `scores`, all rewards of the folder if None.
        shared: the encoders of the run.

    Raises:
        ValueError: the folder has no images, or its first image cannot be decoded.
    """

    def __init__(
        self, folder: Path | str, rewards: Sequence[str] | None, shared: OnTheFlyEncoders
    ) -> None:
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if manifest.kind != "images":
            raise ValueError(
                f"{folder} is encoded already; train on it without --on-the-fly, or name the "
                "images folder it was encoded from"
            )
        if not manifest.samples:
            raise ValueError(f"{folder} holds no samples yet; let `miro annotate` finish a shard")
        index = ShardIndex(folder, manifest)
        self._images = _ImagesFolder(folder, index, shared)
        self._encoders = encoders = shared.encoders
        # Without encode.size, the first image decides the latent shape of all.
        first = encoders.encoding.center_crop(self._images.decode([0])[0])
        super().__init__(
            folder,
            manifest,
            index,
            encoders.record(encoders.encoding, first),
            rewards,
            latent_shape_of=self._images.latent_shape,
            captions_of=lambda sample: [name.lower() for name in self._images.captions(sample)],
        )

    def latents(self, samples: np.ndarray, flip: np.ndarray | None = None) -> np.ndarray:
        """Encode images of one latent shape; see `Dataset.latents`.

        Raises:
            ValueError: an image cannot be decoded, or its latent has another shape.
        """
        shape = self.shapes[self.shape_index[samples[0]]]
        images = self._encoders.encoding.center_crop_all(self._images.decode(samples))
        if flip is not None:
            images = [x.flip(2) if mirror else x for x, mirror in zip(images, flip, strict=True)]
        for sample, image in zip(samples, images, strict=True):
            if self._encoders.codec.latent_shape(*image.shape[1:]) != shape:
                raise ValueError(
                    f"{self._images.name(sample)}: the image has {image.shape[2]} x "
                    f"{image.shape[1]} pixels, but the first image gives latents of {shape}; "
                    "set encode.size, to which all images are cropped and resized"
                )
        return np.stack(self._encoders.encode_images(images)).astype(np.float32)

    def texts(self, samples: np.ndarray, captions: np.ndarray) -> list[np.ndarray]:
        """Encode one caption of each sample; see `Dataset.texts`."""
        texts = [
            self._images.captions(int(sample))[self.caption_types[caption]]
            for sample, caption in zip(samples, captions, strict=True)
        ]
        states = self._encoders.encode_texts(texts)
        return [states[text] for text in texts]


class _ImagesFolder:
    """Images and captions of an images folder, by sample index."""

    def __init__(self, folder: Path, index: ShardIndex, shared: OnTheFlyEncoders) -> None:
        self._folder, self._index, self._shared = folder, index, shared

    def name(self, sample: int) -> str:
        """The folder and the key of a sample, for messages."""
        return f"{self._folder}: sample {self._index.keys[sample]!r}"

    def decode(self, samples: Sequence[int] | np.ndarray) -> list[Tensor]:
        """uint8 (3, H, W) images; ValueError names one that cannot be decoded."""
        images: list[Tensor] = []
        for start in range(0, len(samples), BATCH):
            batch = [int(sample) for sample in samples[start : start + BATCH]]
            decoded = self._shared.decoder.start([self._bytes(sample) for sample in batch])()
            for sample, image in zip(batch, decoded, strict=True):
                if isinstance(image, DecodeError):
                    raise ValueError(
                        f"{self.name(sample)}: {image}; run `miro annotate` into a new folder, "
                        "which rejects such images"
                    )
                images.append(image)
        return images

    def captions(self, sample: int) -> dict[str, str]:
        """The captions of a sample by type, read as `miro encode` reads them."""
        members = {"png": b"", RECORD: bytes(self._index.member(sample, RECORD))}
        for item in read_sample(self.name(sample), self._index.keys[sample], members):
            if isinstance(item, RawSample):
                return item.captions
        return {}

    def latent_shape(self, sample: int) -> LatentShape:
        """The latent shape of the aspect bucket nearest to the image, from its header alone."""
        width, height = image_size(self._bytes(sample), upright=True)
        encoders = self._shared.encoders
        side = nearest_bucket(encoders.encoding.bucket_sizes(), width / height)
        return encoders.codec.latent_shape(*side)

    def _bytes(self, sample: int) -> bytes:
        present = self._index.extensions(sample)
        extension = next(name for name in IMAGE_EXTENSIONS if name in present)
        return bytes(self._index.member(sample, extension))
