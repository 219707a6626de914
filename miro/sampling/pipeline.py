"""Pipeline: EMA weights with the encoders needed to sample images from prompts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from miro.conditioning import Bins, RewardTarget, conditioned_rewards
from miro.encoders.text import TransformersEncoder, build_text_encoder
from miro.encoders.vae import LatentCodec, build_codec
from miro.images.buckets import nearest_bucket
from miro.model.packed_text import PackedText, pack
from miro.model.transformer import FlowTransformer
from miro.sampling.sampler import Guidance, draw_noise, sample
from miro.training import checkpoint
from miro.training.checkpoint import CheckpointError
from miro.training.config import TrainConfig
from miro.training.engine import cast_parameters
from miro.utils.serialize import from_dict

log = logging.getLogger(__name__)


def to_bytes(images: Tensor) -> Tensor:
    """Float images in [0, 1] to uint8, as an image file holds them and rewards score them."""
    return (images * 255).round().to(torch.uint8)


@dataclass
class Pipeline:
    """EMA weights with the frozen encoders and bins needed to sample images from prompts."""

    model: FlowTransformer
    config: TrainConfig
    bins: Bins
    images: int
    """Number of images the weights were trained on."""
    text_encoder: str
    latents: str
    max_tokens: int
    """Captions were truncated to this length in training, and prompts are too."""
    shapes: tuple[tuple[int, int, int], ...]
    """Latent shapes (C, H, W) of the training buckets."""
    _text_cache: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> Pipeline:
        """Load a weights folder, or the newest weights of a run's folder.

        Raises:
            CheckpointError: there are no weights, or they are damaged.
        """
        folder = checkpoint.newest_weights(Path(folder))
        tensors, state = checkpoint.load(folder)
        config = from_dict(TrainConfig, state["config"])
        bins = Bins.from_json(json.dumps(state["bins"]), folder)
        encoding = state["encoding"]
        shape = tuple(encoding["latent_shape"])
        model = FlowTransformer(config.model, shape, encoding["text_dim"], len(bins.rewards))
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise CheckpointError(
                f"{folder}: the weights do not match the configuration saved with them: {error}"
            ) from error
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
        """The network's reward slots, in order."""
        return self.bins.rewards

    @cached_property
    def codec(self) -> LatentCodec:
        """The latent codec of the training data, loaded at first use."""
        return build_codec(self.latents, self.model.cos.device)

    @cached_property
    def encoder(self) -> TransformersEncoder:
        """The text encoder of the training data, loaded at first use."""
        device = self.model.cos.device
        return build_text_encoder(self.text_encoder, device, max_tokens=self.max_tokens)

    def shape(self, aspect: float | None = None) -> tuple[int, int, int]:
        """The training bucket with width / height nearest to `aspect`; None: the reference grid."""
        if aspect is None:
            return self.model.latent_shape
        channels = self.model.latent_shape[0]
        return channels, *nearest_bucket(
            [(height, width) for _, height, width in self.shapes], aspect
        )

    def target(
        self, levels: Mapping[str, float | None] | None = None, default: float | None = 1.0
    ) -> RewardTarget:
        """A target with `levels` by name, and `default` for the other rewards conditioned on.

        Raises:
            ValueError: a reward the run is not conditioned on, or a level outside 0 to 1.
        """
        active = conditioned_rewards(self.config.conditioning, self.rewards).tolist()
        names = [name for name, on in zip(self.rewards, active, strict=True) if on]
        target = RewardTarget.from_dict(names, levels or {}, default)
        by_name = dict(zip(names, target.levels, strict=True))
        return RewardTarget(tuple(by_name.get(name) for name in self.rewards))

    def guidance(
        self,
        positive: Mapping[str, float | None],
        negative: Mapping[str, float | None] | None = None,
        reward_scale: float = 0.0,
        text_scale: float = 0.0,
    ) -> Guidance:
        """Guidance from levels by name; s⁺ is 1 and s⁻ is 0 for rewards not named."""
        s_negative = self.target(negative, default=0.0) if reward_scale else None
        return Guidance(self.target(positive), s_negative, reward_scale, text_scale)

    def encode_prompts(self, prompts: Sequence[str]) -> PackedText:
        """Token states of the prompts, cached; warns once about each prompt that is truncated."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text_cache]
        if new:
            for prompt, cut in zip(new, self.encoder.cut(new), strict=True):
                if cut:
                    log.warning(
                        "the prompt %.60r is longer than the %d tokens %s takes and is truncated",
                        prompt, self.encoder.max_tokens, self.text_encoder,
                    )  # fmt: skip
            self._text_cache.update(zip(new, self.encoder.encode(new), strict=True))
        return pack([self._text_cache[prompt] for prompt in prompts])

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
        """Sample one image per prompt.

        An image depends on its prompt, seed and noise number alone (up to rounding), not on the
        batch it is sampled in.

        Args:
            prompts: one per image.
            guidance: targets and scales, from `self.guidance`.
            seed: seed of the noise.
            numbers: noise number of each image; None: 0, 1, 2, …
            steps: Euler steps.
            batch: images sampled at a time.
            shape: of the latents, as from `self.shape`; None: the reference grid.

        Returns:
            (len(prompts), 3, H, W) fp32 in [0, 1], on the CPU.
        """
        numbers = range(len(prompts)) if numbers is None else numbers
        device = self.model.cos.device
        clip_range = 1.0 if self.latents == "pixels" else None
        images = []
        for start in range(0, len(prompts), batch):
            chunk = slice(start, start + batch)
            noise = draw_noise(shape or self.shape(), seed, numbers[chunk]).to(device)
            text = self.encode_prompts(prompts[chunk]).to(device)
            latents = sample(
                self.model, self.config.flow, text, guidance, noise,
                steps=steps, clip_range=clip_range,
            )  # fmt: skip
            images.append(self.codec.decode(latents).cpu())
        return torch.cat(images)
