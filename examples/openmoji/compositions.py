"""What a scene or a caption says, which compositions exist, and which of them are held out.

A `Statement` is one caption as data, a `Scene` one picture as data. The COMPOSITION of a statement
is what it combines, whichever way round it is put ("a frog left of a fish" is "a fish right of a
frog"):

    single_object       concept, background
    two_objects         {concept, concept}
    counting            concept, count
    colours             concept, tint
    position            concept at one end of an axis, concept at the other
    colour_attribution  {(concept, tint), (concept, tint)}

A lone concept combines nothing, so its background is part of its composition; with the background
left unsaid it states no composition. One in eight of each category's compositions is held out, in
the order of a fixed hash, so that no seed and no library version decides it. A word (for
attribution, an object with its tint) may lose only about twice that share, which leaves every word
of a category in that category's training compositions.

Training pictures show, and training captions state, wrong captions included, only compositions
that are not held out. A composition belongs to its category: the two objects of a held-out pair do
meet in pictures of other categories, as the words of a held-out colour do.
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
MIN_DISTANCE = 0.1  # picture widths between two centres before one is left of, or above, the other
# One thing wrong. The first five are those an alignment score is judged by.
HARD_KINDS = (
    "swapped_objects",
    "flipped_relation",
    "swapped_colours",
    "wrong_count",
    "replaced_object",
)
WRONG_KINDS = (*HARD_KINDS, "wrong_tint")


@dataclass(frozen=True)
class Statement:
    """What a caption states: concepts[0] is `relation` concepts[1] and has the tint tints[0]."""

    category: str
    concepts: tuple[str, ...]  # one, or two different ones
    tints: tuple[str, ...] = ()  # none, or one per concept
    relation: str | None = None  # one of RELATIONS, in the category position
    count: int = 1  # of concepts[0]; more than one in the category counting
    background: str | None = None  # None: not said

    @property
    def composition(self) -> tuple[str, ...] | None:
        """The words this combines, in one order for all ways to put it; None if it states none."""
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
            things = [
                _with_article(" ".join(words))
                for words in zip(*filter(None, (self.tints, self.concepts)), strict=True)
            ]
            text = f" {self.relation or 'and'} ".join(things)
        if self.background is not None:
            text += f" on {_with_article(self.background)} background"
        return text

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON member."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Statement:
        """The inverse of `to_json`; TypeError or KeyError if it is something else."""
        lists = {name: tuple(content[name]) for name in ("concepts", "tints")}
        return cls(**{**content, **lists})


@dataclass(frozen=True)
class Thing:
    """One object in a picture; x to the right, y down, all three in picture widths."""

    concept: str
    tint: str | None  # None: the drawing's own colours
    x: float  # of the centre
    y: float
    width: float


@dataclass(frozen=True)
class Scene:
    """What is in a picture."""

    category: str
    things: tuple[Thing, ...]
    background: str

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON member."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Scene:
        """The inverse of `to_json`; TypeError or KeyError if it is something else."""
        return cls(**{**content, "things": tuple(Thing(**thing) for thing in content["things"])})


def holds(said: Statement, scene: Scene) -> bool:
    """Whether the statement is true of the scene, by GenEval's rules plus the background if said.

    Objects beyond those named do not make a statement false, except more of the counted concept.
    """
    groups = [[t for t in scene.things if t.concept == concept] for concept in said.concepts]
    if not all(groups) or said.background not in (None, scene.background):
        return False
    if said.category == "counting":
        return len(groups[0]) == said.count
    if said.tints:
        pairs = zip(groups, said.tints, strict=True)
        return all(thing.tint == tint for group, tint in pairs for thing in group)
    if said.relation is not None:
        (x0, y0), (x1, y1) = (
            (np.mean([t.x for t in group]), np.mean([t.y for t in group])) for group in groups
        )
        gap = {"left of": x1 - x0, "right of": x0 - x1, "above": y1 - y0, "below": y0 - y1}
        return bool(gap[said.relation] > MIN_DISTANCE)
    return True


@functools.cache
def statements(category: str, split: str) -> tuple[Statement, ...]:
    """A category's compositions in a split, each put one way; background only where it counts."""
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    every = _every_statement(category)
    if split == "all":
        return every
    return tuple(s for s in every if (s.composition in held_out()) == (split == "heldout"))


def may_state(said: Statement, split: str) -> bool:
    """Whether a caption of the split may state this; only training is kept from anything."""
    return split != "train" or said.composition not in held_out()


@functools.cache
def held_out() -> frozenset[tuple[str, ...]]:
    """The compositions that training neither shows nor states."""
    chosen: set[tuple[str, ...]] = set()
    for category in CATEGORIES:
        every = [s.composition for s in _every_statement(category)]
        compositions = sorted(filter(None, every), key=_stable_hash)
        uses = Counter(word for composition in compositions for word in composition[1:])
        room = {word: math.ceil(2 * HELD_OUT_SHARE * uses[word]) for word in uses}
        wanted = round(HELD_OUT_SHARE * len(compositions))
        for _, *words in compositions:
            if wanted > 0 and all(room[word] > 0 for word in words):
                room |= {word: room[word] - 1 for word in words}
                chosen.add((category, *words))
                wanted -= 1
        assert wanted == 0, f"{category}: {wanted} compositions too few"
    return frozenset(chosen)


def variants(said: Statement, kind: str) -> list[Statement]:
    """Every statement that differs from this one in exactly the thing `kind` names; [] if none.

    Swapped objects are a kind of the category position only: in "a frog and a fish" they change
    nothing, and in "a red frog and a blue fish" they are swapped colours.
    """
    if kind not in WRONG_KINDS:
        raise unknown_name("kind of wrong caption", kind, WRONG_KINDS)
    position, attribution = said.category == "position", said.category == "colour_attribution"
    if kind == "swapped_objects" and position:
        return [replace(said, concepts=said.concepts[::-1])]
    if kind == "flipped_relation" and said.relation is not None:
        return [replace(said, relation=OPPOSITE[said.relation])]
    if kind == "swapped_colours" and attribution:
        return [replace(said, tints=said.tints[::-1])]
    if kind == "wrong_count" and said.category == "counting":
        return [replace(said, count=count) for count in NUMBERS if count != said.count]
    if kind == "replaced_object":
        return [replace(said, concepts=words) for words in _replaced(said.concepts, CONCEPTS)]
    if kind == "wrong_tint":
        return [replace(said, tints=words) for words in _replaced(said.tints, tuple(TINTS))]
    return []


def hard_captions(said: Statement, kind: str, rng: np.random.Generator) -> str:
    """The caption with one thing wrong, drawn from all ways to get it wrong.

    ValueError if nothing of that kind can be wrong in this statement (see `variants`).
    """
    wrong = variants(said, kind)
    if not wrong:
        raise ValueError(f"{said.caption!r} ({said.category}) has nothing for the kind {kind!r}")
    return wrong[rng.integers(len(wrong))].caption


def _replaced(words: tuple[str, ...], pool: tuple[str, ...]) -> list[tuple[str, ...]]:
    """`words` with one of them replaced by a word of the pool that is not among them."""
    return [
        (*words[:k], other, *words[k + 1 :])
        for k in range(len(words))
        for other in pool
        if other not in words
    ]


@functools.cache
def _every_statement(category: str) -> tuple[Statement, ...]:
    """Every composition of a category, once."""
    pairs = list(itertools.combinations(CONCEPTS, 2))
    match category:
        case "single_object":
            found = [
                Statement(category, (concept,), background=background)
                for concept, background in itertools.product(CONCEPTS, BACKGROUNDS)
            ]
        case "two_objects":
            found = [Statement(category, pair) for pair in pairs]
        case "counting":
            found = [
                Statement(category, (concept,), count=count)
                for concept, count in itertools.product(CONCEPTS, NUMBERS)
            ]
        case "colours":
            found = [
                Statement(category, (concept,), tints=(tint,))
                for concept, tint in itertools.product(CONCEPTS, TINTS)
            ]
        case "position":
            found = [
                Statement(category, pair, relation=relation)
                for pair, relation in itertools.product(pairs, RELATIONS)
            ]
        case "colour_attribution":
            found = [
                Statement(category, pair, tints=tints)
                for pair, tints in itertools.product(pairs, itertools.permutations(TINTS, 2))
            ]
        case _:
            raise unknown_name("category", category, CATEGORIES)
    return tuple(found)


def _stable_hash(composition: tuple[str, ...]) -> bytes:
    """The same in every process and version, unlike `hash`."""
    return hashlib.blake2b("|".join(composition).encode(), digest_size=8).digest()


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(concept: str) -> str:
    if concept == "fish":
        return concept
    if concept.endswith("s"):
        return f"{concept}es"
    return f"{concept[:-1]}ies" if concept.endswith("y") else f"{concept}s"
