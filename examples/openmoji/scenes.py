"""Captioned pictures composed from OpenMoji artwork, uncurated on purpose, as the web is.

Six categories after GenEval (Ghosh et al. 2023). Pictures are blurred, faded and noisy at random,
and part of the captions is wrong, so that a model trained on all of them has something to learn
from rewards. `SceneStream(...)[i]` is a pure function of the stream and i: neither the number of
scenes, nor how they are cut into shards, nor where a run was stopped changes one of them.
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
    HARD_KINDS,
    OPPOSITE,
    SIDE_BY_SIDE,
    SPLITS,
    WRONG_KINDS,
    Scene,
    Statement,
    Thing,
    hard_captions,
    holds,
    may_state,
    statements,
    variants,
)
from openmoji.render_scene import SIZE, Degradation, render
from openmoji.sprites import BACKGROUNDS, CONCEPTS

__all__ = [
    "CATEGORIES",
    "HARD_KINDS",
    "Degradation",
    "Prompt",
    "Sample",
    "Scene",
    "SceneStream",
    "Statement",
    "Thing",
    "hard_captions",
    "heldout_prompts",
    "holds",
    "pictures",
    "write_scenes",
]

_ALONE, _IN_COMPANY = 3 / 4, 1 / 2  # width of an object, in picture widths
_NEAR, _MIDDLE, _FAR = 1 / 4, 1 / 2, 3 / 4  # where objects may have their centre
_SAY_BACKGROUND = 0.5  # share of the captions
_WRONG_ENTIRELY = 0.5  # share of the wrong captions; the others are wrong in one fact
_REPLACE_OBJECT = 0.5  # share of the captions wrong in one fact; the others get an attribute wrong
# Of the categories, in their order: pictures of several things have more to teach than of one.
_SHARES = (0.08, 0.16, 0.2, 0.1, 0.22, 0.24)
# Random streams are numbered; the first numbers are those of the scenes, one per split.
_PROMPT_STREAM, _ORDER_STREAM = len(SPLITS), len(SPLITS) + 1


@dataclass(frozen=True)
class Sample:
    """One captioned picture as data: what it shows, what its caption states, what it suffers."""

    scene: Scene
    said: Statement
    degradation: Degradation

    def to_json(self) -> dict[str, Any]:
        """The JSON member of the sample."""
        return {
            "captions": {"original": self.said.caption},
            "scene": self.scene.to_json(),
            "said": self.said.to_json(),
            "wrong": not holds(self.said, self.scene),
            "degradation": asdict(self.degradation),
        }


@dataclass(frozen=True)
class Prompt:
    """A caption to sample from, and what it states."""

    category: str
    caption: str
    said: Statement


@dataclass(frozen=True)
class SceneStream:
    """An endless sequence of samples. Streams of two splits share no random numbers.

    split: "train", "heldout", or "all" compositions. wrong_captions: share of captions that are
    not true of their picture, half of them in everything and half in one fact. strength scales all
    degradations; 0 is clean.
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
        truth, background = _draw_statement(rng, self.split)
        scene = _arrange(truth, background, rng)
        said = truth
        if rng.random() < self.wrong_captions:
            if rng.random() < _WRONG_ENTIRELY:
                said = _other_statement(scene, rng, self.split)
            else:
                said = _one_fact_wrong(truth, scene, rng, self.split)
        return Sample(scene, said, _draw_degradation(rng, self.strength))

    def samples(self, start: int, stop: int) -> list[Sample]:
        """Samples start to stop, the last excluded."""
        return [self[index] for index in range(start, stop)]


def _draw_statement(rng: np.random.Generator, split: str) -> tuple[Statement, str]:
    """A composition of the split put one way or the other, and the background of its scene."""
    category = CATEGORIES[rng.choice(len(CATEGORIES), p=_SHARES)]
    options = statements(category, split)
    return _put(options[rng.integers(len(options))], rng, split)


def _put(said: Statement, rng: np.random.Generator, split: str) -> tuple[Statement, str]:
    """The composition in either order, its background said or not, and that background."""
    if len(said.concepts) == 2 and rng.random() < 0.5:
        relation = None if said.relation is None else OPPOSITE[said.relation]
        said = replace(
            said, concepts=said.concepts[::-1], tints=said.tints[::-1], relation=relation
        )
    background = said.background or tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    # A held-out single would state no composition without its background.
    must_say = split == "heldout" and said.category == "single_object"
    say = rng.random() < _SAY_BACKGROUND or must_say
    return replace(said, background=background if say else None), background


def _other_statement(scene: Scene, rng: np.random.Generator, split: str) -> Statement:
    """A statement about another scene, not true of this one."""
    while True:
        said, _ = _draw_statement(rng, split)
        if not holds(said, scene):
            return said


def _one_fact_wrong(
    truth: Statement, scene: Scene, rng: np.random.Generator, split: str
) -> Statement:
    """The true statement with another object, or else with another count, tint or relation."""
    wrong = {
        kind: [said for said in variants(truth, kind) if may_state(said, split)]
        for kind in WRONG_KINDS
    }
    attributes = [kind for kind in WRONG_KINDS if wrong[kind] and kind != "replaced_object"]
    objects = wrong["replaced_object"]
    if not attributes or (objects and rng.random() < _REPLACE_OBJECT):
        options = objects
    else:
        options = wrong[attributes[rng.integers(len(attributes))]]
    assert options, f"nothing may be wrong in {truth.caption!r}"
    said = options[rng.integers(len(options))]
    assert not holds(said, scene)
    return said


def _arrange(truth: Statement, background: str, rng: np.random.Generator) -> Scene:
    """Where the objects of a true statement lie.

    One object fills the middle, two sit at the ends of a middle line, which the relation chooses
    if there is one and lies across if not, and counted ones take cells of a 2 x 2 lattice.
    """
    concepts = truth.concepts * truth.count
    tints = truth.tints * truth.count or (None,) * len(concepts)
    if truth.category == "counting":
        cells = rng.permutation(4)[: truth.count]
        places = [((_NEAR, _FAR)[cell % 2], (_NEAR, _FAR)[cell // 2]) for cell in cells]
    elif len(concepts) == 2:
        ends = {
            "left of": ((_NEAR, _MIDDLE), (_FAR, _MIDDLE)),
            "above": ((_MIDDLE, _NEAR), (_MIDDLE, _FAR)),
        }
        relation = truth.relation or SIDE_BY_SIDE[rng.integers(len(SIDE_BY_SIDE))]
        places = ends[relation] if relation in ends else ends[OPPOSITE[relation]][::-1]
    else:
        places = [(_MIDDLE, _MIDDLE)]
    width = _ALONE if len(places) == 1 else _IN_COMPANY
    things = [
        Thing(concept, tint, x, y, width)
        for concept, tint, (x, y) in zip(concepts, tints, places, strict=True)
    ]
    return Scene(truth.category, tuple(things), background)


def _draw_degradation(rng: np.random.Generator, strength: float) -> Degradation:
    """Four independent misfortunes, each with its own probability and range."""

    def maybe(probability: float, low: float, high: float, otherwise: float) -> float:
        value = rng.uniform(low, high) if rng.random() < probability else otherwise
        # Rounded so that the JSON member says exactly what was done.
        return round(otherwise + (value - otherwise) * strength, 4)

    return Degradation(
        blur=maybe(0.5, 0.2, 1.7, 0.0),
        saturation=maybe(0.6, 0.1, 1.0, 1.0),
        contrast=maybe(0.5, 0.3, 1.0, 1.0),
        noise=maybe(0.5, 0.0, 0.15, 0.0),
        noise_seed=int(rng.integers(2**32)),
    )


def pictures(samples: Sequence[Sample], size: int = SIZE) -> np.ndarray:
    """The samples' pictures, degraded: uint8 (B, size, size, 3), sRGB."""
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
    """Write a dataset folder of scenes; a folder begun with the same arguments is completed.

    The JSON member of a sample has "scene" (what the picture shows), "said" (what the caption
    states), "wrong" and "degradation". Keys are the sample's number. ValueError if `dest` holds
    something else, or for an argument out of range.
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
    """(key, members) of samples start to stop, drawn a chunk at a time."""
    for first in range(start, stop, chunk):
        drawn = stream.samples(first, min(first + chunk, stop))
        batch = pictures(drawn, size)
        for index, (sample, picture) in enumerate(zip(drawn, batch, strict=True), first):
            png = io.BytesIO()
            Image.fromarray(picture).save(png, "PNG")
            content = json.dumps(sample.to_json()).encode()
            yield f"{index:08d}", {"png": png.getvalue(), "json": content}


def heldout_prompts(n: int, seed: int) -> list[Prompt]:
    """n prompts in compositions that training neither shows nor states, the categories in turn.

    Within a category every held-out composition is used before one is used again. The first
    prompts of a longer list are the shorter list.
    """
    prompts = []
    for index in range(n):
        category = CATEGORIES[index % len(CATEGORIES)]
        round_, place = divmod(index // len(CATEGORIES), len(statements(category, "heldout")))
        order = _prompt_order(category, seed, round_)
        rng = np.random.default_rng((_PROMPT_STREAM, seed, index))
        said, _ = _put(statements(category, "heldout")[order[place]], rng, "heldout")
        prompts.append(Prompt(category, said.caption, said))
    return prompts


@functools.cache
def _prompt_order(category: str, seed: int, round_: int) -> tuple[int, ...]:
    """The order of a category's held-out compositions in one round of prompts."""
    rng = np.random.default_rng((_ORDER_STREAM, seed, round_, CATEGORIES.index(category)))
    return tuple(rng.permutation(len(statements(category, "heldout"))).tolist())
