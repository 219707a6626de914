"""Sampling: Euler integration of the flow with reward and text guidance, and best of N.

    v̂ = v(s⁺, c) + ω·(v(s⁺, c) − v(s⁻, c)) + τ·(v(s⁺, c) − v(s⁺, ∅))

The first two terms are MIRO's guidance (arXiv 2510.25897, equation 3): both branches have the
caption c and differ in their reward targets s⁺ and s⁻. The last is classifier-free guidance on the
text (arXiv 2207.12598), optional and separate. All branches are evaluated as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miro.conditioning import RewardTarget
from miro.flow import FlowConfig, euler_step, euler_timesteps, velocity
from miro.model.packed_text import PackedText
from miro.model.transformer import ContextKV, FlowTransformer, RewardCond
from miro.utils.rng import generator_from


@dataclass(frozen=True)
class Guidance:
    """Reward targets and guidance scales of a sampling run."""

    positive: RewardTarget
    """s⁺."""
    negative: RewardTarget | None = None
    """s⁻; required where reward_scale is not zero."""
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
    """One evaluation of the network per step: its conditions, and its weight in the guided sum."""

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


def _reward_cond(branches: Sequence[_Branch], batch: int, device: torch.device) -> RewardCond:
    """Reward conditions of all branches, as indices into the distinct levels that occur."""
    targets = [branch.target.levels for branch in branches]
    levels = sorted({v for row in targets for v in row if v is not None} or {0.0})
    # Without rewards the lists are empty, and torch would make them float tensors.
    bins = torch.tensor(
        [[0 if v is None else levels.index(v) for v in row] for row in targets], dtype=torch.int64
    )
    keep = torch.tensor([[v is not None for v in row] for row in targets], dtype=torch.bool)

    def repeat(rows: Tensor) -> Tensor:
        return rows.reshape(len(branches), -1).repeat_interleave(batch, 0).to(device)

    return RewardCond(torch.tensor(levels, device=device), repeat(bins), repeat(keep))


def _repeat_context(
    context: ContextKV, branches: Sequence[_Branch], batch: int, tokens: int
) -> ContextKV:
    """The prompts' context once per captioned branch, and empty texts for the others."""
    copies = sum(branch.captioned for branch in branches)
    offsets, start = [context.offsets[:1]], 0
    for branch in branches:
        # Equal offsets are texts of length zero.
        ends = context.offsets[1:] if branch.captioned else context.offsets.new_zeros(batch)
        offsets.append(ends + start)
        start += tokens if branch.captioned else 0
    null_summary = context.null_summary
    summary = torch.cat(
        [context.summary if b.captioned else null_summary.expand(batch, -1) for b in branches]
    )
    kv = [(k.repeat(copies, 1, 1), v.repeat(copies, 1, 1)) for k, v in context.kv]
    return ContextKV(summary, null_summary, kv, torch.cat(offsets), context.longest)


@torch.no_grad()
def sample(
    model: FlowTransformer,
    flow: FlowConfig,
    text: PackedText,
    guidance: Guidance,
    noise: Tensor,
    *,
    steps: int = 50,
    clip_range: float | None = None,
    network: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Integrate noise to latents.

    Args:
        model: the network, in the dtype it computes in.
        flow: what the network predicts.
        text: states of B prompts.
        guidance: targets and scales.
        noise: (B, C, H, W) fp32, x at t = 1.
        steps: Euler steps from t = 1 to 0.
        clip_range: clamp the predicted clean sample to ±clip_range (1 for pixels, None for
            latents).
        network: a compiled form of `model`, if there is one.

    Returns:
        (B, C, H, W) fp32 latents.

    Raises:
        ValueError: `text` and `noise` differ in batch size, or `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"sampling takes at least 1 step, got {steps}")
    batch = len(noise)
    if len(text) != batch:
        raise ValueError(f"sampling: {len(text)} texts for a batch of {batch} noises")
    branches = _branches(guidance)
    context = _repeat_context(model.encode_context(text), branches, batch, len(text.states))
    rewards = _reward_cond(branches, batch, noise.device)
    weights = torch.tensor([branch.weight for branch in branches], device=noise.device)
    # `network or model` would call `__len__` on an `OptimizedModule`, hence `is None`.
    predict = model if network is None else network
    x, times = noise, euler_timesteps(steps).to(noise.device)
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        x_t = x.repeat(len(branches), 1, 1, 1)
        t_batch = t.expand(len(x_t))
        prediction = predict(x_t, t_batch, rewards, context)
        v = velocity(flow, prediction, x_t, t_batch).unflatten(0, (len(branches), batch))
        x = euler_step(x, torch.einsum("k,kbchw->bchw", weights, v), t, t_next, clip_range)
    return x


def draw_noise(shape: tuple[int, int, int], seed: int, numbers: Sequence[int]) -> Tensor:
    """(B, C, H, W) standard normal noise; equal (seed, number) give equal noise in any batch."""
    return torch.stack(
        [torch.randn(shape, generator=generator_from(seed, "noise", n)) for n in numbers]
    )


def best_of(scores: Tensor, count: int) -> Tensor:
    """(B,) index of the highest of each `count` adjacent scores (B · count,); NaN never wins."""
    rows = scores.nan_to_num(nan=-torch.inf).reshape(-1, count)
    return rows.argmax(1) + torch.arange(len(rows)) * count
