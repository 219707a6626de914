"""The verifier: a small CNN that detects the count, tint and position of each concept.

It plays the role of GenEval's object detector (Ghosh et al. 2023): no model is conditioned on it,
and it never reads a caption; `matches` compares its detections with a caption. It is trained on
scenes of ALL compositions, since one trained without the held-out ones would be biased against the
images it has to verify. Their random numbers are those of the split "all", which no dataset of the
splits "train" and "heldout" shares.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from miro.rewards.base import RewardOptions, batches_by_size
from miro.utils.atomic_io import atomic_write
from openmoji.coca import conv_layers
from openmoji.compositions import (
    CATEGORIES,
    HARD_NEGATIVES,
    MIN_DISTANCE,
    NUMBERS,
    CaptionSpec,
    specs_by_caption,
    variants,
)
from openmoji.scenes import Sample, SceneStream, render_samples
from openmoji.sprites import BACKGROUNDS, CONCEPTS, TINTS

log = logging.getLogger(__name__)

_COUNTS = max(NUMBERS) + 1  # classes 0 to 4
_TINTS: tuple[str | None, ...] = (None, *TINTS)  # classes: the drawing's own colors, or a tint
_GRID = 4  # side of the final feature map
_BATCH = 512
_VOCABULARY = {
    "concepts": list(CONCEPTS),
    "tints": list(TINTS),
    "backgrounds": list(BACKGROUNDS),
}


@dataclass(frozen=True)
class VerifierConfig:
    """Size and training of the verifier; deterministic for a seed."""

    steps: int = 600
    batch_size: int = 128
    width: int = 32  # channels of the first layer
    size: int = 32  # of the images in pixels, a multiple of 8
    scenes: int = 24_000
    degraded_share: float = 1 / 3  # of the scenes, with `degraded_strength`; the others are clean
    degraded_strength: float = 0.6
    learning_rate: float = 2e-3
    warmup_steps: int = 60
    weight_decay: float = 0.05
    test_scenes: int = 3_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "width", "scenes", "warmup_steps", "test_scenes"):
            if getattr(self, name) < 1:
                raise ValueError(f"verifier: {name} is {getattr(self, name)}; give 1 or more")
        if not 0 <= self.degraded_share <= 1:
            raise ValueError(
                f"verifier: degraded_share is {self.degraded_share}; give a number from 0 to 1"
            )


class Detections(NamedTuple):
    """The network's output for B images and C concepts, float32.

    Attributes:
        counts: (B, C, 5), logits.
        tints: (B, C, 1 + tints), logits; undefined for a count of 0.
        centers: (B, C, 2), mean x and y in image widths; undefined for a count of 0.
        backgrounds: (B, backgrounds), logits.
    """

    counts: Tensor
    tints: Tensor
    centers: Tensor
    backgrounds: Tensor


class Verifier(nn.Module):
    """Six convolutions and a linear layer."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.features = nn.Sequential(
            *conv_layers(width), nn.AdaptiveAvgPool2d(_GRID), nn.Flatten()
        )
        self.per_concept = (_COUNTS, len(_TINTS), 2)
        outputs = len(CONCEPTS) * sum(self.per_concept) + len(BACKGROUNDS)
        self.head = nn.Linear(4 * width * _GRID**2, outputs)

    def forward(self, images: Tensor) -> Detections:
        """Detect the objects in uint8 (B, 3, H, W) images."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                "verifier: images must be uint8 (B, 3, H, W),"
                f" got {images.dtype} {tuple(images.shape)}"
            )
        pixels = (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        out = self.head(self.features(pixels)).float()
        concepts, backgrounds = out.tensor_split([out.shape[1] - len(BACKGROUNDS)], dim=1)
        concepts = concepts.unflatten(1, (len(CONCEPTS), sum(self.per_concept)))
        counts, tints, centers = concepts.split(self.per_concept, dim=-1)
        return Detections(counts, tints, centers, backgrounds)


def matches(
    detections: Detections, specs: Sequence[CaptionSpec], *, background: bool = False
) -> Tensor:
    """Whether each image shows its caption, by GenEval's rules.

    Every named concept is present, a counted one exactly as often as stated, a tinted one in its
    tint, and for a relation the centers are more than `MIN_DISTANCE` apart on that axis. Additional
    objects are allowed.

    Args:
        detections: Of B images.
        specs: B captions.
        background: Whether a mentioned background has to match too.

    Returns:
        bool (B,).
    """
    if len(specs) != len(detections.counts):
        raise ValueError(f"verifier: {len(detections.counts)} images but {len(specs)} captions")
    device = detections.counts.device

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    row = torch.arange(len(specs), device=device)
    counts, tints = detections.counts.argmax(-1), detections.tints.argmax(-1)
    # For a caption with one concept, index -1 is the same one.
    concepts = [column([CONCEPTS.index(s.concepts[k]) for s in specs]) for k in (0, -1)]
    ok = torch.ones(len(specs), dtype=torch.bool, device=device)
    for k, concept in zip((0, -1), concepts, strict=True):
        tint = column([_TINTS.index(s.tints[k]) if s.tints else -1 for s in specs])
        ok &= counts[row, concept] > 0
        ok &= (tint < 0) | (tints[row, concept] == tint)
    stated = column([s.count if s.category == "counting" else -1 for s in specs])
    ok &= (stated < 0) | (counts[row, concepts[0]] == stated)
    centers = detections.centers
    right, down = (centers[row, concepts[1]] - centers[row, concepts[0]]).unbind(-1)
    gaps = {"left of": right, "right of": -right, "above": down, "below": -down}
    for relation, gap in gaps.items():
        stated = column([s.relation == relation for s in specs]).bool()
        ok &= ~stated | (gap > MIN_DISTANCE)
    if background:
        names = list(BACKGROUNDS)
        stated = column([-1 if s.background is None else names.index(s.background) for s in specs])
        ok &= (stated < 0) | (detections.backgrounds.argmax(-1) == stated)
    return ok


@torch.inference_mode()
def verify(
    verifier: Verifier, images: Tensor, specs: Sequence[CaptionSpec], *, background: bool = False
) -> Tensor:
    """`matches` of uint8 (B, 3, H, W) images: bool (B,), on the verifier's device."""
    if len(specs) != len(images):
        raise ValueError(f"verifier: {len(images)} images but {len(specs)} captions")
    device = next(verifier.parameters()).device
    found = [torch.zeros(0, dtype=torch.bool, device=device)]
    for start in range(0, len(images), _BATCH):
        detections = verifier(images[start : start + _BATCH].to(device))
        found.append(matches(detections, specs[start : start + _BATCH], background=background))
    return torch.cat(found)


class VerifierReward:
    """The verifier as an evaluator of `miro evaluate`: 1 if the image shows its caption, else 0.

    The CaptionSpec is looked up among all captions of scenes; other captions score NaN.

    Args:
        weights: The folder that `python -m openmoji fit-verifier` wrote.
        options: Only the device is used.
    """

    name = "verifier"
    reads_caption = True

    def __init__(self, weights: str | None, options: RewardOptions) -> None:
        if weights is None:
            raise ValueError(
                "verifier needs weights: run `python -m openmoji fit-verifier FOLDER` and give "
                "openmoji.verifier:VerifierReward=FOLDER"
            )
        self.model = "CNN of openmoji fit-verifier"
        self._device = torch.device(options.device)
        self._verifier = load_verifier(Path(weights), self._device)

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """See `Reward.score`."""
        scores = torch.full((len(images),), math.nan, device=self._device)
        for indices, pixels in batches_by_size(images, captions, self._device):
            specs = [specs_by_caption().get(captions[int(i)]) for i in indices]
            known = torch.tensor([spec is not None for spec in specs], device=self._device)
            found = verify(self._verifier, pixels[known], [spec for spec in specs if spec])
            scores[indices[known]] = found.float()
        return scores


def accuracy_by_category(found: Tensor, specs: Sequence[CaptionSpec]) -> dict[str, float]:
    """Mean of bool (B,) over the captions of each category that occurs."""
    category = np.array([CATEGORIES.index(spec.category) for spec in specs])
    true = found.cpu().numpy()
    return {
        name: float(true[category == k].mean())
        for k, name in enumerate(CATEGORIES)
        if (category == k).any()
    }


def fit_verifier(dest: Path, config: VerifierConfig | None = None) -> Verifier:
    """Train a verifier and write model.safetensors, metrics.json and verifier.json into `dest`.

    verifier.json is written last and marks the folder as complete.

    Returns:
        The verifier in eval mode.
    """
    config = config or VerifierConfig()
    images, targets = _training_set(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        verifier = Verifier(config.width)
    verifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        verifier.parameters(), config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / config.warmup_steps) * (1 - step / config.steps),
    )
    generator = torch.Generator().manual_seed(config.seed)
    for step in range(config.steps):
        batch = torch.randint(len(images), (config.batch_size,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            detections = verifier(images[batch])
        loss = _loss(detections, Detections(*(target[batch] for target in targets)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            log.info("verifier: step %d of %d, loss %.3f", step + 1, config.steps, loss.item())
    verifier.eval()
    _save(verifier, Path(dest), config)
    return verifier


def load_verifier(folder: Path, device: torch.device | str = "cpu") -> Verifier:
    """Load the verifier in `folder`, in eval mode; ValueError if it is missing or incompatible."""
    path = Path(folder) / "verifier.json"
    remedy = f"run `python -m openmoji fit-verifier {folder}`"
    if not path.is_file():
        raise ValueError(f"{path}: no such file, the folder has no complete verifier; {remedy}")
    content = json.loads(path.read_text("utf-8"))
    if content["vocabulary"] != _VOCABULARY:
        raise ValueError(
            f"{path}: its vocabulary is {content['vocabulary']}, not {_VOCABULARY}; {remedy}"
        )
    verifier = Verifier(content["config"]["width"])
    verifier.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    verifier.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return verifier.eval()


def _image_tensor(samples: Sequence[Sample], size: int) -> Tensor:
    """uint8 (B, 3, size, size), channels last in memory."""
    batches = range(0, len(samples), _BATCH)
    parts = [render_samples(samples[k : k + _BATCH], size) for k in batches]
    return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2)


def _training_set(config: VerifierConfig) -> tuple[Tensor, Detections]:
    """Images uint8 (N, 3, H, W), most of them clean, and their targets."""
    degraded = round(config.scenes * config.degraded_share)
    clean = SceneStream(config.seed, "all", wrong_captions=0, strength=0)
    rough = SceneStream(config.seed, "all", wrong_captions=0, strength=config.degraded_strength)
    samples = clean.samples(degraded, config.scenes) + rough.samples(0, degraded)
    return _image_tensor(samples, config.size), _targets(samples)


def _targets(samples: Sequence[Sample]) -> Detections:
    """The true content of scenes, with class indices in place of logits."""
    shape = (len(samples), len(CONCEPTS))
    counts, tints = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    centers = np.zeros((*shape, 2), np.float32)
    names = list(BACKGROUNDS)
    for row, sample in enumerate(samples):
        for item in sample.scene.objects:
            concept = CONCEPTS.index(item.concept)
            counts[row, concept] += 1
            tints[row, concept] = _TINTS.index(item.tint)
            centers[row, concept] += (item.x, item.y)
    centers /= np.maximum(counts, 1)[..., None]
    backgrounds = np.array([names.index(sample.scene.background) for sample in samples])
    return Detections(*map(torch.from_numpy, (counts, tints, centers, backgrounds)))


def _loss(found: Detections, true: Detections) -> Tensor:
    """The sum of the losses, weighted to be of similar size early in training."""
    present = true.counts > 0
    return (
        10 * F.cross_entropy(found.counts.flatten(0, 1), true.counts.flatten())
        + 2 * F.cross_entropy(found.tints[present], true.tints[present])
        + 10 * F.mse_loss(found.centers[present], true.centers[present])
        + 0.3 * F.cross_entropy(found.backgrounds, true.backgrounds)
    )


def _metrics(verifier: Verifier, config: VerifierConfig) -> dict[str, dict[str, float]]:
    """Accuracy on held-out compositions, and the false acceptance rate by kind of error."""
    found: dict[str, dict[str, float]] = {}
    for name, strength in (("clean", 0.0), ("degraded", 1.0)):
        stream = SceneStream(config.seed, "heldout", wrong_captions=0, strength=strength)
        samples = stream.samples(0, config.test_scenes)
        images = _image_tensor(samples, config.size)
        specs = [sample.caption_spec for sample in samples]
        found[name] = accuracy_by_category(verify(verifier, images, specs), specs)
        if strength == 0:
            strict = verify(verifier, images, specs, background=True)
            found["clean_with_background"] = accuracy_by_category(strict, specs)
            found["false_acceptance"] = _false_acceptance(verifier, images, specs)
    return found


def _false_acceptance(
    verifier: Verifier, images: Tensor, specs: Sequence[CaptionSpec]
) -> dict[str, float]:
    """Share of accepted captions with one error, by kind; one caption per image."""
    shares = {}
    for kind in HARD_NEGATIVES:
        options = [variants(spec, kind) for spec in specs]
        rows = [row for row, wrong in enumerate(options) if wrong]
        wrong = [options[row][row % len(options[row])] for row in rows]
        if rows:
            shares[kind] = verify(verifier, images[rows], wrong).float().mean().item()
    return shares


def _save(verifier: Verifier, dest: Path, config: VerifierConfig) -> None:
    """Write the folder, each file atomically."""
    dest.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in verifier.state_dict().items()}
    atomic_write(dest / "model.safetensors", save(weights))
    for name, content in (
        ("metrics.json", _metrics(verifier, config)),
        ("verifier.json", {"vocabulary": _VOCABULARY, "config": asdict(config)}),
    ):
        atomic_write(dest / name, (json.dumps(content, indent=1) + "\n").encode())
