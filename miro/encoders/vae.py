"""Latent codecs: images to the latents that the flow model generates, and back.

`pixels` scales pixels, for small images and machines without a GPU. Any diffusers AutoencoderKL
gives the latents of latent diffusion (the paper uses SDXL's: 4 x 32 x 32 for 256 px).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from miro.utils.serialize import unknown_name


class LatentCodec(Protocol):
    """Images to latents and back; `build_codec(codec.name)` builds it again."""

    name: str

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a height x width image; ValueError for an impossible size."""
        ...

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 (B, 3, H, W) to float32 (B, C, h, w) mean and standard deviation.

        The standard deviation is None for a deterministic codec.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Float (B, C, h, w) to float32 (B, 3, H, W) in [0, 1]."""
        ...


class PixelCodec:
    """Pixels scaled to [-1, 1]: x / 127.5 - 1."""

    name = "pixels"

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(3, height, width)."""
        return 3, height, width

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        """uint8 (B, 3, H, W) to float32 (B, 3, H, W) in [-1, 1], and None."""
        return images.float() / 127.5 - 1, None

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode` as float32 in [0, 1]; values outside [-1, 1] are clamped."""
        return ((latents.float() + 1) / 2).clamp(0, 1)


class AutoencoderCodec:
    """A diffusers AutoencoderKL with the latent normalization of its configuration.

        latent = (z - shift) * scale

    with shift_factor and scaling_factor, or latents_mean and scaling_factor / latents_std per
    channel, as diffusers' own pipelines do. The posterior's standard deviation is multiplied by
    scale.
    """

    def __init__(self, name: str, model: Any) -> None:
        self.name = name
        self._model = model
        config = model.config
        per_channel = {"device": model.device, "dtype": torch.float32}
        scale = torch.tensor(float(config.scaling_factor), **per_channel)
        shift = torch.tensor(float(config.get("shift_factor") or 0), **per_channel)
        if config.get("latents_mean") and config.get("latents_std"):
            scale = scale / torch.tensor(config.latents_std, **per_channel).view(1, -1, 1, 1)
            shift = torch.tensor(config.latents_mean, **per_channel).view(1, -1, 1, 1)
        self._scale, self._shift = scale, shift
        # Each level of the encoder but the last halves the image.
        self._factor = 2 ** (len(config.block_out_channels) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, height/f, width/f); ValueError if the downsampling factor f does not divide them."""
        if height % self._factor or width % self._factor:
            raise ValueError(
                f"latents {self.name!r}: images of {height}x{width} are not multiples of "
                f"{self._factor}; choose a size that is"
            )
        channels = int(self._model.config.latent_channels)
        return channels, height // self._factor, width // self._factor

    @torch.inference_mode()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, H, W) to float32 mean and standard deviation of the normalized posterior."""
        pixels = (images.to(self._model.device).float() / 127.5 - 1).to(self._model.dtype)
        posterior = self._model.encode(pixels).latent_dist
        mean = (posterior.mean.float() - self._shift) * self._scale
        return mean, posterior.std.float() * self._scale

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Float (B, C, h, w) to float32 (B, 3, H, W) in [0, 1], on the codec's device."""
        z = latents.to(self._model.device).float() / self._scale + self._shift
        pixels = self._model.decode(z.to(self._model.dtype)).sample.float()
        return ((pixels + 1) / 2).clamp(0, 1)


def build_codec(
    name: str, device: str | torch.device = "cpu", *, dtype: torch.dtype = torch.float32
) -> LatentCodec:
    """Load a codec.

    Args:
        name: "pixels", or a local folder or hub id of a diffusers AutoencoderKL.
        device: device to compute on.
        dtype: of the autoencoder's weights and arithmetic. SDXL's overflows in float16; bfloat16 is
            safe.

    Raises:
        ValueError: an unknown name, missing files, or diffusers is not installed.
    """
    if name == "pixels":
        return PixelCodec()
    is_folder = Path(name).is_dir()
    if not is_folder and (name.count("/") != 1 or Path(name).is_absolute()):
        raise ValueError(
            f"{unknown_name('latents', name, ['pixels'])} Or give a folder (there is none of "
            "this name) or a hub id of a diffusers AutoencoderKL such as stabilityai/sdxl-vae."
        )
    if importlib.util.find_spec("diffusers") is None:
        raise ValueError(f"latents {name!r} need diffusers: pip install 'miro-trainer[vae]'")
    # Imported late: diffusers is an extra, and takes seconds to import.
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    try:
        model: Any = AutoencoderKL.from_pretrained(
            name, local_files_only=is_folder, use_safetensors=True, torch_dtype=dtype
        )
    except OSError as error:
        raise ValueError(
            f"latents {name!r} could not be loaded: {error}\nGive 'pixels', a folder with "
            "config.json and diffusion_pytorch_model.safetensors, or a hub id"
        ) from error
    return AutoencoderCodec(name, model.eval().requires_grad_(False).to(device))
