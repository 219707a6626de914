"""What a reward is, which ones exist, and the one order in which every room lists them.

A reward gives a picture (and perhaps its caption) one number on a scale of its own. Nothing here
normalises it: scores are stored raw and binned later over the whole dataset (miro.conditioning).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from miro.config import unknown_name
from miro.rewards.pictures import check_picture

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

    name: column name of the score; one of REWARD_ORDER, or a name of its own.
    model: what computes it, as the dataset's manifest records it: an architecture and its weights.
    reads_caption: False if the score depends on the image alone.
    range: nominal lowest and highest raw score, for the axes of plots; not a clamp.
    """

    name: str
    model: str
    reads_caption: bool
    range: tuple[float, float]

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """Raw scores, float32 (B,), on the reward's device; NaN where a score is not known.

        images: B tensors uint8 (3, H, W), whose sizes may differ; where they are Pictures, squares
        made of them are shared with other rewards. captions: B strings. The score of a pair does
        not depend on what else is in the batch.
        """
        ...


@dataclass(frozen=True)
class RewardOptions:
    """How rewards compute; `device` may be a torch.device or its name."""

    device: torch.device | str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"  # of the networks' weights and arithmetic
    compile: bool = False  # the networks by torch.compile
    batch_size: int = 64  # pairs, or pictures, of one forward pass; less where memory ends
    allow_code: bool = False  # run Python code that comes with a model's weights

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def _colourfulness(weights: str | None, options: RewardOptions) -> Reward:
    from miro.rewards.pixels import Colourfulness

    _refuse_weights("colourfulness", weights)
    return Colourfulness(options.device)


def _sharpness(weights: str | None, options: RewardOptions) -> Reward:
    from miro.rewards.pixels import Sharpness

    _refuse_weights("sharpness", weights)
    return Sharpness(options.device)


def _alignment(weights: str | None, options: RewardOptions) -> Reward:
    from miro.rewards.alignment import Alignment

    if weights is None:
        raise ValueError(
            "the reward 'alignment' needs a fitted CLIP: make one with 'miro fit-clip DATA FOLDER' "
            "and ask for 'alignment=FOLDER'"
        )
    return Alignment(weights, options.device)


# Builders import inside, so that asking for colourfulness does not import open_clip.
_BUILDERS: dict[str, Callable[[str | None, RewardOptions], Reward]] = {
    "colourfulness": _colourfulness,
    "sharpness": _sharpness,
    "alignment": _alignment,
}


def reward_names() -> tuple[str, ...]:
    """Names that build_reward can build, in REWARD_ORDER."""
    return order_rewards(_BUILDERS)


def build_reward(
    spec: str, device: torch.device | str = "cpu", *, options: RewardOptions | None = None
) -> Reward:
    """The reward named by `spec`: "name", or "name=WEIGHTS" with a folder, file or hub id.

    A reward of a user's own is "module:Class" or "module:Class=WEIGHTS": a class of the Reward
    protocol in an importable module, built as Class(weights or None, options). `options` takes the
    place of `device`.

    Raises ValueError for an unknown name (the nearest one is offered), for missing weights and for
    weights given to a reward that has none.
    """
    name, equals, weights = spec.partition("=")
    if equals and not weights:
        raise ValueError(f"reward {spec!r} names no weights after '='")
    options = RewardOptions(device) if options is None else options
    if ":" in name:
        return _users_own(name)(weights or None, options)
    if name not in _BUILDERS:
        raise unknown_name("reward", name, _BUILDERS)
    return _BUILDERS[name](weights or None, options)


def _users_own(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"reward {name!r}: {error}; give MODULE:CLASS of a module that Python can import"
        ) from error


def reward_position(name: str) -> tuple[int, str]:
    """Sorts the names of REWARD_ORDER in that order, and a user's own after them by name."""
    return (REWARD_ORDER.index(name) if name in REWARD_ORDER else len(REWARD_ORDER), name)


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
        check_picture(index, image)
        by_size.setdefault(image.shape, []).append(index)
    for indices in by_size.values():
        pixels = torch.stack([images[i] for i in indices]).to(device, non_blocking=True)
        yield torch.tensor(indices, device=device), pixels


def _refuse_weights(name: str, weights: str | None) -> None:
    if weights is not None:
        raise ValueError(f"the reward {name!r} has no weights, so ask for {name!r} alone")
