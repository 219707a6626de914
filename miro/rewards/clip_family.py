"""The five published rewards that are two towers, one for pictures and one for captions.

| name       | network                                    | score                                |
|------------|--------------------------------------------|--------------------------------------|
| clip       | jina-clip-v2, or any CLIP                  | exp(logit_scale)·cos / 100           |
| aesthetic  | OpenAI's CLIP ViT-L/14 and a linear head   | about 1 to 10; reads no caption      |
| pick_score | PickScore v1, a CLIP-H (arXiv 2305.01569)  | exp(logit_scale)·cos / 100           |
| hpsv2      | HPSv2 or v2.1, a CLIP-H (arXiv 2306.09341) | cos                                  |
| sci_score  | SciScore, a CLIP-H (arXiv 2504.13129)      | exp(logit_scale)·cos / 100           |

Scores are raw. The released MIRO stores the aesthetic score divided by 10; ranks, which is all that
training sees, are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from miro.images.transforms import ImageTransform, normalised
from miro.rewards.base import Reward, RewardOptions
from miro.rewards.clip_models import (
    CLIP_TOKENIZER,
    CODED,
    OPEN_CLIP,
    Towers,
    open_clip_towers,
    open_towers,
    transformers_towers,
)
from miro.rewards.network import DualEncoderReward
from miro.rewards.weights import find_file, load_tensors, parts

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
"""The linear layers' places in the published head; dropout stood at the others."""


class PretrainedTowers(DualEncoderReward):
    """Embeddings by towers of any library, brought to length 1 in fp32."""

    def __init__(self, towers: Towers, options: RewardOptions) -> None:
        super().__init__(towers.network, options)
        self.model, self.view = towers.model, towers.view
        self._towers = towers
        self._see = self.compiled(towers.see)

    def embed_pictures(self, squares: Tensor) -> Tensor:
        """uint8 (n, 3, size, size) on the device to float32 (n, width), of length 1."""
        towers = self._towers
        pixels = normalised(squares, self.options.dtype, towers.mean, towers.std)
        return F.normalize(self._see(pixels).float(), dim=-1)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """float32 (m, width), of length 1, on the device."""
        tokens = (part.to(self.device) for part in self._towers.tokens(list(captions)))
        return F.normalize(self._towers.read(*tokens).float(), dim=-1)


class Similarity(PretrainedTowers):
    """`scale` times the cosine between the embeddings of a picture and of its caption."""

    reads_caption = True

    def __init__(
        self,
        name: str,
        towers: Towers,
        options: RewardOptions,
        *,
        scale: float,
        cosines: tuple[float, float],
    ) -> None:
        """cosines: nominal lowest and highest cosine, of which `range` is made."""
        super().__init__(towers, options)
        self.name = name
        self.scale = scale
        self.range = (scale * cosines[0], scale * cosines[1])

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """float32 (B,)."""
        return self.scale * self.similarity(images, captions)


class Aesthetic(PretrainedTowers):
    """How much people like to look at a picture, about 1 to 10, whatever its caption.

    A head of five linear layers over CLIP's embedding of length 1. Nothing bends between them, so
    they are one: score = w·embedding + b, in fp32.
    Source: github.com/christophschuhmann/improved-aesthetic-predictor.
    """

    name = "aesthetic"
    reads_caption = False
    range = (1.0, 10.0)

    def __init__(self, head: Path, towers: Towers, options: RewardOptions) -> None:
        """head: the published file or one of the same keys; towers without captions will do."""
        super().__init__(towers, options)
        self.model = f"{head.name} on {towers.model}"
        self._weight, self._bias = load_aesthetic_head(head)

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """float32 (B,)."""
        if len(images) != len(captions):
            raise ValueError(f"got {len(images)} images but {len(captions)} captions")
        if not len(images):
            return torch.empty(0, device=self.device)
        embedded = self.pictures(images)
        if embedded.shape[1] != len(self._weight):
            raise ValueError(
                f"{self.model}: the head reads embeddings of {len(self._weight)}, the network's "
                f"have {embedded.shape[1]}; give it OpenAI's CLIP ViT-L/14"
            )
        return embedded @ self._weight.to(embedded.device) + self._bias


def load_aesthetic_head(path: Path) -> tuple[Tensor, float]:
    """The head in a file as one linear layer: weight float32 (width,) and bias.

    Raises:
        ValueError: the file holds other keys, or no tensors at all.
    """
    state = load_tensors(path)
    expected = [f"layers.{i}.{part}" for i in AESTHETIC_LAYERS for part in ("weight", "bias")]
    if set(state) != set(expected):
        raise ValueError(f"{path}: keys {sorted(state)}, not those of {AESTHETIC_HEAD}: {expected}")
    weight, bias = state["layers.0.weight"].double(), state["layers.0.bias"].double()
    for place in AESTHETIC_LAYERS[1:]:
        layer = state[f"layers.{place}.weight"].double()
        weight, bias = layer @ weight, layer @ bias + state[f"layers.{place}.bias"].double()
    return weight[0].float(), bias.item()


def clip(weights: str | None, options: RewardOptions) -> Reward:
    """`weights` as miro.rewards.clip_models says; None for jina-clip-v2 where code is allowed, else for
    OpenAI's CLIP ViT-L/14."""
    (named,) = parts(weights, 1)
    towers = open_towers(
        named or (CODED if options.allow_code else OPENAI_L14), allow_code=options.allow_code
    )
    return Similarity("clip", towers, options, scale=towers.scale / 100, cosines=(0.0, 0.4))


def aesthetic(weights: str | None, options: RewardOptions) -> Reward:
    """HEAD or HEAD,CLIP: the head's file or its folder, and a CLIP as miro.rewards.clip_models says."""
    head, network = parts(weights, 2)
    remedy = f"curl -L -o '{AESTHETIC_HEAD}' {AESTHETIC_URL}"
    if head is None:
        raise ValueError(f"the reward 'aesthetic' needs {AESTHETIC_HEAD}: {remedy}")
    if not Path(head).exists():
        raise ValueError(f"aesthetic: {head!r} is neither a file nor a folder; {remedy}")
    path = Path(head)
    if path.is_dir():
        path = path / AESTHETIC_HEAD
        if not path.is_file():
            raise ValueError(f"{path}: no such file; {remedy}")
        holds_clip = any(
            (path.parent / n).is_file() for n in ("open_clip_config.json", "config.json")
        )
        network = network or (head if holds_clip else None)
    towers = open_towers(network or OPENAI_L14, captions=False)
    return Aesthetic(path, towers, options)


def hpsv2(weights: str | None, options: RewardOptions) -> Reward:
    """The file of either version, or the folder or hub id that holds one; v2.1 of the two.

    HPSv2 sees the whole picture, on black, where other CLIPs see its central square. The package
    hpsv2 resizes floats and leaves them there; here they are bytes, as everywhere: a grey level.
    """
    (named,) = parts(weights, 1)
    file = find_file(named or HPS, HPS_FILES)
    towers = open_clip_towers(f"{OPEN_CLIP}{HPS_ARCHITECTURE}/{file}")
    towers = replace(
        towers,
        model=f"open_clip {HPS_ARCHITECTURE}, {file.name}",
        view=ImageTransform(towers.view.size, "letterbox"),
    )
    return Similarity("hpsv2", towers, options, scale=1.0, cosines=(0.15, 0.4))


def pick_score(weights: str | None, options: RewardOptions) -> Reward:
    """NETWORK or NETWORK,TOKENIZER, each a folder or hub id; None for the published ones."""
    return _fine_tuned("pick_score", PICK_SCORE, weights, options)


def sci_score(weights: str | None, options: RewardOptions) -> Reward:
    """NETWORK or NETWORK,TOKENIZER, each a folder or hub id; None for the published ones."""
    return _fine_tuned("sci_score", SCI_SCORE, weights, options)


def _fine_tuned(name: str, published: str, weights: str | None, options: RewardOptions) -> Reward:
    network, tokenizer = parts(weights or published, 2)
    if network is None:
        raise ValueError(f"{name}={weights} names a tokenizer and no network")
    towers = transformers_towers(network, tokenizer)
    return Similarity(name, towers, options, scale=towers.scale / 100, cosines=(0.1, 0.3))


BUILDERS: dict[str, Callable[[str | None, RewardOptions], Reward]] = {
    "clip": clip,
    "aesthetic": aesthetic,
    "pick_score": pick_score,
    "hpsv2": hpsv2,
    "sci_score": sci_score,
}
