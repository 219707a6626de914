"""What a reward is, which ones exist, and the one order in which every room lists them.

A reward gives a picture (and perhaps its caption) one number on a scale of its own. Nothing here
normalises it: scores are stored raw and binned later over the whole dataset (miro.conditioning).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from miro.config import unknown_name

# The published seven first, in the paper's order, then those that need no published weights.
# A checkpoint's reward tables follow this order: append to it, never reorder it.
REWARD_ORDER: tuple[str, ...] = (
    "clip",
    "aesthetic",
    "image_reward",
    "pick_score",
    "hpsv2",
    "vqa",
    "sci_score",
    "colourfulness",
    "sharpness",
    "alignment",
)


class Reward(Protocol):
    """A score of (image, caption) pairs.

    name: column name of the score, one of REWARD_ORDER.
    reads_caption: False if the score depends on the image alone.
    range: nominal lowest and highest raw score, for the axes of plots; not a clamp.
    """

    name: str
    reads_caption: bool
    range: tuple[float, float]

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """Raw scores, float32 (B,), on the reward's device; NaN where a score is not known.

        images: B tensors uint8 (3, H, W), whose sizes may differ; captions: B strings. The score
        of a pair does not depend on what else is in the batch.
        """
        ...


def _colourfulness(weights: str | None, device: torch.device) -> Reward:
    from miro.rewards.pixels import Colourfulness

    _refuse_weights("colourfulness", weights)
    return Colourfulness(device)


def _sharpness(weights: str | None, device: torch.device) -> Reward:
    from miro.rewards.pixels import Sharpness

    _refuse_weights("sharpness", weights)
    return Sharpness(device)


def _alignment(weights: str | None, device: torch.device) -> Reward:
    from miro.rewards.clip_family import Alignment

    if weights is None:
        raise ValueError(
            "the reward 'alignment' needs a fitted CLIP: make one with 'miro fit-clip DATA FOLDER' "
            "and ask for 'alignment=FOLDER'"
        )
    return Alignment(weights, device)


# Builders import inside, so that asking for colourfulness does not import open_clip.
_BUILDERS: dict[str, Callable[[str | None, torch.device], Reward]] = {
    "colourfulness": _colourfulness,
    "sharpness": _sharpness,
    "alignment": _alignment,
}


def reward_names() -> tuple[str, ...]:
    """Names that build_reward can build, in REWARD_ORDER."""
    return order_rewards(_BUILDERS)


def build_reward(spec: str, device: torch.device | str = "cpu") -> Reward:
    """The reward named by `spec`: "name", or "name=WEIGHTS" with a folder (or hub id) of weights.

    Raises ValueError for an unknown name (the nearest one is offered), for missing weights and for
    weights given to a reward that has none.
    """
    name, equals, weights = spec.partition("=")
    if name not in _BUILDERS:
        raise unknown_name("reward", name, _BUILDERS)
    if equals and not weights:
        raise ValueError(f"reward {spec!r} names no weights after '='")
    return _BUILDERS[name](weights or None, torch.device(device))


def order_rewards(names: Iterable[str]) -> tuple[str, ...]:
    """The names in REWARD_ORDER; ValueError for a name that is not in it or comes twice."""
    listed = list(names)
    for position, name in enumerate(listed):
        if name not in REWARD_ORDER:
            raise unknown_name("reward", name, REWARD_ORDER)
        if name in listed[:position]:
            raise ValueError(f"reward {name!r} is given twice in {', '.join(listed)}")
    return tuple(sorted(listed, key=REWARD_ORDER.index))


def same_sized(
    images: Sequence[Tensor], captions: Sequence[str], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batch in stacks of one size: (indices int64 (b,), pixels uint8 (b, 3, H, W)) on `device`.

    Checks what every reward expects; ValueError names the offending image.
    """
    if len(images) != len(captions):
        raise ValueError(f"got {len(images)} images but {len(captions)} captions")
    by_size: dict[torch.Size, list[int]] = {}
    for index, image in enumerate(images):
        if (
            image.dtype != torch.uint8
            or image.ndim != 3
            or image.shape[0] != 3
            or not len(image[0])
        ):
            raise ValueError(
                f"image {index}: expected uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}"
            )
        by_size.setdefault(image.shape, []).append(index)
    for indices in by_size.values():
        pixels = torch.stack([images[i] for i in indices]).to(device, non_blocking=True)
        yield torch.tensor(indices, device=device), pixels


def _refuse_weights(name: str, weights: str | None) -> None:
    if weights is not None:
        raise ValueError(f"the reward {name!r} has no weights, so ask for {name!r} alone")
