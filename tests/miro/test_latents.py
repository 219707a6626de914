"""The pixel codec, and a diffusers autoencoder with tiny random weights."""

import importlib.util
import sys

import pytest
import torch
from helpers.tiny_models import save_autoencoder

from miro.encoders.vae import build_codec

needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="the extra 'vae' is not installed"
)


def images(height: int, width: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def test_pixels_are_scaled_to_plus_and_minus_one_and_decoded_exactly():
    codec = build_codec("pixels")
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = codec.encode(every)
    assert std is None
    assert (mean.min(), mean.max()) == (-1, 1)
    assert tuple(mean.shape[1:]) == codec.latent_shape(16, 16) == (3, 16, 16)
    stored = mean.half()  # shards hold float16
    assert torch.equal((codec.decode(stored) * 255).round().byte(), every)


def test_decoded_pixels_are_clamped():
    assert build_codec("pixels").decode(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]


def test_an_unknown_codec_suggests_the_nearest_and_the_alternatives():
    with pytest.raises(ValueError, match="did you mean 'pixels'.*stabilityai/sdxl-vae"):
        build_codec("pixel")


def test_without_diffusers_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"pip install 'miro-trainer\[vae\]'"):
        build_codec("stabilityai/sdxl-vae")


@needs_diffusers
def test_autoencoder_latents_are_normalized_by_the_scaling_and_shift_factors(tmp_path):
    model = save_autoencoder(tmp_path, scaling_factor=0.3, shift_factor=0.1)
    codec = build_codec(str(tmp_path))
    uint8 = images(16, 24)
    mean, std = codec.encode(uint8)
    assert std is not None
    assert tuple(mean.shape[1:]) == codec.latent_shape(16, 24) == (4, 4, 6)
    with torch.no_grad():
        posterior = model.encode(uint8.float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(mean, (posterior.mean - 0.1) * 0.3)
    torch.testing.assert_close(std, posterior.std * 0.3)


@needs_diffusers
def test_autoencoder_decode_inverts_the_latent_normalization(tmp_path):
    model = save_autoencoder(tmp_path, scaling_factor=0.3, shift_factor=0.1)
    codec = build_codec(str(tmp_path))
    uint8 = images(16, 16)
    mean, _ = codec.encode(uint8)
    with torch.no_grad():
        z = model.encode(uint8.float() / 127.5 - 1).latent_dist.mean
        expected = (model.decode(z).sample / 2 + 0.5).clamp(0, 1)
    decoded = codec.decode(mean)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)


@needs_diffusers
def test_autoencoder_latents_are_normalized_by_per_channel_statistics(tmp_path):
    means, stds = [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 4.0, 8.0]
    model = save_autoencoder(
        tmp_path, scaling_factor=0.5, latents_mean=means, latents_std=stds, shift_factor=None
    )
    codec = build_codec(str(tmp_path))
    uint8 = images(8, 8)
    with torch.no_grad():
        z = model.encode(uint8.float() / 127.5 - 1).latent_dist.mean
    column = torch.tensor(means).view(4, 1, 1), torch.tensor(stds).view(4, 1, 1)
    torch.testing.assert_close(codec.encode(uint8)[0], (z - column[0]) * 0.5 / column[1])


@needs_diffusers
def test_autoencoder_rejects_a_size_its_factor_does_not_divide(tmp_path):
    save_autoencoder(tmp_path)
    with pytest.raises(ValueError, match="18x16 are not multiples of 4"):
        build_codec(str(tmp_path)).latent_shape(18, 16)


@needs_diffusers
def test_a_folder_without_an_autoencoder_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="could not be loaded"):
        build_codec(str(tmp_path))
