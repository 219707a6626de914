"""FrozenEncoders: images to latents and captions to text states, ahead of or during training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from miro.encoders.text import build_text_encoder
from miro.encoders.vae import build_codec
from miro.images.buckets import aspect_ratio, nearest_bucket
from miro.images.transforms import center_crop_resize, map_images
from miro.utils.serialize import differences

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EncodingConfig:
    """Frozen encoders of images and captions, image sizes, and precision."""

    latents: str = "pixels"
    """"pixels", or a folder or hub id of a diffusers AutoencoderKL."""
    text: str = "minilm"
    """"minilm", or a folder or hub id of a transformers encoder, such as google/flan-t5-xl."""
    size: int | None = None
    """Images are center-cropped and resized to size x size; None: left as they are."""
    buckets: tuple[str, ...] = ()
    """Aspect ratios such as 1:1 4:3 3:4, of about size² pixels each."""
    multiple: int = 16
    """Sides of a bucket are multiples of it: the autoencoder's factor times the patch."""
    max_tokens: int | None = None
    """Longer captions are truncated; None: 256, or the encoder's limit if that is less."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of both encoders' weights and arithmetic."""

    def __post_init__(self) -> None:
        for name in ("size", "multiple", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.precision not in _DTYPES:
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")
        if self.size is not None:
            self.bucket_sizes()

    def settings(self) -> dict[str, Any]:
        """The manifest's record of it; max_tokens is None where the encoder's limit decides."""
        several = {"buckets": list(self.buckets), "multiple": self.multiple}
        return {
            "latents": self.latents,
            "text_encoder": self.text,
            "size": self.size,
            "precision": self.precision,
            "max_tokens": self.max_tokens,
        } | (several if self.buckets else {})

    def diff(self, record: Mapping[str, Any]) -> list[str]:
        """Where a manifest's encoding differs from this one, in the words of `differences`."""
        ours = self.settings()
        ours["max_tokens"] = self.max_tokens or record.get("max_tokens")
        names = ours | dict.fromkeys(name for name in ("buckets", "multiple") if name in record)
        return differences(ours, {name: record.get(name) for name in names})

    def bucket_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each bucket; empty if images are left as they are.

        Raises:
            ValueError: a bucket that is not an aspect ratio, or two of the same size.
        """
        if self.size is None:
            if self.buckets:
                raise ValueError(f"buckets {' '.join(self.buckets)} need a size: --size 256")
            return []
        if not self.buckets:
            return [(self.size, self.size)]
        found: dict[tuple[int, int], str] = {}
        for name in self.buckets:
            root = math.sqrt(aspect_ratio(name))
            height, width = (
                max(1, round(side / self.multiple)) * self.multiple
                for side in (self.size / root, self.size * root)
            )
            if (height, width) in found:
                raise ValueError(
                    f"buckets {found[height, width]!r} and {name!r} are both {width} x {height} "
                    f"pixels at size={self.size} in steps of multiple={self.multiple}; choose a "
                    "smaller multiple, a larger size, or one of them"
                )
            found[height, width] = name
        return list(found)

    def center_crop(self, image: Tensor) -> Tensor:
        """Center-crop a uint8 image (3, H, W) to the nearest bucket's aspect and resize it to it.

        The resize is antialiased. Without a `size` the image is returned as it is.
        """
        if not (sides := self.bucket_sizes()):
            return image
        return center_crop_resize(image, *nearest_bucket(sides, image.shape[2] / image.shape[1]))

    def center_crop_all(self, images: Sequence[Tensor]) -> list[Tensor]:
        """`center_crop` of images on one device; on a CPU in parallel on all cores."""
        return map_images(images, self.center_crop)


class TextCache:
    """Token states by caption, first come first cached until `limit` bytes are reached.

    Its contents depend on the sequence of captions alone, so a resumed run can refill it from the
    finished shards and then encodes the same batches.
    """

    def __init__(self, limit: int) -> None:
        self._bytes_left = limit
        self._states: dict[str, np.ndarray] = {}
        self.full = False

    def get(self, caption: str) -> np.ndarray | None:
        """The cached states, float16 (length, dim), or None."""
        return self._states.get(caption)

    def put(self, caption: str, states: np.ndarray) -> None:
        """Cache the states unless the cache is full; the first that do not fit close it."""
        if self.full or caption in self._states:
            return
        self._bytes_left -= states.nbytes + len(caption)
        if self._bytes_left < 0:
            self.full = True
        else:
            self._states[caption] = states


class FrozenEncoders:
    """The latent codec and the text encoder of an encoding; outputs are rounded to float16."""

    def __init__(
        self,
        encoding: EncodingConfig,
        device: str | torch.device,
        *,
        batch_size: int,
        cache_bytes: int,
    ) -> None:
        """Load both; batch_size: images per forward pass, cache_bytes: of repeated captions."""
        dtype = _DTYPES[encoding.precision]
        self.encoding, self.batch_size = encoding, batch_size
        self.codec = build_codec(encoding.latents, device, dtype=dtype)
        self.text = build_text_encoder(
            encoding.text, device, max_tokens=encoding.max_tokens, dtype=dtype
        )
        self.cache = TextCache(cache_bytes)

    def record(self, encoding: EncodingConfig, image: Tensor) -> dict[str, Any]:
        """The `encoding` entry of a manifest.

        `encoding` has these encoders but maybe other sizes; if its size is None, the shape of the
        uint8 `image` (3, H, W) decides.
        """
        sides = encoding.bucket_sizes() or [(image.shape[1], image.shape[2])]
        shapes = [list(self.codec.latent_shape(*side)) for side in sides]
        # The reference grid of the network's position embeddings: the bucket nearest to a square.
        reference = min(shapes, key=lambda shape: abs(math.log(shape[2] / shape[1])))
        return (
            encoding.settings()
            | {
                "latent_shape": reference,
                "has_std": self.codec.encode(image[None])[1] is not None,
                "text_dim": self.text.dim,
                "max_tokens": self.text.max_tokens,
                "cut": 0,
            }
            | ({"latent_shapes": shapes} if encoding.buckets else {})
        )

    def encode_images(self, images: Sequence[Tensor]) -> list[np.ndarray]:
        """Latents of uint8 images (3, H, W), batched by shape.

        Returns:
            Per image float16 (C, h, w), or (2, C, h, w) mean and standard deviation.
        """
        latents: dict[int, np.ndarray] = {}
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            by_shape.setdefault(tuple(image.shape), []).append(index)
        for indices in by_shape.values():
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                mean, std = self.codec.encode(torch.stack([images[index] for index in batch]))
                both = mean if std is None else torch.stack([mean, std], 1)
                halves = _half(both, f"latents {self.encoding.latents!r}")
                latents |= dict(zip(batch, halves, strict=True))
        return [latents[index] for index in range(len(images))]

    def encode_texts(self, captions: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Token states by distinct caption, float16 (length, dim)."""
        cached = {caption: self.cache.get(caption) for caption in captions}
        new = [caption for caption, states in cached.items() if states is None]
        found = {caption: states for caption, states in cached.items() if states is not None}
        for caption, states in zip(new, self.text.encode(new), strict=True):
            found[caption] = _half(states, f"text encoder {self.encoding.text!r}")
            self.cache.put(caption, found[caption])
        return found


def _half(values: Tensor, source: str) -> np.ndarray:
    """Cast to float16; ValueError for NaN and overflow."""
    half = values.half().cpu().numpy()
    if not np.isfinite(half).all():
        raise ValueError(
            f"{source} gave NaN, or values beyond the range of float16 (65,504); try another "
            "precision or encoder"
        )
    return half
