"""From prompts to pictures: Euler integration with reward guidance, targets and best of N.

    v̂ = v(s⁺, c) + ω·(v(s⁺, c) − v(s⁻, c)) + τ·(v(s⁺, c) − v(s⁺, ∅))

The first two terms are MIRO's guidance (arXiv 2510.25897, equation 3): the caption c is the same
in both branches and only the rewards asked for differ. τ is classifier-free guidance on the text
(arXiv 2207.12598), separate and optional. All branches run as one batch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from miro import checkpoint
from miro.checkpoint import CheckpointError, RunFolder
from miro.conditioning import Bins, Target, trained_rewards
from miro.config import from_dict
from miro.encoding import nearest
from miro.engine import cast_parameters
from miro.flow import FlowConfig, euler_step, euler_times, velocity
from miro.latents import LatentCodec, build_codec
from miro.model.transformer import FlowTransformer, Rewards, TextKeys
from miro.presets import TrainConfig
from miro.random import generator_from
from miro.text import PackedText, TransformersEncoder, build_text_encoder, pack

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Guidance:
    """What to ask for, what to move away from, and how hard."""

    positive: Target
    negative: Target | None = None
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

    target: Target
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


def _reward_input(branches: Sequence[_Branch], batch: int, device: torch.device) -> Rewards:
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

    return Rewards(torch.tensor(levels, device=device), repeated(index), repeated(keep))


def _stack_text(keys: TextKeys, branches: Sequence[_Branch], batch: int, tokens: int) -> TextKeys:
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
    return TextKeys(summary, keys.absent, blocks, torch.cat(ends), keys.longest)


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
    keys = _stack_text(model.read_text(text), branches, batch, len(text.states))
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


def to_bytes(pictures: Tensor) -> Tensor:
    """float (B, 3, H, W) in [0, 1] to uint8: what a file would hold and a reward reads."""
    return (pictures * 255).round().to(torch.uint8)


@dataclass
class Pipeline:
    """Averaged weights with what they need to make pictures from words."""

    model: FlowTransformer
    config: TrainConfig
    bins: Bins
    images: int
    """Images the weights were trained on."""
    text_encoder: str
    latents: str
    max_tokens: int
    """Of a caption, read in training; prompts are cut there too."""
    shapes: tuple[tuple[int, int, int], ...]
    """Of the latents it was trained on, (C, H, W)."""
    _texts: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> Pipeline:
        """From a weights folder, or from the newest weights of a run's folder.

        Raises:
            CheckpointError: there are none, or they are damaged.
        """
        folder = Path(folder)
        if not (folder / checkpoint.MANIFEST).exists():
            written = RunFolder(folder).weights_written()
            if not written:
                raise CheckpointError(
                    f"{folder} is neither a weights folder nor a run that has written weights; "
                    "give the folder `miro train` was given"
                )
            folder = written[-1][1]
        tensors, state = checkpoint.load(folder)
        config = from_dict(TrainConfig, state["config"])
        bins = Bins.from_json(json.dumps(state["bins"]), folder)
        encoding = state["encoding"]
        shape = tuple(encoding["latent_shape"])
        model = FlowTransformer(config.model, shape, encoding["text_dim"], len(bins.rewards))
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise CheckpointError(f"{folder} holds other weights than it says: {error}") from error
        model = cast_parameters(model.to(device), config.precision).eval().requires_grad_(False)
        return cls(
            model,
            config,
            bins,
            state["images"],
            text_encoder=encoding["text_encoder"],
            latents=encoding["latents"],
            max_tokens=encoding["max_tokens"],
            shapes=tuple(map(tuple, encoding.get("latent_shapes", [shape]))),
        )

    @property
    def rewards(self) -> tuple[str, ...]:
        """The rewards the network has a place for, in order."""
        return self.bins.rewards

    @cached_property
    def codec(self) -> LatentCodec:
        return build_codec(self.latents, self.model.cos.device)

    @cached_property
    def encoder(self) -> TransformersEncoder:
        device = self.model.cos.device
        return build_text_encoder(self.text_encoder, device, max_tokens=self.max_tokens)

    def shape(self, aspect: float | None = None) -> tuple[int, int, int]:
        """The trained shape whose width over height is nearest to `aspect`; the network's own."""
        if aspect is None:
            return self.model.latent_shape
        channels = self.model.latent_shape[0]
        return channels, *nearest([(height, width) for _, height, width in self.shapes], aspect)

    def target(
        self, wanted: Mapping[str, float | None] | None = None, default: float | None = 1.0
    ) -> Target:
        """What to ask for: `default` for each reward the run was trained on, but for `wanted`.

        Raises:
            ValueError: an unknown reward, one the run was not told, or a level outside 0 to 1.
        """
        trained = trained_rewards(self.config.conditioning, self.rewards).tolist()
        known = [name for name, told in zip(self.rewards, trained, strict=True) if told]
        levels = Target.of(known, wanted or {}, default).levels
        asked = dict(zip(known, levels, strict=True))
        return Target(tuple(asked.get(name) for name in self.rewards))

    def read(self, prompts: Sequence[str]) -> PackedText:
        """The prompts' states; each distinct prompt is encoded once. Says which are cut."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            for prompt, cut in zip(new, self.encoder.cut(new), strict=True):
                if cut:
                    log.warning(
                        "the prompt %.60r is longer than the %d tokens %s reads; the rest is cut",
                        prompt, self.encoder.max_tokens, self.text_encoder,
                    )  # fmt: skip
            self._texts.update(zip(new, self.encoder.encode(new), strict=True))
        return pack([self._texts[prompt] for prompt in prompts])

    def __call__(
        self,
        prompts: Sequence[str],
        guidance: Guidance,
        *,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        steps: int = 50,
        batch: int = 96,
        shape: tuple[int, int, int] | None = None,
    ) -> Tensor:
        """One picture a prompt: float32 (len(prompts), 3, H, W) in [0, 1], on the CPU.

        `numbers` say which noise of `seed` each picture starts from; 0, 1, 2, ... if not given. A
        picture depends on its prompt, number and seed alone, up to rounding. `shape` is that of the
        latents, as `self.shape(aspect)` gives it; the network's own if not given.
        """
        numbers = range(len(prompts)) if numbers is None else numbers
        device = self.model.cos.device
        limit = 1.0 if self.latents == "pixels" else None
        pictures = []
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            noise = draw_noise(shape or self.shape(), seed, numbers[part]).to(device)
            text = self.read(prompts[part]).to(device)
            latents = sample(
                self.model, self.config.flow, text, guidance, noise, steps=steps, limit=limit
            )
            pictures.append(self.codec.decode(latents).cpu())
        return torch.cat(pictures)
