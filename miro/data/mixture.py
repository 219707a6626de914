"""What a run may be told to train on: an encoded folder, or several with weights.

    {"sources": [{"folder": "photos", "weight": 2.0}, {"folder": "drawings", "weight": 1.0}]}

Folders are relative to the file. Of three visits two are then of photos, whatever either's size;
an epoch has as many visits as all sources have samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from miro.data.index_sampler import SourceRange
from miro.data.on_the_fly import OnTheFlyDataset, OnTheFlyEncoders
from miro.data.reader import EncodedDataset
from miro.data.shards import Manifest
from miro.utils.serialize import differences, unknown_name

# What need not be the same in two sources that are mixed.
OWN = ("cut", "latent_shape", "latent_shapes")


def open_data(
    path: Path, rewards: Sequence[str] | None = None, live: OnTheFlyEncoders | None = None
) -> TrainingData:
    """The data set of a folder, or of a mixture's file; with `live`, of folders of images.

    Raises:
        ValueError: it is none, or its sources do not go together.
    """
    if Path(path).is_file():
        return Mixture(path, rewards, live)
    return _open_folder(path, rewards, live)


def _open_folder(
    path: Path, rewards: Sequence[str] | None, live: OnTheFlyEncoders | None
) -> EncodedDataset:
    return EncodedDataset(path, rewards) if live is None else OnTheFlyDataset(path, rewards, live)


class Mixture:
    """Encoded folders as one data set: the samples of the first source, then the second's, ...

    What it has is as in EncodedDataset. Two sources may have samples of the same key, so keys begin
    with the folder's name. `rewards`: those that every source has scores of.
    """

    def __init__(
        self,
        path: Path,
        rewards: Sequence[str] | None = None,
        live: OnTheFlyEncoders | None = None,
    ) -> None:
        self.folder = path = Path(path)
        listed = _read(path)
        folders = [path.parent / name for name, _ in listed]
        if rewards is None:
            held = [Manifest.read(folder).rewards for folder in folders]
            rewards = [name for name in held[0] if all(name in names for names in held)]
        self.rewards = tuple(rewards)
        self.sources = [_open_folder(folder, self.rewards, live) for folder in folders]
        first = self.sources[0]
        for source in self.sources[1:]:
            _check_alike(path, first, source)
        self.has_std, self.text_dim = first.has_std, first.text_dim
        self.keys = [
            f"{name}/{key}"
            for (name, _), source in zip(listed, self.sources, strict=True)
            for key in source.keys
        ]
        self._starts = np.cumsum([0, *map(len, self.sources)])
        self.parts = tuple(
            SourceRange(int(start), int(stop), weight)
            for start, stop, (_, weight) in zip(
                self._starts[:-1], self._starts[1:], listed, strict=True
            )
        )
        self.caption_kinds = tuple(dict.fromkeys(k for s in self.sources for k in s.caption_kinds))
        self._kinds = [np.array(list(map(self.caption_kinds.index, s.caption_kinds)))
                       for s in self.sources]  # fmt: skip
        self.scores = np.full(
            (len(self), len(self.caption_kinds), len(self.rewards)), np.nan, np.float32
        )
        for part, source, kinds in zip(self.parts, self.sources, self._kinds, strict=True):
            self.scores[part.start : part.stop, kinds] = source.scores
        self.shapes = tuple(dict.fromkeys(shape for s in self.sources for shape in s.shapes))
        self.shape_of = np.concatenate(
            [np.array(list(map(self.shapes.index, s.shapes)))[s.shape_of] for s in self.sources]
        )
        self.latent_shape = first.latent_shape
        self.encoding = self._encoding()

    def __len__(self) -> int:
        return len(self.keys)

    def _encoding(self) -> dict[str, Any]:
        """The record of how all were encoded."""
        shapes = {"latent_shapes": [list(shape) for shape in self.shapes]}
        cut = sum(source.encoding.get("cut", 0) for source in self.sources)
        return {**self.sources[0].encoding, **(shapes if len(self.shapes) > 1 else {}), "cut": cut}

    def latents(self, samples: np.ndarray, mirrored: np.ndarray | None = None) -> np.ndarray:
        """float32 (n, C, H, W), or (n, 2, C, H, W) mean and deviation, of samples of one shape."""
        shape = self.shapes[self.shape_of[samples[0]]]
        found = np.empty((len(samples), *((2,) if self.has_std else ()), *shape), np.float32)
        for source, rows in self._sources_of(samples):
            own = samples[rows] - self._starts[source]
            turned = None if mirrored is None else mirrored[rows]
            found[rows] = self.sources[source].latents(own, turned)
        return found

    def texts(self, samples: np.ndarray, captions: np.ndarray) -> list[np.ndarray]:
        """Each sample's token states of one of its captions, float16 (length, dim)."""
        found: dict[int, np.ndarray] = {}
        for source, rows in self._sources_of(samples):
            kind = {int(ours): theirs for theirs, ours in enumerate(self._kinds[source])}
            own = np.array([kind[int(caption)] for caption in captions[rows]])
            texts = self.sources[source].texts(samples[rows] - self._starts[source], own)
            found |= dict(zip(rows.tolist(), texts, strict=True))
        return [found[row] for row in range(len(samples))]

    def choose_captions(self, samples: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """A caption kind for each sample, of those it has: int64 (n,) for int (n,) draws >= 0."""
        chosen = np.empty(len(samples), np.int64)
        for source, rows in self._sources_of(samples):
            own = samples[rows] - self._starts[source]
            kinds = self.sources[source].choose_captions(own, draws[rows])
            chosen[rows] = self._kinds[source][kinds]
        return chosen

    def _sources_of(self, samples: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(source, reward_slots in `samples` of its own) of each source that is among them."""
        source_of = np.searchsorted(self._starts, samples, "right") - 1
        return [(int(s), np.flatnonzero(source_of == s)) for s in np.unique(source_of)]


TrainingData = EncodedDataset | Mixture


def _read(path: Path) -> list[tuple[str, float]]:
    """The (folder, weight) pairs of a mixture's file; ValueError says what is wrong with it."""
    example = '{"sources": [{"folder": "a", "weight": 2.0}, {"folder": "b", "weight": 1.0}]}'
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); a mixture is {example}") from None
    sources = content.get("sources") if isinstance(content, dict) else None
    if not isinstance(sources, list) or not sources or set(content) != {"sources"}:
        raise ValueError(f"{path}: lists no sources; a mixture is {example}")
    listed: list[tuple[str, float]] = []
    for source in sources:
        if not isinstance(source, dict) or not isinstance(source.get("folder"), str):
            raise ValueError(f"{path}: {source!r} names no folder; a mixture is {example}")
        for name in source:
            if name not in ("folder", "weight"):
                raise ValueError(f"{path}: {unknown_name('key', name, ['folder', 'weight'])}")
        folder, weight = source["folder"], source.get("weight", 1.0)
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight < math.inf:
            raise ValueError(f"{path}: the weight of {folder!r} must be above 0, got {weight!r}")
        if folder in dict(listed):
            raise ValueError(f"{path}: {folder!r} is listed twice; give it one weight")
        listed.append((folder, float(weight)))
    return listed


def _check_alike(path: Path, first: EncodedDataset, other: EncodedDataset) -> None:
    """ValueError where two sources were not encoded in the same way."""
    ours, theirs = (
        {name: value for name, value in data.encoding.items() if name not in OWN}
        for data in (first, other)
    )
    if found := differences(ours, theirs):
        raise ValueError(
            f"{path}: {first.folder} (here) and {other.folder} (there) were encoded in different "
            f"ways ({'; '.join(found)}); encode them alike to mix them"
        )
