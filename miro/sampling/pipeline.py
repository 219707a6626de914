"""Pipeline: EMA weights with the encoders needed to sample images from prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from miro.conditioning import Bins, RewardTarget, conditioned_rewards
from miro.encoders.text import TransformersEncoder, build_text_encoder
from miro.encoders.vae import LatentCodec, build_codec
from miro.images.buckets import nearest
from miro.model.packed_text import PackedText, pack
from miro.model.transformer import FlowTransformer
from miro.sampling.sampler import (
    Guidance,
    draw_noise,
    log,
    sample,
)
from miro.training import checkpoint
from miro.training.checkpoint import CheckpointError, RunFolder
from miro.training.config import TrainConfig
from miro.training.engine import cast_parameters
from miro.utils.serialize import from_dict


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
    ) -> RewardTarget:
        """What to ask for: `default` for each reward the run was trained on, but for `wanted`.

        Raises:
            ValueError: an unknown reward, one the run was not told, or a level outside 0 to 1.
        """
        trained = conditioned_rewards(self.config.conditioning, self.rewards).tolist()
        known = [name for name, told in zip(self.rewards, trained, strict=True) if told]
        levels = RewardTarget.of(known, wanted or {}, default).levels
        asked = dict(zip(known, levels, strict=True))
        return RewardTarget(tuple(asked.get(name) for name in self.rewards))

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
                self.model, self.config.flow, text, guidance, noise, steps=steps, clip_range=limit
            )
            pictures.append(self.codec.decode(latents).cpu())
        return torch.cat(pictures)
