"""The registry of rewards: names, and what builds each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from miro.rewards.base import Reward, RewardOptions
from miro.utils.reward_names import order_rewards
from miro.utils.serialize import unknown_name

CLIP_FAMILY = ("clip", "aesthetic", "pick_score", "hpsv2", "sci_score")
"""Those of miro.rewards.clip_family."""


def _colourfulness(weights: str | None, options: RewardOptions) -> Reward:
    from miro.rewards.pixels import Colourfulness

    _refuse_weights("colourfulness", weights)
    return Colourfulness(options.device)


def _sharpness(weights: str | None, options: RewardOptions) -> Reward:
    from miro.rewards.pixels import Sharpness

    _refuse_weights("sharpness", weights)
    return Sharpness(options.device)


def _of_clip_family(name: str) -> Callable[[str | None, RewardOptions], Reward]:
    def build(weights: str | None, options: RewardOptions) -> Reward:
        from miro.rewards.clip_family import BUILDERS

        return BUILDERS[name](weights, options)

    return build


def _vqa(weights: str | None, options: RewardOptions) -> Reward:
    from miro.rewards.vqa import build_vqa

    return build_vqa(weights, options)


def _image_reward(weights: str | None, options: RewardOptions) -> Reward:
    from miro.rewards.image_reward import ImageReward

    return ImageReward(weights, options)


# Builders import inside, so that asking for colourfulness does not import open_clip.
_BUILDERS: dict[str, Callable[[str | None, RewardOptions], Reward]] = {
    **{name: _of_clip_family(name) for name in CLIP_FAMILY},
    "vqa": _vqa,
    "image_reward": _image_reward,
    "colourfulness": _colourfulness,
    "sharpness": _sharpness,
}


def reward_names() -> tuple[str, ...]:
    """Names that build_reward can build, in REWARD_ORDER."""
    return order_rewards(_BUILDERS)


def build_reward(
    spec: str, device: torch.device | str = "cpu", *, options: RewardOptions | None = None
) -> Reward:
    """The reward named by `spec`: "name", or "name=WEIGHTS" with a folder, file or hub id.

    A reward made of two things takes "name=FIRST,SECOND" (a head and the network below it, a
    network and its tokenizer). SECOND left out is looked for in FIRST's folder and, if it is not
    there, is the published one; `model` says what was taken.

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


def _refuse_weights(name: str, weights: str | None) -> None:
    if weights is not None:
        raise ValueError(f"the reward {name!r} has no weights, so ask for {name!r} alone")
