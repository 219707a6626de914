"""A small open_clip CoCa: the log-likelihood of a caption given an image, token by token.

CoCa (arXiv 2205.01917) is CLIP with a text decoder that attends to the image. With the demo's size
and budget a contrastive dual encoder stays a bag of words: it distinguishes a frog from a fish, but
not "a frog left of a fish" from "a fish left of a frog". The decoder is trained on every next
token, so it learns relations, colors and counts from the same noisy pairs. Its likelihood is
compared with the unconditional one:

    r_w = log p(token w | tokens before, image) − log p(token w | tokens before)

The second term is the same network with a learned null embedding in place of the image, trained by
image dropout. r_w is pointwise mutual information: the likelihood of the grammar cancels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

CONFIG, WEIGHTS = "open_clip_config.json", "model.safetensors"
PAD, UNKNOWN, RESERVED = 0, 1, 2
OPEN_CLIP_VOCABULARY = 49_408
PATCH = 8
"""Pixels per side of an image token."""


@dataclass(frozen=True)
class CaptionerConfig:
    """Size of the network.

    Attributes:
        vocabulary: The open_clip token ids in the corpus; only these have embeddings.
        context: Tokens per caption.
        image_size: Side of the images in pixels.
        conv_width: Channels of the first convolution; the last has four times as many.
        text_width: Channels of the text encoder and decoder.
        text_layers: Layers of the text encoder.
        decoder_layers: Layers of the decoder.
    """

    vocabulary: tuple[int, ...]
    context: int
    image_size: int = 32
    conv_width: int = 24
    text_width: int = 96
    text_layers: int = 1
    decoder_layers: int = 2

    def __post_init__(self) -> None:
        for name, divisor in (("text_width", 32), ("image_size", PATCH)):
            if getattr(self, name) % divisor:
                raise ValueError(f"{name} is {getattr(self, name)}; give a multiple of {divisor}")


@lru_cache(maxsize=8)
def _tokenizer(context: int) -> Any:
    from open_clip import SimpleTokenizer

    return SimpleTokenizer(context_length=context)


def open_clip_tokens(captions: Sequence[str], context: int) -> Tensor:
    """open_clip's token ids with start and end, int64 (B, context), zero-padded."""
    return _tokenizer(context)(list(captions))


def _position_embedding(side: int, channels: int) -> Tensor:
    """Sine-cosine embedding of rows and of columns, (side², channels)."""
    angles = torch.arange(side)[:, None] * torch.pi / side * torch.arange(1, channels // 4 + 1)
    axis = torch.cat((angles.sin(), angles.cos()), 1)
    down = axis[:, None].expand(side, side, -1)
    across = axis[None].expand(side, side, -1)
    return torch.cat((down, across), -1).reshape(side * side, -1)


def conv_layers(width: int) -> list[nn.Module]:
    """Six convolutions from 3 to 4·width channels with a total stride of PATCH."""
    layers: list[nn.Module] = []
    channels = 3
    for factor, stride in ((1, 1), (2, 2), (2, 1), (4, 2), (4, 1), (4, 2)):
        layers += [
            nn.Conv2d(channels, factor * width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(factor * width),
            nn.ReLU(),
        ]
        channels = factor * width
    return layers


class ImageEncoder(nn.Module):
    """Convolutions that give one token per patch, plus a position embedding.

    They need fewer small images than CoCa's vision transformer.
    """

    def __init__(self, image_size: int, width: int, channels: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(*conv_layers(width))
        self.project = nn.Linear(4 * width, channels)
        self.places = nn.Parameter(_position_embedding(image_size // PATCH, channels))

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode (B, 3, H, W) in [-1, 1] as (B, patches, channels)."""
        patches = self.convolutions(pixels.contiguous(memory_format=torch.channels_last))
        return self.project(patches.flatten(2).transpose(1, 2)) + self.places


class Captioner(nn.Module):
    """open_clip's CoCa with a convolutional image encoder and a reduced vocabulary."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        # Imported here: open_clip takes seconds to import.
        from open_clip.coca_model import CoCa

        self.config = config
        vocabulary = len(config.vocabulary) + RESERVED
        text = {
            "context_length": config.context,
            "vocab_size": vocabulary,
            "width": config.text_width,
            "heads": config.text_width // 32,
        }
        # CoCa accepts dictionaries, but its annotations are dataclasses.
        self.coca: Any = CoCa(
            config.text_width,
            multimodal_cfg=cast(Any, {**text, "layers": config.decoder_layers}),
            text_cfg=cast(Any, {**text, "layers": config.text_layers, "output_tokens": True}),
            # A minimal vision transformer, replaced below.
            vision_cfg=cast(Any, {"layers": 1, "width": 64, "patch_size": 8, "image_size": 8}),
        )
        self.coca.visual = ImageEncoder(config.image_size, config.conv_width, config.text_width)
        self.no_picture = nn.Parameter(torch.zeros(1, 1, config.text_width))
        # open_clip leaves text_projection uninitialized; its standard deviation of 0.02 for token
        # and position embeddings is too small for a short training.
        nn.init.normal_(self.coca.text_decoder.text_projection, std=config.text_width**-0.5)
        for table in (
            self.coca.text.token_embedding.weight,
            self.coca.text.positional_embedding,
        ):
            nn.init.normal_(table, std=0.5)
        rows = torch.full((OPEN_CLIP_VOCABULARY,), UNKNOWN)
        rows[0] = PAD
        rows[list(config.vocabulary)] = torch.arange(RESERVED, vocabulary)
        self.rows = nn.Buffer(rows, persistent=False)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids of this network's vocabulary, int64 (B, context)."""
        return self.rows[open_clip_tokens(captions, self.config.context).to(self.rows.device)]

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode uint8 (B, 3, H, W) as (B, patches, text width)."""
        pixels = images.float() / 127.5 - 1
        size = self.config.image_size
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
        return self.coca.visual(pixels)

    def log_likelihoods(self, image_tokens: Tensor, tokens: Tensor) -> Tensor:
        """Log-probability of each token after the first, fp32 (B, context − 1); 0 for padding."""
        states = self.coca.text(tokens)[1]
        logits = self.coca.text_decoder(image_tokens, states).float()
        targets = tokens[:, 1:]
        found = logits.log_softmax(-1)[:, :-1].gather(-1, targets[..., None])[..., 0]
        return found * (targets != PAD)

    def unconditional_log_likelihoods(self, tokens: Tensor) -> Tensor:
        """`log_likelihoods` with the null embedding in place of an image."""
        return self.log_likelihoods(self.no_picture.expand(len(tokens), 1, -1), tokens)


def config_text(config: CaptionerConfig) -> str:
    """The content of CONFIG."""
    return json.dumps({"version": 1, "architecture": "open_clip CoCa", **asdict(config)})


def load_captioner(folder: Path, device: torch.device | str = "cpu") -> Captioner:
    """Load the network that fit-clip wrote into `folder`, in eval mode.

    Raises:
        ValueError: A file is missing, damaged or of another model.
    """
    remedy = f"write one with `python -m openmoji fit-clip DATA {folder}`"
    try:
        record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder / CONFIG}: no such file; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: not JSON ({error}); {remedy}") from None
    names = {field.name for field in fields(CaptionerConfig)}
    if not isinstance(record, dict) or record.pop("version", None) != 1:
        raise ValueError(f"{folder / CONFIG}: not of version 1; {remedy}")
    if record.pop("architecture", None) != "open_clip CoCa" or set(record) != names:
        raise ValueError(f"{folder / CONFIG}: describes another kind of model; {remedy}")
    model = Captioner(CaptionerConfig(**{**record, "vocabulary": tuple(record["vocabulary"])}))
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / WEIGHTS}: cannot be loaded ({error}); {remedy}") from error
    return model.to(device).eval().requires_grad_(False)
