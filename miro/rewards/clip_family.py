"""The five published rewards that compare the embeddings of a dual encoder.

| name       | network                                    | score                                |
|------------|--------------------------------------------|--------------------------------------|
| clip       | jina-clip-v2, or any CLIP                  | exp(logit_scale)·cos / 100           |
| aesthetic  | OpenAI's CLIP ViT-L/14 and a linear head   | about 1 to 10; ignores the caption   |
| pick_score | PickScore v1, a CLIP-H (arXiv 2305.01569)  | exp(logit_scale)·cos / 100           |
| hpsv2      | HPSv2 or v2.1, a CLIP-H (arXiv 2306.09341) | cos                                  |
| sci_score  | SciScore, a CLIP-H (arXiv 2504.13129)      | exp(logit_scale)·cos / 100           |

Scores are raw. The released MIRO stores the aesthetic score divided by 10; the ranks, which are all
that training uses, are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from miro.images.transforms import ImageTransform, normalize
from miro.rewards.base import Reward, RewardOptions, check_lengths
from miro.rewards.clip_models import (
    CLIP_TOKENIZER,
    CONFIGS,
    JINA_CLIP,
    OPEN_CLIP,
    DualEncoder,
    load_dual_encoder,
    load_open_clip,
    load_transformers_clip,
)
from miro.rewards.network import DualEncoderReward
from miro.rewards.weights import load_tensors, resolve_file, split_weights

OPENAI_L14 = f"{OPEN_CLIP}ViT-L-14-quickgelu/openai"
PICK_SCORE = f"yuvalkirstain/PickScore_v1,{CLIP_TOKENIZER}"
SCI_SCORE = "Jialuo21/SciScore"
HPS, HPS_ARCHITECTURE = "xswu/HPSv2", "ViT-H-14"
HPS_FILES = ("HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt")
"""v2.1 first: the paper scores training data with it."""
AESTHETIC_HEAD = "sac+logos+ava1-l14-linearMSE.pth"
AESTHETIC_URL = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
AESTHETIC_LAYERS = (0, 2, 4, 6, 7)
"""Indices of the linear layers in the published nn.Sequential; the others are dropout."""


class PretrainedReward(DualEncoderReward):
    """Unit embeddings of a pretrained DualEncoder, normalized in fp32."""

    def __init__(self, encoder: DualEncoder, options: RewardOptions) -> None:
        super().__init__(encoder.network, options)
        self.model, self.transform = encoder.model, encoder.transform
        self._encoder = encoder
        self._encode_image = self.maybe_compile(encoder.encode_image)

    def embed_images(self, images: Tensor) -> Tensor:
        """See `DualEncoderReward.embed_images`."""
        encoder = self._encoder
        pixels = normalize(images, self.options.dtype, encoder.mean, encoder.std)
        return F.normalize(self._encode_image(pixels).float(), dim=-1)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """See `DualEncoderReward.embed_captions`."""
        tokens = (tensor.to(self.device) for tensor in self._encoder.tokenize(list(captions)))
        return F.normalize(self._encoder.encode_text(*tokens).float(), dim=-1)


class CosineSimilarity(PretrainedReward):
    """`scale` times the cosine of the embeddings of an image and of its caption."""

    reads_caption = True

    def __init__(
        self, name: str, encoder: DualEncoder, options: RewardOptions, *, scale: float
    ) -> None:
        super().__init__(encoder, options)
        self.name, self.scale = name, scale

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """See `Reward.score`."""
        return self.scale * self.similarity(images, captions)


class Aesthetic(PretrainedReward):
    """Predicted human rating of an image, about 1 to 10, regardless of the caption.

    The published head is five linear layers over CLIP's unit embedding without activations, so they
    are merged into one: score = w·embedding + b, in fp32.
    Source: github.com/christophschuhmann/improved-aesthetic-predictor.
    """

    name = "aesthetic"
    reads_caption = False

    def __init__(self, head: Path, encoder: DualEncoder, options: RewardOptions) -> None:
        """head: the published file. encoder: its text encoder is not used."""
        super().__init__(encoder, options)
        self.model = f"{head.name} on {encoder.model}"
        self._weight, self._bias = load_aesthetic_head(head)

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """See `Reward.score`."""
        check_lengths(images, captions)
        if not len(images):
            return torch.empty(0, device=self.device)
        embedded = self.image_embeddings(images)
        if embedded.shape[1] != len(self._weight):
            raise ValueError(
                f"{self.model}: the head expects embeddings of {len(self._weight)}, the network's "
                f"have {embedded.shape[1]}; give it OpenAI's CLIP ViT-L/14"
            )
        return embedded @ self._weight.to(embedded.device) + self._bias


def load_aesthetic_head(path: Path) -> tuple[Tensor, float]:
    """The published head merged into one linear layer.

    Returns:
        Weight float32 (width,) and bias.

    Raises:
        ValueError: The file is damaged or has other keys.
    """
    state = load_tensors(path)
    expected = [f"layers.{i}.{part}" for i in AESTHETIC_LAYERS for part in ("weight", "bias")]
    if set(state) != set(expected):
        raise ValueError(f"{path}: keys {sorted(state)}, not those of {AESTHETIC_HEAD}: {expected}")
    weight, bias = state["layers.0.weight"].double(), state["layers.0.bias"].double()
    for index in AESTHETIC_LAYERS[1:]:
        layer = state[f"layers.{index}.weight"].double()
        weight, bias = layer @ weight, layer @ bias + state[f"layers.{index}.bias"].double()
    return weight[0].float(), bias.item()


def clip(weights: str | None, options: RewardOptions) -> Reward:
    """Build CLIPScore of any network of `load_dual_encoder`.

    The default is jina-clip-v2 if `options` allow code, OpenAI's CLIP ViT-L/14 if not.
    """
    (name,) = split_weights(weights, 1)
    name = name or (JINA_CLIP if options.allow_code else OPENAI_L14)
    encoder = load_dual_encoder(name, allow_code=options.allow_code)
    return CosineSimilarity("clip", encoder, options, scale=encoder.scale / 100)


def aesthetic(weights: str | None, options: RewardOptions) -> Reward:
    """Build the aesthetic predictor from HEAD or HEAD,CLIP.

    HEAD is the head's file or its folder; CLIP any network of `load_dual_encoder`, by default the
    one in HEAD's folder, or else OpenAI's CLIP ViT-L/14.
    """
    head, network = split_weights(weights, 2)
    remedy = f"run `curl -L -o '{AESTHETIC_HEAD}' {AESTHETIC_URL}`"
    if head is None:
        raise ValueError(f"the reward 'aesthetic' needs {AESTHETIC_HEAD}; {remedy}")
    if not Path(head).exists():
        raise ValueError(f"aesthetic: {head!r} is neither a file nor a folder; {remedy}")
    path = Path(head)
    if path.is_dir():
        path = path / AESTHETIC_HEAD
        if not path.is_file():
            raise ValueError(f"{path}: no such file; {remedy}")
        has_clip = any((path.parent / name).is_file() for name in CONFIGS[:2])
        network = network or (head if has_clip else None)
    return Aesthetic(path, load_dual_encoder(network or OPENAI_L14, captions=False), options)


def hpsv2(weights: str | None, options: RewardOptions) -> Reward:
    """Build HPSv2 from the file of either version, or a folder or hub id; v2.1 is preferred.

    HPSv2 letterboxes the image on black, where other CLIPs crop its center. The package hpsv2
    resizes in floats; here resized images are uint8, up to one grey level different.
    """
    (name,) = split_weights(weights, 1)
    file = resolve_file(name or HPS, HPS_FILES, HPS)
    encoder = load_open_clip(f"{OPEN_CLIP}{HPS_ARCHITECTURE}/{file}")
    encoder = replace(
        encoder,
        model=f"open_clip {HPS_ARCHITECTURE}, {file.name}",
        transform=ImageTransform(encoder.transform.size, "letterbox"),
    )
    return CosineSimilarity("hpsv2", encoder, options, scale=1.0)


def _build_fine_tuned(
    name: str, published: str, weights: str | None, options: RewardOptions
) -> Reward:
    """Build a fine-tuned CLIP-H from NETWORK or NETWORK,TOKENIZER, each a folder or hub id."""
    network, tokenizer = split_weights(weights or published, 2)
    if network is None:
        raise ValueError(f"{name}={weights} names a tokenizer and no network")
    encoder = load_transformers_clip(network, tokenizer)
    return CosineSimilarity(name, encoder, options, scale=encoder.scale / 100)


pick_score = partial(_build_fine_tuned, "pick_score", PICK_SCORE)
sci_score = partial(_build_fine_tuned, "sci_score", SCI_SCORE)
