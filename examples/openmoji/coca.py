"""A small open_clip CoCa: how likely a caption is given a picture, word by word.

CoCa (arXiv 2205.01917) is CLIP with a text decoder that looks at the image. At the size and budget
of a demo a contrastive pair of towers stays a bag of words: it tells a frog from a fish, but "a
frog left of a fish" from "a fish left of a frog" by chance. The decoder reads the words in order
and is told each one it should have said, so it learns relations, colours and numbers from the same
noisy pairs. What it makes of a caption is compared with what it would say without the picture:

    r_w = log p(word w | words before, picture) − log p(word w | words before)

The second term is the same network on a picture that is not there, which training shows it now and
then. r_w is pointwise mutual information: grammar and habit cancel, what the picture says stays.
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
CELL = 8
"""Pixels of the square that one token of the image tower stands for."""


@dataclass(frozen=True)
class CaptionerConfig:
    """The network's size. Captions of up to `context` tokens, pictures of image_size squared."""

    vocabulary: tuple[int, ...]
    """open_clip's token ids that the corpus uses; the network has a row for each, and no others."""
    context: int
    image_size: int = 32
    conv_width: int = 24
    """Channels of the image tower's first convolution; four times as many leave it."""
    text_width: int = 96
    text_layers: int = 1
    decoder_layers: int = 2

    def __post_init__(self) -> None:
        if self.text_width % 32:
            raise ValueError(f"text_width must be a multiple of 32, got {self.text_width}")
        if self.image_size % CELL:
            raise ValueError(f"image_size must be a multiple of {CELL}, got {self.image_size}")


@lru_cache(maxsize=8)
def _tokenizer(context: int) -> Any:
    from open_clip import SimpleTokenizer

    return SimpleTokenizer(context_length=context)


def tokenize(captions: Sequence[str], context: int) -> Tensor:
    """(B, context) int64 ids of open_clip's own vocabulary, start and end included, 0 behind."""
    return _tokenizer(context)(list(captions))


def _grid(side: int, channels: int) -> Tensor:
    """(side², channels): rows in one half, columns in the other, as sines and cosines.

    Relations are about rows and columns, so places start alike along each.
    """
    angles = torch.arange(side)[:, None] * torch.pi / side * torch.arange(1, channels // 4 + 1)
    axis = torch.cat((angles.sin(), angles.cos()), 1)
    down = axis[:, None].expand(side, side, -1)
    across = axis[None].expand(side, side, -1)
    return torch.cat((down, across), -1).reshape(side * side, -1)


class ImageTower(nn.Module):
    """Six convolutions to one token for each cell of 8 x 8 pixels, and where the cell is.

    On tens of thousands of small pictures convolutions need fewer of them than CoCa's own vision
    transformer.
    """

    def __init__(self, image_size: int, width: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for factor, stride in ((1, 1), (2, 2), (2, 1), (4, 2), (4, 1), (4, 2)):
            after = factor * width
            layers += [
                nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
            before = after
        self.convolutions = nn.Sequential(*layers)
        self.project = nn.Linear(before, channels)
        self.places = nn.Parameter(_grid(image_size // CELL, channels))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to (B, cells, channels)."""
        cells = self.convolutions(pixels.contiguous(memory_format=torch.channels_last))
        return self.project(cells.flatten(2).transpose(1, 2)) + self.places


class Captioner(nn.Module):
    """open_clip's CoCa, its text decoder looking at the cells of a convolutional image tower."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        # Imported here: open_clip takes seconds to import.
        from open_clip.coca_model import CoCa

        self.config = config
        words = len(config.vocabulary) + RESERVED
        text = {
            "context_length": config.context,
            "vocab_size": words,
            "width": config.text_width,
            "heads": config.text_width // 32,
        }
        # Any: CoCa takes dictionaries and says it takes dataclasses.
        self.coca: Any = CoCa(
            config.text_width,
            multimodal_cfg=cast(Any, {**text, "layers": config.decoder_layers}),
            text_cfg=cast(Any, {**text, "layers": config.text_layers, "output_tokens": True}),
            # CoCa builds a vision transformer; ours takes its place.
            vision_cfg=cast(Any, {"layers": 1, "width": 64, "patch_size": 8, "image_size": 8}),
        )
        self.coca.visual = ImageTower(config.image_size, config.conv_width, config.text_width)
        self.no_picture = nn.Parameter(torch.zeros(1, 1, config.text_width))
        # open_clip leaves the decoder's output as allocated, and starts words and places so small
        # (0.02) that a short training hardly tells one from another.
        nn.init.normal_(self.coca.text_decoder.text_projection, std=config.text_width**-0.5)
        for table in (
            self.coca.text.token_embedding.weight,
            self.coca.text.positional_embedding,
        ):
            nn.init.normal_(table, std=0.5)
        rows = torch.full((49_408,), UNKNOWN)
        rows[0] = PAD
        rows[list(config.vocabulary)] = torch.arange(RESERVED, words)
        self.rows = nn.Buffer(rows, persistent=False)

    def words(self, captions: Sequence[str]) -> Tensor:
        """(B, context) int64 rows of this network's vocabulary."""
        return self.rows[tokenize(captions, self.config.context).to(self.rows.device)]

    def see(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to (B, cells, text width)."""
        pixels = images.float() / 127.5 - 1
        size = self.config.image_size
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
        return self.coca.visual(pixels)

    def log_likelihoods(self, seen: Tensor, words: Tensor) -> Tensor:
        """(B, context − 1) fp32 log-probability of each word after the first; 0 behind the end."""
        states = self.coca.text(words)[1]
        logits = self.coca.text_decoder(seen, states).float()
        said = words[:, 1:]
        found = logits.log_softmax(-1)[:, :-1].gather(-1, said[..., None])[..., 0]
        return found * (said != PAD)

    def without_picture(self, words: Tensor) -> Tensor:
        """log_likelihoods of captions when there is nothing to see."""
        return self.log_likelihoods(self.no_picture.expand(len(words), 1, -1), words)


def save_config(folder: Path, config: CaptionerConfig) -> str:
    """The text of the folder's configuration file."""
    return json.dumps({"version": 1, "architecture": "open_clip CoCa", **asdict(config)})


def load_captioner(folder: Path, device: torch.device | str = "cpu") -> Captioner:
    """The network that `miro fit-clip` wrote into `folder`, ready to score.

    Raises:
        ValueError: the folder is not one of its; the message names the file and the remedy.
    """
    remedy = f"make one with `miro fit-clip DATA {folder}`"
    try:
        record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder / CONFIG}: no such file; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: not JSON ({error}); {remedy}") from None
    known = {field.name for field in fields(CaptionerConfig)}
    if not isinstance(record, dict) or record.pop("version", None) != 1:
        raise ValueError(f"{folder / CONFIG}: not of version 1; {remedy}")
    if record.pop("architecture", None) != "open_clip CoCa" or set(record) != known:
        raise ValueError(f"{folder / CONFIG}: describes another kind of model; {remedy}")
    model = Captioner(CaptionerConfig(**{**record, "vocabulary": tuple(record["vocabulary"])}))
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / WEIGHTS}: cannot be loaded ({error}); {remedy}") from error
    return model.to(device).eval().requires_grad_(False)
