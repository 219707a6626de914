"""Captioned images composed from OpenMoji artwork, of mixed quality like web data.

Six categories after GenEval (Ghosh et al. 2023). Images are blurred, faded and noisy at random, and
part of the captions is wrong, so that rewards carry information about the training pairs.
`SceneStream(...)[i]` is a pure function of the stream and i: it depends neither on the number of
scenes, nor on the shards, nor on interruptions.
"""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from miro.data.shards import Manifest, write_shard
from miro.utils.serialize import unknown_name
from openmoji.compositions import (
    CATEGORIES,
    NEGATIVES,
    OPPOSITE,
    SIDE_BY_SIDE,
    SPLITS,
    CaptionSpec,
    Scene,
    SceneObject,
    caption_specs,
    is_allowed,
    is_true,
    variants,
)
from openmoji.render_scene import SIZE, Degradation, render
from openmoji.sprites import BACKGROUNDS, CONCEPTS

_SINGLE_WIDTH, _GROUP_WIDTH = 3 / 4, 1 / 2  # of an object, in image widths
_NEAR, _MIDDLE, _FAR = 1 / 4, 1 / 2, 3 / 4  # possible centers of objects
_MENTION_BACKGROUND = 0.5  # share of the captions
_UNRELATED = 0.5  # share of the wrong captions; the others have one error
_REPLACE_OBJECT = 0.5  # share of the captions with one error; the others have a wrong attribute
# Of CATEGORIES, in their order; scenes of several objects are more informative than of one.
_CATEGORY_SHARES = (0.08, 0.16, 0.2, 0.1, 0.22, 0.24)
# Numbers of random streams; the first are those of the scenes, one per split.
_PROMPT_STREAM, _ORDER_STREAM = len(SPLITS), len(SPLITS) + 1


@dataclass(frozen=True)
class Sample:
    """A captioned image as data."""

    scene: Scene
    caption_spec: CaptionSpec
    degradation: Degradation

    def to_json(self) -> dict[str, Any]:
        """The content of the sample's JSON member."""
        return {
            "captions": {"original": self.caption_spec.caption},
            "scene": self.scene.to_json(),
            "caption_spec": self.caption_spec.to_json(),
            "wrong": not is_true(self.caption_spec, self.scene),
            "degradation": asdict(self.degradation),
        }


@dataclass(frozen=True)
class Prompt:
    """A caption to sample from."""

    caption_spec: CaptionSpec

    @property
    def category(self) -> str:
        """One of CATEGORIES."""
        return self.caption_spec.category

    @property
    def caption(self) -> str:
        """The text."""
        return self.caption_spec.caption


@dataclass(frozen=True)
class SceneStream:
    """An infinite sequence of samples. Streams of different splits share no random numbers.

    Attributes:
        seed: Of all randomness.
        split: "train", "heldout", or "all" compositions.
        wrong_captions: Share of false captions, half of them unrelated and half with one error.
        strength: Scale of the degradations; 0 for clean images.
    """

    seed: int
    split: str = "train"
    wrong_captions: float = 0.5
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise unknown_name("split", self.split, SPLITS)
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give 0 or more")
        for name in ("wrong_captions", "strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number from 0 to 1")

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng((SPLITS.index(self.split), self.seed, index))
        truth, background = _draw_spec(rng, self.split)
        scene = _arrange(truth, background, rng)
        spec = truth
        if rng.random() < self.wrong_captions:
            if rng.random() < _UNRELATED:
                spec = _unrelated_spec(scene, rng, self.split)
            else:
                spec = _one_error_spec(truth, scene, rng, self.split)
        return Sample(scene, spec, _draw_degradation(rng, self.strength))

    def samples(self, start: int, stop: int) -> list[Sample]:
        """The samples of range(start, stop)."""
        return [self[index] for index in range(start, stop)]


def _draw_spec(rng: np.random.Generator, split: str) -> tuple[CaptionSpec, str]:
    """A random caption of the split, and the background of its scene."""
    category = CATEGORIES[rng.choice(len(CATEGORIES), p=_CATEGORY_SHARES)]
    options = caption_specs(category, split)
    return _vary(options[rng.integers(len(options))], rng, split)


def _vary(spec: CaptionSpec, rng: np.random.Generator, split: str) -> tuple[CaptionSpec, str]:
    """The composition in a random order, with or without its background, and that background."""
    if len(spec.concepts) == 2 and rng.random() < 0.5:
        spec = spec.mirrored
    background = spec.background or tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    # Without its background a single object states no composition, held out or not.
    required = split == "heldout" and spec.category == "single_object"
    mention = rng.random() < _MENTION_BACKGROUND or required
    return replace(spec, background=background if mention else None), background


def _unrelated_spec(scene: Scene, rng: np.random.Generator, split: str) -> CaptionSpec:
    """A caption of another scene, false of this one."""
    while True:
        spec, _ = _draw_spec(rng, split)
        if not is_true(spec, scene):
            return spec


def _one_error_spec(
    truth: CaptionSpec, scene: Scene, rng: np.random.Generator, split: str
) -> CaptionSpec:
    """The true caption with another object, or else with another count, tint or relation."""
    wrong = {
        kind: [spec for spec in variants(truth, kind) if is_allowed(spec, split)]
        for kind in NEGATIVES
    }
    attributes = [kind for kind in NEGATIVES if wrong[kind] and kind != "replaced_object"]
    objects = wrong["replaced_object"]
    if not attributes or (objects and rng.random() < _REPLACE_OBJECT):
        options = objects
    else:
        options = wrong[attributes[rng.integers(len(attributes))]]
    assert options, f"{truth.caption!r} has no wrong variant"
    spec = options[rng.integers(len(options))]
    assert not is_true(spec, scene)
    return spec


def _arrange(truth: CaptionSpec, background: str, rng: np.random.Generator) -> Scene:
    """Lay out the objects of a true caption.

    One object is in the middle, two are at the ends of the horizontal or, as the relation demands,
    vertical center line, and counted ones in cells of a 2 x 2 grid.
    """
    concepts = truth.concepts * truth.count
    tints = truth.tints * truth.count or (None,) * len(concepts)
    if truth.category == "counting":
        cells = rng.permutation(4)[: truth.count]
        centers = [((_NEAR, _FAR)[cell % 2], (_NEAR, _FAR)[cell // 2]) for cell in cells]
    elif len(concepts) == 2:
        ends = {
            "left of": ((_NEAR, _MIDDLE), (_FAR, _MIDDLE)),
            "above": ((_MIDDLE, _NEAR), (_MIDDLE, _FAR)),
        }
        relation = truth.relation or SIDE_BY_SIDE[rng.integers(len(SIDE_BY_SIDE))]
        centers = ends[relation] if relation in ends else ends[OPPOSITE[relation]][::-1]
    else:
        centers = [(_MIDDLE, _MIDDLE)]
    width = _SINGLE_WIDTH if len(centers) == 1 else _GROUP_WIDTH
    objects = [
        SceneObject(concept, tint, x, y, width)
        for concept, tint, (x, y) in zip(concepts, tints, centers, strict=True)
    ]
    return Scene(truth.category, tuple(objects), background)


def _draw_degradation(rng: np.random.Generator, strength: float) -> Degradation:
    """Four independent degradations, each with its own probability and range."""

    def maybe(probability: float, low: float, high: float, default: float) -> float:
        value = rng.uniform(low, high) if rng.random() < probability else default
        # Rounded, so that the JSON member has the exact value.
        return round(default + (value - default) * strength, 4)

    return Degradation(
        blur=maybe(0.5, 0.2, 1.7, 0.0),
        saturation=maybe(0.6, 0.1, 1.0, 1.0),
        contrast=maybe(0.5, 0.3, 1.0, 1.0),
        noise=maybe(0.5, 0.0, 0.15, 0.0),
        noise_seed=int(rng.integers(2**32)),
    )


def render_samples(samples: Sequence[Sample], size: int = SIZE) -> np.ndarray:
    """The degraded images of samples, uint8 (B, size, size, 3), sRGB."""
    scenes = [sample.scene for sample in samples]
    return render(scenes, [sample.degradation for sample in samples], size)


def write_scenes(
    dest: Path,
    *,
    samples: int,
    seed: int,
    split: str,
    clean: bool = False,
    wrong_captions: float = 0.5,
    size: int = SIZE,
    shard_samples: int = 2500,
) -> Manifest:
    """Write a dataset folder of scenes; an interrupted call with the same arguments is resumed.

    The JSON member of a sample has "captions", "scene", "caption_spec", "wrong" and "degradation".

    Args:
        dest: The folder.
        samples: Number of images.
        seed: Of all randomness.
        split: "train", "heldout" or "all".
        clean: Without degradations.
        wrong_captions: Share of false captions.
        size: Of the images in pixels, a multiple of 8.
        shard_samples: Samples per shard.

    Raises:
        ValueError: `dest` has other content, or an argument is out of range.
    """
    if samples < 1 or shard_samples < 1:
        raise ValueError(f"samples is {samples}, shard_samples {shard_samples}; give 1 or more")
    stream = SceneStream(seed, split, wrong_captions, strength=0.0 if clean else 1.0)
    source = {
        "generator": "openmoji.scenes",
        "artwork": "OpenMoji (openmoji.org), CC BY-SA 4.0",
        "concepts": list(CONCEPTS),
        "samples": samples,
        "size": size,
        "shard_samples": shard_samples,
        **asdict(stream),
    }
    manifest = Manifest(kind="images", captions=("original",), shards=(), source=source)
    if (dest / "manifest.json").exists():
        manifest = Manifest.read(dest)
        if manifest.source != source:
            raise ValueError(
                f"{dest} was made as {manifest.source}, not as {source};"
                " give another folder or delete this one"
            )
    for number in range(len(manifest.shards), math.ceil(samples / shard_samples)):
        start = number * shard_samples
        stop = min(start + shard_samples, samples)
        path = dest / "shards" / f"{number:05d}.tar"
        info = write_shard(path, _members(stream, start, stop, size))
        manifest = replace(manifest, shards=(*manifest.shards, info))
        manifest.write(dest)
    return manifest


def _members(
    stream: SceneStream, start: int, stop: int, size: int, chunk: int = 500
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of each sample of range(start, stop)."""
    for first in range(start, stop, chunk):
        drawn = stream.samples(first, min(first + chunk, stop))
        batch = render_samples(drawn, size)
        for index, (sample, pixels) in enumerate(zip(drawn, batch, strict=True), first):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            content = json.dumps(sample.to_json()).encode()
            yield f"{index:08d}", {"png": png.getvalue(), "json": content}


def heldout_prompts(count: int, seed: int) -> list[Prompt]:
    """Prompts of held-out compositions, cycling through the categories.

    Within a category every held-out composition is used before one is repeated. The list of a
    smaller count is a prefix.
    """
    prompts = []
    for index in range(count):
        category = CATEGORIES[index % len(CATEGORIES)]
        specs = caption_specs(category, "heldout")
        epoch, position = divmod(index // len(CATEGORIES), len(specs))
        order = _prompt_order(category, seed, epoch)
        rng = np.random.default_rng((_PROMPT_STREAM, seed, index))
        spec, _ = _vary(specs[order[position]], rng, "heldout")
        prompts.append(Prompt(spec))
    return prompts


@functools.cache
def _prompt_order(category: str, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of a category's held-out compositions in one pass over them."""
    rng = np.random.default_rng((_ORDER_STREAM, seed, epoch, CATEGORIES.index(category)))
    return tuple(rng.permutation(len(caption_specs(category, "heldout"))).tolist())
