"""Captions and scenes as data, the compositions they can state, and which are held out.

A `CaptionSpec` is a caption as data, a `Scene` an image as data. The COMPOSITION of a caption is
the combination of words it states, in either order ("a frog left of a fish" is "a fish right of a
frog"):

    single_object       concept, background
    two_objects         {concept, concept}
    counting            concept, count
    colours             concept, tint
    position            concept at one end of an axis, concept at the other
    colour_attribution  {(concept, tint), (concept, tint)}

A single concept combines nothing, so its background is part of its composition; if the caption does
not mention the background, it states no composition. One in eight compositions of each category is
held out, in the order of a stable hash, so that neither the seed nor a library version changes the
split. A word (for attribution, an object with its tint) loses at most about twice that share, so
every word of a category stays in its training compositions.

Training images and training captions, wrong captions included, contain no held-out composition of
their category. The objects of a held-out pair may meet in images of other categories.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from miro.utils.serialize import unknown_name
from openmoji.sprites import BACKGROUNDS, CONCEPTS, TINTS

CATEGORIES = (
    "single_object",
    "two_objects",
    "counting",
    "colours",
    "position",
    "colour_attribution",
)
SPLITS = ("train", "heldout", "all")
HELD_OUT_SHARE = 1 / 8
NUMBERS = {2: "two", 3: "three", 4: "four"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(OPPOSITE)
SIDE_BY_SIDE = RELATIONS[:2]
MIN_DISTANCE = 0.1  # between two centers, in image widths, for a relation to be true
HARD_NEGATIVES = (
    "swapped_objects",
    "flipped_relation",
    "swapped_colours",
    "wrong_count",
    "replaced_object",
)
"""Kinds of captions with one error, by which the alignment reward is evaluated."""
NEGATIVES = (*HARD_NEGATIVES, "wrong_tint")


@dataclass(frozen=True)
class CaptionSpec:
    """A caption as data: concepts[0] is `relation` concepts[1] and has the tint tints[0].

    Attributes:
        category: One of CATEGORIES.
        concepts: One concept, or two different ones.
        tints: None, or one per concept.
        relation: One of RELATIONS, for the category position.
        count: Of concepts[0]; above 1 for the category counting.
        background: None if the caption does not mention it.
    """

    category: str
    concepts: tuple[str, ...]
    tints: tuple[str, ...] = ()
    relation: str | None = None
    count: int = 1
    background: str | None = None

    @property
    def composition(self) -> tuple[str, ...] | None:
        """The category and its words in canonical order; None if the caption states none."""
        match self.category:
            case "single_object":
                if self.background is None:
                    return None
                words = (self.concepts[0], self.background)
            case "two_objects":
                words = tuple(sorted(self.concepts))
            case "counting":
                words = (self.concepts[0], NUMBERS[self.count])
            case "colours":
                words = (self.concepts[0], self.tints[0])
            case "position":
                assert self.relation is not None
                first, second = self.concepts
                if self.relation in ("right of", "below"):
                    first, second = second, first
                axis = "left of" if self.relation in ("left of", "right of") else "above"
                words = (f"{first} first", axis, f"{second} second")
            case "colour_attribution":
                pairs = zip(self.tints, self.concepts, strict=True)
                words = tuple(sorted(f"{tint} {concept}" for tint, concept in pairs))
            case _:
                raise unknown_name("category", self.category, CATEGORIES)
        return (self.category, *words)

    @property
    def caption(self) -> str:
        """The sentence, e.g. "a red frog and a blue car on a pink background"."""
        if self.category == "counting":
            text = f"{NUMBERS[self.count]} {_plural(self.concepts[0])}"
        else:
            nouns = [
                _with_article(" ".join(words))
                for words in zip(*filter(None, (self.tints, self.concepts)), strict=True)
            ]
            text = f" {self.relation or 'and'} ".join(nouns)
        if self.background is not None:
            text += f" on {_with_article(self.background)} background"
        return text

    @property
    def mirrored(self) -> CaptionSpec:
        """The same statement about two concepts in the other order."""
        return replace(
            self,
            concepts=self.concepts[::-1],
            tints=self.tints[::-1],
            relation=None if self.relation is None else OPPOSITE[self.relation],
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> CaptionSpec:
        """The inverse of `to_json`."""
        words = {name: tuple(content[name]) for name in ("concepts", "tints")}
        return cls(**{**content, **words})


@dataclass(frozen=True)
class SceneObject:
    """One object in an image.

    Attributes:
        concept: One of CONCEPTS.
        tint: One of TINTS; None for the drawing's own colors.
        x: Of the center, to the right, in image widths.
        y: Of the center, downwards, in image widths.
        width: In image widths.
    """

    concept: str
    tint: str | None
    x: float
    y: float
    width: float


@dataclass(frozen=True)
class Scene:
    """The content of an image."""

    category: str
    objects: tuple[SceneObject, ...]
    background: str

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Scene:
        """The inverse of `to_json`."""
        return cls(**{**content, "objects": tuple(SceneObject(**o) for o in content["objects"])})


def is_true(spec: CaptionSpec, scene: Scene) -> bool:
    """Whether a caption is true of a scene, by GenEval's rules and its background if mentioned.

    Additional objects do not make a caption false, except more of the counted concept.
    """
    groups = [[o for o in scene.objects if o.concept == concept] for concept in spec.concepts]
    if not all(groups) or spec.background not in (None, scene.background):
        return False
    if spec.category == "counting":
        return len(groups[0]) == spec.count
    if spec.tints:
        pairs = zip(groups, spec.tints, strict=True)
        return all(item.tint == tint for group, tint in pairs for item in group)
    if spec.relation is not None:
        (x0, y0), (x1, y1) = (
            (np.mean([o.x for o in group]), np.mean([o.y for o in group])) for group in groups
        )
        gap = {"left of": x1 - x0, "right of": x0 - x1, "above": y1 - y0, "below": y0 - y1}
        return bool(gap[spec.relation] > MIN_DISTANCE)
    return True


@functools.cache
def caption_specs(category: str, split: str) -> tuple[CaptionSpec, ...]:
    """The compositions of a category in a split, in one order of their concepts each."""
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    specs = _all_specs(category)
    if split == "all":
        return specs
    return tuple(s for s in specs if (s.composition in held_out()) == (split == "heldout"))


@functools.cache
def specs_by_caption() -> dict[str, CaptionSpec]:
    """Every caption that a scene can have, in both orders and with every background."""
    specs = [spec for category in CATEGORIES for spec in _all_specs(category)]
    specs += [spec.mirrored for spec in specs if len(spec.concepts) == 2]
    varied = [replace(s, background=b) for s in specs for b in (None, *BACKGROUNDS)]
    return {spec.caption: spec for spec in varied}


def is_allowed(spec: CaptionSpec, split: str) -> bool:
    """Whether captions of the split may state this; only training has held-out compositions."""
    return split != "train" or spec.composition not in held_out()


@functools.cache
def held_out() -> frozenset[tuple[str, ...]]:
    """The compositions that training images and captions do not contain."""
    chosen: set[tuple[str, ...]] = set()
    for category in CATEGORIES:
        found = [spec.composition for spec in _all_specs(category)]
        compositions = sorted(filter(None, found), key=_stable_hash)
        uses = Counter(word for composition in compositions for word in composition[1:])
        room = {word: math.ceil(2 * HELD_OUT_SHARE * uses[word]) for word in uses}
        remaining = round(HELD_OUT_SHARE * len(compositions))
        for _, *words in compositions:
            if remaining > 0 and all(room[word] > 0 for word in words):
                room |= {word: room[word] - 1 for word in words}
                chosen.add((category, *words))
                remaining -= 1
        assert remaining == 0, f"{category}: {remaining} compositions too few"
    return frozenset(chosen)


def variants(spec: CaptionSpec, kind: str) -> list[CaptionSpec]:
    """All captions that differ from this one by one error of a kind of NEGATIVES; [] if none.

    Swapped objects are an error in the category position only: "a frog and a fish" stays true, and
    in "a red frog and a blue fish" it is the same as swapped colours.
    """
    if kind not in NEGATIVES:
        raise unknown_name("kind of wrong caption", kind, NEGATIVES)
    position, attribution = spec.category == "position", spec.category == "colour_attribution"
    if kind == "swapped_objects" and position:
        return [replace(spec, concepts=spec.concepts[::-1])]
    if kind == "flipped_relation" and spec.relation is not None:
        return [replace(spec, relation=OPPOSITE[spec.relation])]
    if kind == "swapped_colours" and attribution:
        return [replace(spec, tints=spec.tints[::-1])]
    if kind == "wrong_count" and spec.category == "counting":
        return [replace(spec, count=count) for count in NUMBERS if count != spec.count]
    if kind == "replaced_object":
        return [replace(spec, concepts=words) for words in _replaced(spec.concepts, CONCEPTS)]
    if kind == "wrong_tint":
        return [replace(spec, tints=words) for words in _replaced(spec.tints, tuple(TINTS))]
    return []


def hard_negative(spec: CaptionSpec, kind: str, rng: np.random.Generator) -> str:
    """A random caption with one error of the kind.

    Raises:
        ValueError: The caption cannot have this error (see `variants`).
    """
    options = variants(spec, kind)
    if not options:
        raise ValueError(f"{spec.caption!r} ({spec.category}) cannot have the error {kind!r}")
    return options[rng.integers(len(options))].caption


def _replaced(words: tuple[str, ...], pool: tuple[str, ...]) -> list[tuple[str, ...]]:
    """`words` with one of them replaced by another word of the pool."""
    return [
        (*words[:k], other, *words[k + 1 :])
        for k in range(len(words))
        for other in pool
        if other not in words
    ]


@functools.cache
def _all_specs(category: str) -> tuple[CaptionSpec, ...]:
    """Every composition of a category, once."""
    make = functools.partial(CaptionSpec, category)
    pairs = list(itertools.combinations(CONCEPTS, 2))
    match category:
        case "single_object":
            options = itertools.product(CONCEPTS, BACKGROUNDS)
            found = [make((concept,), background=background) for concept, background in options]
        case "two_objects":
            found = [make(pair) for pair in pairs]
        case "counting":
            options = itertools.product(CONCEPTS, NUMBERS)
            found = [make((concept,), count=count) for concept, count in options]
        case "colours":
            options = itertools.product(CONCEPTS, TINTS)
            found = [make((concept,), tints=(tint,)) for concept, tint in options]
        case "position":
            options = itertools.product(pairs, RELATIONS)
            found = [make(pair, relation=relation) for pair, relation in options]
        case "colour_attribution":
            options = itertools.product(pairs, itertools.permutations(TINTS, 2))
            found = [make(pair, tints=tints) for pair, tints in options]
        case _:
            raise unknown_name("category", category, CATEGORIES)
    return tuple(found)


def _stable_hash(composition: tuple[str, ...]) -> bytes:
    """Unlike `hash`, the same in every process and version."""
    return hashlib.blake2b("|".join(composition).encode(), digest_size=8).digest()


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(concept: str) -> str:
    if concept == "fish":
        return concept
    if concept.endswith("s"):
        return f"{concept}es"
    return f"{concept[:-1]}ies" if concept.endswith("y") else f"{concept}s"
