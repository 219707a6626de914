"""Names of the rewards and their order, which checkpoints depend on."""

from __future__ import annotations

from collections.abc import Iterable

from miro.utils.serialize import unknown_name

# The seven of the paper in its order, then those that need no published weights.
# The rows of a checkpoint's reward tables follow this order: append to it, never reorder it.
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
)


def reward_position(name: str) -> tuple[int, str]:
    """Return a sort key: names of REWARD_ORDER in that order, then custom rewards by name."""
    return (REWARD_ORDER.index(name) if name in REWARD_ORDER else len(REWARD_ORDER), name)


def order_rewards(names: Iterable[str]) -> tuple[str, ...]:
    """Sort names by REWARD_ORDER.

    Raises:
        ValueError: a name is not in REWARD_ORDER or is repeated.
    """
    listed = list(names)
    for position, name in enumerate(listed):
        if name not in REWARD_ORDER:
            raise unknown_name("reward", name, REWARD_ORDER)
        if name in listed[:position]:
            raise ValueError(f"reward {name!r} is given twice in {', '.join(listed)}")
    return tuple(sorted(listed, key=REWARD_ORDER.index))
