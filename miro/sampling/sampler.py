"""From prompts to images: Euler integration with reward guidance, targets and best of N.

    v̂ = v(s⁺, c) + ω·(v(s⁺, c) − v(s⁻, c)) + τ·(v(s⁺, c) − v(s⁺, ∅))

The first two terms are MIRO's guidance (arXiv 2510.25897, equation 3): the caption c is the same
in both branches and only the rewards asked for differ. τ is classifier-free guidance on the text
(arXiv 2207.12598), separate and optional. All branches run as one batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miro.conditioning import RewardTarget
from miro.flow import FlowConfig, euler_step, euler_times, velocity
from miro.model.packed_text import PackedText
from miro.model.transformer import ContextKV, FlowTransformer, RewardCond
from miro.utils.rng import generator_from

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Guidance:
    """What to ask for, what to move away from, and how hard."""

    positive: RewardTarget
    negative: RewardTarget | None = None
    """s⁻; needed where reward_scale is not zero."""
    reward_scale: float = 0.0
    """ω of equation 3. The paper's best range at full size is 5 to 7."""
    text_scale: float = 0.0
    """τ; 0 samples without text guidance."""

    def __post_init__(self) -> None:
        if self.reward_scale and self.negative is None:
            raise ValueError(
                f"reward guidance of scale {self.reward_scale} needs a negative target to move "
                "away from; give one, or set the scale to 0"
            )


@dataclass(frozen=True)
class _Branch:
    """One evaluation of the network a step: which rewards, whether the caption, and its weight."""

    target: RewardTarget
    captioned: bool
    weight: float


def _branches(guidance: Guidance) -> list[_Branch]:
    reward, text = guidance.reward_scale, guidance.text_scale
    branches = [_Branch(guidance.positive, True, 1 + reward + text)]
    if reward:
        assert guidance.negative is not None
        branches.append(_Branch(guidance.negative, True, -reward))
    if text:
        branches.append(_Branch(guidance.positive, False, -text))
    return branches


def _reward_input(branches: Sequence[_Branch], batch: int, device: torch.device) -> RewardCond:
    """Each branch's levels as an index into the distinct levels that occur."""
    asked = [[level for level in branch.target.levels] for branch in branches]
    levels = sorted({level for row in asked for level in row if level is not None} or {0.0})
    # Typed, because of no rewards torch would make floating-point numbers.
    index = torch.tensor(
        [[0 if v is None else levels.index(v) for v in row] for row in asked], dtype=torch.int64
    )
    keep = torch.tensor([[v is not None for v in row] for row in asked], dtype=torch.bool)

    def repeated(rows: Tensor) -> Tensor:
        return rows.reshape(len(branches), -1).repeat_interleave(batch, 0).to(device)

    return RewardCond(torch.tensor(levels, device=device), repeated(index), repeated(keep))


def _stack_text(keys: ContextKV, branches: Sequence[_Branch], batch: int, tokens: int) -> ContextKV:
    """The prompts' keys once for each branch that reads them, and no text for the others."""
    copies = sum(branch.captioned for branch in branches)
    ends, start = [keys.offsets[:1]], 0
    for branch in branches:
        # Offsets that do not advance are texts of length zero.
        own = keys.offsets[1:] if branch.captioned else keys.offsets.new_zeros(batch)
        ends.append(own + start)
        start += tokens if branch.captioned else 0
    summary = torch.cat(
        [keys.summary if b.captioned else keys.absent.expand(batch, -1) for b in branches]
    )
    blocks = [(k.repeat(copies, 1, 1), v.repeat(copies, 1, 1)) for k, v in keys.blocks]
    return ContextKV(summary, keys.absent, blocks, torch.cat(ends), keys.longest)


@torch.no_grad()
def sample(
    model: FlowTransformer,
    flow: FlowConfig,
    text: PackedText,
    guidance: Guidance,
    noise: Tensor,
    *,
    steps: int = 50,
    limit: float | None = None,
    network: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Integrate noise to latents.

    Args:
        model: the network, in the dtype it computes in.
        flow: what its output means.
        text: states of B prompts.
        guidance: targets and scales.
        noise: (B, C, H, W) fp32, the start.
        steps: Euler steps from t = 1 to 0.
        limit: bound of the data where it has one (1 for pixels, None for latents).
        network: a compiled form of `model`, where there is one.

    Returns:
        (B, C, H, W) fp32 latents.

    Raises:
        ValueError: sizes do not fit, or no step is asked for.
    """
    if steps < 1:
        raise ValueError(f"sampling takes at least 1 step, got {steps}")
    batch = len(noise)
    if len(text) != batch:
        raise ValueError(f"sampling: {len(text)} texts for {batch} noises")
    branches = _branches(guidance)
    keys = _stack_text(model.encode_context(text), branches, batch, len(text.states))
    rewards = _reward_input(branches, batch, noise.device)
    weights = torch.tensor([branch.weight for branch in branches], device=noise.device)
    # A compiled module is asked for its length where it is taken for a truth.
    predict = model if network is None else network
    x, times = noise, euler_times(steps).to(noise.device)
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        stacked = x.repeat(len(branches), 1, 1, 1)
        now = t.expand(len(stacked))
        prediction = predict(stacked, now, rewards, keys)
        v = velocity(flow, prediction, stacked, now).unflatten(0, (len(branches), batch))
        x = euler_step(x, torch.einsum("k,kbchw->bchw", weights, v), t, t_next, limit)
    return x


def draw_noise(shape: tuple[int, int, int], seed: int, numbers: Sequence[int]) -> Tensor:
    """(B, C, H, W) noise: a number of a seed is the same noise in every batch and model."""
    return torch.stack(
        [torch.randn(shape, generator=generator_from(seed, "noise", n)) for n in numbers]
    )


def best_of(scores: Tensor, count: int) -> Tensor:
    """(B,) the index of the best of each prompt's `count` images, which lie side by side.

    Args:
        scores: (B·count,) scores of the images by the reward that chooses; NaN is never chosen.
    """
    rows = scores.nan_to_num(nan=-torch.inf).reshape(-1, count)
    return rows.argmax(1) + torch.arange(len(rows)) * count
