"""Rewards by name."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from miro.rewards.base import Reward, RewardOptions
from miro.utils.reward_names import order_rewards
from miro.utils.serialize import unknown_name

# Each builder is called with (weights or None, options). They are imported on use, so that a
# reward of pixels does not import open_clip and transformers.
_BUILDERS = {
    "clip": "miro.rewards.clip_family:clip",
    "aesthetic": "miro.rewards.clip_family:aesthetic",
    "image_reward": "miro.rewards.image_reward:ImageReward",
    "pick_score": "miro.rewards.clip_family:pick_score",
    "hpsv2": "miro.rewards.clip_family:hpsv2",
    "vqa": "miro.rewards.vqa:build_vqa",
    "sci_score": "miro.rewards.clip_family:sci_score",
    "colourfulness": "miro.rewards.pixels:Colourfulness",
    "sharpness": "miro.rewards.pixels:Sharpness",
}


def reward_names() -> tuple[str, ...]:
    """Names that build_reward accepts, in REWARD_ORDER."""
    return order_rewards(_BUILDERS)


def build_reward(
    spec: str, device: torch.device | str = "cpu", *, options: RewardOptions | None = None
) -> Reward:
    """Build the reward of a specification.

    Args:
        spec: "NAME", or "NAME=WEIGHTS" with a file, folder or hub id. A reward that consists of two
            models takes "NAME=FIRST,SECOND" (a head and its backbone, a network and its tokenizer);
            without SECOND it is looked for in FIRST's folder, then the published one is used. NAME
            is one of `reward_names()`, or "module:Class" of an importable class that implements
            `Reward` and is constructed as Class(weights or None, options).
        device: Device of the reward if `options` is not given.
        options: Replaces `device`.

    Raises:
        ValueError: The name is unknown, weights are missing, or the reward takes no weights.
    """
    name, equals, weights = spec.partition("=")
    if equals and not weights:
        raise ValueError(
            f"reward {spec!r} has no weights after '='; write {name!r} or {name}=WEIGHTS"
        )
    if ":" not in name and name not in _BUILDERS:
        raise unknown_name("reward", name, _BUILDERS)
    build = _import_reward(_BUILDERS.get(name, name))
    return build(weights or None, options or RewardOptions(device))


def _import_reward(path: str) -> Any:
    """The class or function "module:attribute"."""
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"reward {path!r}: {error}; give MODULE:CLASS of a module that Python can import"
        ) from error
