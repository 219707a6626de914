"""How an image and its captions become what the network reads; the same stored or on the fly."""

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
from miro.images.buckets import aspect, nearest
from miro.images.transforms import center_crop_resize, for_each
from miro.utils.serialize import differences

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EncodingConfig:
    """What images and captions are encoded by, and in which sizes."""

    latents: str = "pixels"  # or a folder or hub id of a diffusers AutoencoderKL
    text: str = "minilm"  # or a folder or hub id of a transformers encoder, e.g. google/flan-t5-xl
    size: int | None = None  # images are cropped and resized to size x size; None: as they are
    buckets: tuple[str, ...] = ()  # aspects such as 1:1 4:3 3:4, of about size² pixels each
    multiple: int = 16  # of which a bucket's sides are: the autoencoder's factor times the patch
    max_tokens: int | None = None  # longer captions are cut; None: 256 or what the encoder takes
    precision: Literal["fp32", "bf16"] = "fp32"  # of both encoders' weights and arithmetic

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
        """It as a manifest says it; max_tokens may be None, which the encoder decides."""
        several = {"buckets": list(self.buckets), "multiple": self.multiple}
        return {
            "latents": self.latents,
            "text_encoder": self.text,
            "size": self.size,
            "precision": self.precision,
            "max_tokens": self.max_tokens,
        } | (several if self.buckets else {})

    def diff(self, record: Mapping[str, Any]) -> list[str]:
        """In what a manifest's encoding differs from this one, as `differences` says it."""
        ours = self.settings()
        ours["max_tokens"] = self.max_tokens or record.get("max_tokens")
        names = ours | dict.fromkeys(name for name in ("buckets", "multiple") if name in record)
        return differences(ours, {name: record.get(name) for name in names})

    def bucket_sizes(self) -> list[tuple[int, int]]:
        """The (height, width) images are brought to; none where they stay as they are.

        ValueError for buckets that are no aspects, or cannot be told apart.
        """
        if self.size is None:
            if self.buckets:
                raise ValueError(f"buckets {' '.join(self.buckets)} need a size: --size 256")
            return []
        if not self.buckets:
            return [(self.size, self.size)]
        found: dict[tuple[int, int], str] = {}
        for name in self.buckets:
            root = math.sqrt(aspect(name))
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

    def fit(self, image: Tensor) -> Tensor:
        """An image, uint8 (3, H, W), in the nearest of the sizes; as it is where there are none.

        Its centre is cropped to the aspect, and resized, antialiased.
        """
        if not (sides := self.bucket_sizes()):
            return image
        return center_crop_resize(image, *nearest(sides, image.shape[2] / image.shape[1]))

    def fit_all(self, images: Sequence[Tensor]) -> list[Tensor]:
        """`fit` of each of the images, which are on one device; on a CPU by all cores."""
        return for_each(images, self.fit)


class TextCache:
    """The token states of captions: first come, and closed when full.

    What it holds depends on the captions before, in their order, and not on who asked: so a run
    that goes on can fill it again from the shards that are there, and then encodes in the same
    batches.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._states: dict[str, np.ndarray] = {}
        self.full = False

    def get(self, caption: str) -> np.ndarray | None:
        return self._states.get(caption)

    def put(self, caption: str, states: np.ndarray) -> None:
        if self.full or caption in self._states:
            return
        self._left -= states.nbytes + len(caption)
        if self._left < 0:
            self.full = True
        else:
            self._states[caption] = states


class FrozenEncoders:
    """The frozen networks of an encoding, on a device. What they give is rounded to float16."""

    def __init__(
        self,
        encoding: EncodingConfig,
        device: str | torch.device,
        *,
        batch_size: int,
        cache_bytes: int,
    ) -> None:
        """batch_size: images of one forward pass; cache_bytes: for captions that come again."""
        dtype = _DTYPES[encoding.precision]
        self.encoding, self.batch_size = encoding, batch_size
        self.codec = build_codec(encoding.latents, device, dtype=dtype)
        self.text = build_text_encoder(
            encoding.text, device, max_tokens=encoding.max_tokens, dtype=dtype
        )
        self.cache = TextCache(cache_bytes)

    def record(self, encoding: EncodingConfig, image: Tensor) -> dict[str, Any]:
        """What a manifest says of an encoding, by an image (3, H, W) that was fitted to it."""
        sides = encoding.bucket_sizes() or [(image.shape[1], image.shape[2])]
        shapes = [list(self.codec.latent_shape(*side)) for side in sides]
        # The network's own grid; the others lie round its centre.
        base = min(shapes, key=lambda shape: abs(math.log(shape[2] / shape[1])))
        return (
            encoding.settings()
            | {
                "latent_shape": base,
                "has_std": self.codec.encode(image[None])[1] is not None,
                "text_dim": self.text.dim,
                "max_tokens": self.text.max_tokens,
                "cut": 0,
            }
            | ({"latent_shapes": shapes} if encoding.buckets else {})
        )

    def encode_images(self, images: Sequence[Tensor]) -> list[np.ndarray]:
        """Each image's latent, float16 (C, H, W), or (2, C, H, W) mean and deviation."""
        found: dict[int, np.ndarray] = {}
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for place, image in enumerate(images):
            by_shape.setdefault(tuple(image.shape), []).append(place)
        for places in by_shape.values():
            for start in range(0, len(places), self.batch_size):
                batch = places[start : start + self.batch_size]
                mean, std = self.codec.encode(torch.stack([images[place] for place in batch]))
                both = mean if std is None else torch.stack([mean, std], 1)
                halves = _half(both, f"latents {self.encoding.latents!r}")
                found |= dict(zip(batch, halves, strict=True))
        return [found[place] for place in range(len(images))]

    def encode_texts(self, captions: Sequence[str]) -> Mapping[str, np.ndarray]:
        """The token states of each distinct caption, float16 (length, dim)."""
        states = {caption: self.cache.get(caption) for caption in captions}
        new = [caption for caption, there in states.items() if there is None]
        found = {caption: there for caption, there in states.items() if there is not None}
        for caption, made in zip(new, self.text.encode(new), strict=True):
            found[caption] = _half(made, f"text encoder {self.encoding.text!r}")
            self.cache.put(caption, found[caption])
        return found


def _half(values: Tensor, who: str) -> np.ndarray:
    """As float16; ValueError where that is not finite."""
    half = values.half().cpu().numpy()
    if not np.isfinite(half).all():
        raise ValueError(
            f"{who} gave values that are not finite, or beyond what float16 holds (65,504)"
        )
    return half
