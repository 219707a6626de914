"""The held-out judge: a small CNN that sees how many of each concept there are, what tint, where.

No model is conditioned on it, and it never reads a caption: it reports what is in the picture, and
`judge` compares that with what was said, as GenEval does with an object detector (Ghosh et al.
2023). It is trained on scenes of ALL compositions, because a judge that had never seen a held-out
composition would be biased against the very pictures it is there for; their random numbers are
those of the split "all", which no dataset of the splits "train" and "heldout" shares.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from miro.utils.atomic_io import atomic_write
from openmoji.compositions import CATEGORIES, HARD_KINDS, MIN_DISTANCE, NUMBERS, Statement, variants
from openmoji.scenes import Sample, SceneStream, pictures
from openmoji.sprites import BACKGROUNDS, CONCEPTS, TINTS

log = logging.getLogger(__name__)

_COUNTS = max(NUMBERS) + 1  # classes: none, one, ... as many as a scene may hold
_LOOKS: tuple[str | None, ...] = (None, *TINTS)  # classes: the drawing's own colours, or a tint
_GRID = 4  # the network ends in this many cells a side, so that it knows where things are
_WORDS = {"concepts": list(CONCEPTS), "tints": list(TINTS), "backgrounds": list(BACKGROUNDS)}
_CHUNK = 512  # pictures judged at once


@dataclass(frozen=True)
class VerifierConfig:
    """How the verifier is made. Steps are fixed, not seconds: a seed gives the same verifier."""

    steps: int = 600
    batch_size: int = 128
    width: int = 32  # channels of the first layer
    size: int = 32  # pixels of the pictures, a multiple of 8
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


class Findings(NamedTuple):
    """What the network sees in B pictures; C concepts, float32."""

    number: Tensor  # (B, C, 5) logits of how many
    look: Tensor  # (B, C, 1 + tints) logits, meaningful where there are any
    centre: Tensor  # (B, C, 2) mean x and y in picture widths, meaningful where there are any
    background: Tensor  # (B, backgrounds) logits


class Verifier(nn.Module):
    """Six convolutions and a linear layer; see `Findings` for what comes out."""

    def __init__(self, width: int = 32):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for factor, stride in ((1, 1), (2, 2), (2, 1), (4, 2), (4, 1), (4, 2)):
            layers += [
                nn.Conv2d(channels, factor * width, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(factor * width),
                nn.ReLU(),
            ]
            channels = factor * width
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(_GRID), nn.Flatten())
        self.per_concept = (_COUNTS, len(_LOOKS), 2)
        outputs = len(CONCEPTS) * sum(self.per_concept) + len(BACKGROUNDS)
        self.head = nn.Linear(channels * _GRID**2, outputs)

    def forward(self, images: Tensor) -> Findings:
        """images: uint8 (B, 3, H, W)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                "verifier: images must be uint8 (B, 3, H, W),"
                f" got {images.dtype} {tuple(images.shape)}"
            )
        pixels = (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        out = self.head(self.features(pixels)).float()
        concepts, background = out.tensor_split([out.shape[1] - len(BACKGROUNDS)], dim=1)
        concepts = concepts.unflatten(1, (len(CONCEPTS), sum(self.per_concept)))
        number, look, centre = concepts.split(self.per_concept, dim=-1)
        return Findings(number, look, centre, background)


def judge(findings: Findings, said: Sequence[Statement], *, background: bool = False) -> Tensor:
    """Whether each picture shows what is said of it: bool (B,).

    As in GenEval: every named concept is there, a counted one exactly as often as said, a tinted
    one in its tint, and for a relation the centres lie apart on that axis by more than
    `MIN_DISTANCE`. Other objects are no fault. background: also the background, where it is said.
    """
    if len(said) != len(findings.number):
        raise ValueError(f"verifier: {len(findings.number)} pictures but {len(said)} statements")
    device = findings.number.device

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    row = torch.arange(len(said), device=device)
    number, look = findings.number.argmax(-1), findings.look.argmax(-1)
    # A statement about one concept is read as if it named it twice.
    slots = [column([CONCEPTS.index(s.concepts[k]) for s in said]) for k in (0, -1)]
    ok = torch.ones(len(said), dtype=torch.bool, device=device)
    for k, concept in zip((0, -1), slots, strict=True):
        tint = column([_LOOKS.index(s.tints[k]) if s.tints else -1 for s in said])
        ok &= number[row, concept] > 0
        ok &= (tint < 0) | (look[row, concept] == tint)
    stated = column([s.count if s.category == "counting" else -1 for s in said])
    ok &= (stated < 0) | (number[row, slots[0]] == stated)
    right, down = (findings.centre[row, slots[1]] - findings.centre[row, slots[0]]).unbind(-1)
    gaps = {"left of": right, "right of": -right, "above": down, "below": -down}
    for relation, gap in gaps.items():
        stated = column([s.relation == relation for s in said]).bool()
        ok &= ~stated | (gap > MIN_DISTANCE)
    if background:
        names = list(BACKGROUNDS)
        stated = column([-1 if s.background is None else names.index(s.background) for s in said])
        ok &= (stated < 0) | (findings.background.argmax(-1) == stated)
    return ok


@torch.inference_mode()
def verdicts(
    verifier: Verifier, images: Tensor, said: Sequence[Statement], *, background: bool = False
) -> Tensor:
    """`judge` of uint8 (B, 3, H, W) images: bool (B,), on the verifier's device."""
    if len(said) != len(images):
        raise ValueError(f"verifier: {len(images)} pictures but {len(said)} statements")
    device = next(verifier.parameters()).device
    found = [torch.zeros(0, dtype=torch.bool, device=device)]
    for start in range(0, len(images), _CHUNK):
        findings = verifier(images[start : start + _CHUNK].to(device))
        found.append(judge(findings, said[start : start + _CHUNK], background=background))
    return torch.cat(found)


def accuracy_by_category(verdict: Tensor, said: Sequence[Statement]) -> dict[str, float]:
    """Share of true verdicts in each category that occurs."""
    place = np.array([CATEGORIES.index(s.category) for s in said])
    true = verdict.cpu().numpy()
    return {
        category: float(true[place == k].mean())
        for k, category in enumerate(CATEGORIES)
        if (place == k).any()
    }


def fit_verifier(dest: Path, config: VerifierConfig | None = None) -> Verifier:
    """Train a verifier and write model.safetensors, metrics.json and verifier.json into `dest`.

    verifier.json comes last: a folder that has it is complete. Returns the verifier in eval mode.
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
        chosen = torch.randint(len(images), (config.batch_size,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            findings = verifier(images[chosen])
        loss = _loss(findings, Findings(*(target[chosen] for target in targets)))
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
    """The verifier `fit_verifier` wrote, in eval mode; ValueError names the file and the remedy."""
    path = Path(folder) / "verifier.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file, {folder} holds no complete verifier; fit it again")
    content = json.loads(path.read_text("utf-8"))
    if content["words"] != _WORDS:
        raise ValueError(f"{path}: it judges {content['words']}, not {_WORDS}; fit it again")
    verifier = Verifier(content["config"]["width"])
    verifier.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    verifier.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return verifier.eval()


def _image_tensor(samples: Sequence[Sample], size: int) -> Tensor:
    """uint8 (B, 3, size, size), channels last in memory."""
    parts = [pictures(samples[k : k + _CHUNK], size) for k in range(0, len(samples), _CHUNK)]
    return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2)


def _training_set(config: VerifierConfig) -> tuple[Tensor, Findings]:
    """uint8 (N, 3, H, W) scenes, most of them clean, and what is in them."""
    degraded = round(config.scenes * config.degraded_share)
    clean = SceneStream(config.seed, "all", wrong_captions=0, strength=0)
    rough = SceneStream(config.seed, "all", wrong_captions=0, strength=config.degraded_strength)
    samples = clean.samples(degraded, config.scenes) + rough.samples(0, degraded)
    return _image_tensor(samples, config.size), _targets(samples)


def _targets(samples: Sequence[Sample]) -> Findings:
    """What is in the scenes, laid out as `Findings`, class numbers in place of logits."""
    shape = (len(samples), len(CONCEPTS))
    number, look = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    centre = np.zeros((*shape, 2), np.float32)
    names = list(BACKGROUNDS)
    for row, sample in enumerate(samples):
        for thing in sample.scene.things:
            concept = CONCEPTS.index(thing.concept)
            number[row, concept] += 1
            look[row, concept] = _LOOKS.index(thing.tint)
            centre[row, concept] += (thing.x, thing.y)
    centre /= np.maximum(number, 1)[..., None]
    background = np.array([names.index(sample.scene.background) for sample in samples])
    return Findings(*map(torch.from_numpy, (number, look, centre, background)))


def _loss(found: Findings, true: Findings) -> Tensor:
    """Weighted so that the parts are of one size soon after the start."""
    there = true.number > 0
    return (
        10 * F.cross_entropy(found.number.flatten(0, 1), true.number.flatten())
        + 2 * F.cross_entropy(found.look[there], true.look[there])
        + 10 * F.mse_loss(found.centre[there], true.centre[there])
        + 0.3 * F.cross_entropy(found.background, true.background)
    )


def _metrics(verifier: Verifier, config: VerifierConfig) -> dict[str, dict[str, float]]:
    """How it judges held-out compositions: true statements, and statements with one thing wrong."""
    found: dict[str, dict[str, float]] = {}
    for name, strength in (("clean", 0.0), ("degraded", 1.0)):
        stream = SceneStream(config.seed, "heldout", wrong_captions=0, strength=strength)
        samples = stream.samples(0, config.test_scenes)
        images, said = _image_tensor(samples, config.size), [sample.said for sample in samples]
        found[name] = accuracy_by_category(verdicts(verifier, images, said), said)
        if strength == 0:
            strict = verdicts(verifier, images, said, background=True)
            found["clean_with_background"] = accuracy_by_category(strict, said)
            found["wrong_accepted"] = _wrong_accepted(verifier, images, said)
    return found


def _wrong_accepted(
    verifier: Verifier, images: Tensor, said: Sequence[Statement]
) -> dict[str, float]:
    """Share of wrong statements taken for true, by what is wrong; one statement per picture."""
    shares = {}
    for kind in HARD_KINDS:
        options = [variants(s, kind) for s in said]
        rows = [row for row, wrong in enumerate(options) if wrong]
        wrong = [options[row][row % len(options[row])] for row in rows]
        if rows:
            shares[kind] = verdicts(verifier, images[rows], wrong).float().mean().item()
    return shares


def _save(verifier: Verifier, dest: Path, config: VerifierConfig) -> None:
    """Write the folder; each file is whole or absent."""
    dest.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in verifier.state_dict().items()}
    # As bytes: save_file would put a private, unsynced file of its own in place of the given one.
    atomic_write(dest / "model.safetensors", save(weights))
    for name, content in (
        ("metrics.json", _metrics(verifier, config)),
        ("verifier.json", {"words": _WORDS, "config": asdict(config)}),
    ):
        atomic_write(dest / name, (json.dumps(content, indent=1) + "\n").encode())
