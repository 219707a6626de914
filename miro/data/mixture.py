"""Training data in one folder, or in several folders mixed by weight.

A mixture file lists them:

    {"sources": [{"folder": "photos", "weight": 2.0}, {"folder": "drawings", "weight": 1.0}]}

Folders are relative to the file. Here two of three samples drawn are photos, whatever the size of
either folder; an epoch has as many draws as all folders have samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from miro.data.dataset_base import Dataset
from miro.data.index_sampler import SourceRange
from miro.data.on_the_fly import OnTheFlyDataset, OnTheFlyEncoders
from miro.data.reader import EncodedDataset
from miro.data.shards import Manifest
from miro.utils.serialize import differences, unknown_name

MAY_DIFFER = ("cut", "latent_shape", "latent_shapes")
"""Encoding fields that need not be equal in all sources of a mixture."""


def open_data(
    path: Path, rewards: Sequence[str] | None = None, encoders: OnTheFlyEncoders | None = None
) -> Dataset:
    """Open a dataset folder or a mixture file.

    Args:
        path: the folder or the file.
        rewards: columns of `scores`; if None, all that every source has.
        encoders: if given, the folders hold images, which are encoded on the fly.

    Raises:
        ValueError: the path is neither, or the sources of the mixture do not match.
    """
    if Path(path).is_file():
        return Mixture(path, rewards, encoders)
    return _open_folder(path, rewards, encoders)


def _open_folder(
    path: Path, rewards: Sequence[str] | None, encoders: OnTheFlyEncoders | None
) -> Dataset:
    if encoders is None:
        return EncodedDataset(path, rewards)
    return OnTheFlyDataset(path, rewards, encoders)


class Mixture:
    """Several datasets as one, the samples of the first source before those of the second.

    Sources may share sample keys, so the keys of a mixture begin with the folder's name. See
    `Dataset` for the attributes and `open_data` for the arguments.
    """

    def __init__(
        self,
        path: Path,
        rewards: Sequence[str] | None = None,
        encoders: OnTheFlyEncoders | None = None,
    ) -> None:
        self.folder = path = Path(path)
        listed = _read(path)
        folders = [path.parent / name for name, _ in listed]
        if rewards is None:
            per_folder = [Manifest.read(folder).rewards for folder in folders]
            rewards = [name for name in per_folder[0] if all(name in names for names in per_folder)]
        self.rewards = tuple(rewards)
        self.sources = [_open_folder(folder, self.rewards, encoders) for folder in folders]
        first = self.sources[0]
        for source in self.sources[1:]:
            _check_same_encoding(path, first, source)
        self.has_std, self.text_dim = first.has_std, first.text_dim
        self.keys = [
            f"{name}/{key}"
            for (name, _), source in zip(listed, self.sources, strict=True)
            for key in source.keys
        ]
        self._starts = np.cumsum([0, *map(len, self.sources)])
        self.source_ranges = tuple(
            SourceRange(int(start), int(stop), weight)
            for start, stop, (_, weight) in zip(
                self._starts[:-1], self._starts[1:], listed, strict=True
            )
        )
        self.caption_types = tuple(
            dict.fromkeys(name for source in self.sources for name in source.caption_types)
        )
        # Per source: its caption types -> indices in `self.caption_types`.
        self._caption_maps = [
            np.array([self.caption_types.index(name) for name in source.caption_types])
            for source in self.sources
        ]
        self.scores = np.full(
            (len(self), len(self.caption_types), len(self.rewards)), np.nan, np.float32
        )
        for part, source, captions in zip(
            self.source_ranges, self.sources, self._caption_maps, strict=True
        ):
            self.scores[part.start : part.stop, captions] = source.scores
        self.shapes = tuple(dict.fromkeys(shape for s in self.sources for shape in s.shapes))
        self.shape_index = np.concatenate(
            [np.array(list(map(self.shapes.index, s.shapes)))[s.shape_index] for s in self.sources]
        )
        self.latent_shape = first.latent_shape
        shapes = {"latent_shapes": [list(shape) for shape in self.shapes]}
        self.encoding: dict[str, Any] = {
            **first.encoding,
            **(shapes if len(self.shapes) > 1 else {}),
            "cut": sum(source.encoding.get("cut", 0) for source in self.sources),
        }

    def __len__(self) -> int:
        return len(self.keys)

    def latents(self, samples: np.ndarray, flip: np.ndarray | None = None) -> np.ndarray:
        """Return latents of one shape, float32; see `Dataset.latents`."""
        shape = self.shapes[self.shape_index[samples[0]]]
        latents = np.empty((len(samples), *((2,) if self.has_std else ()), *shape), np.float32)
        for source, rows in self._rows_by_source(samples):
            own = samples[rows] - self._starts[source]
            own_flip = None if flip is None else flip[rows]
            latents[rows] = self.sources[source].latents(own, own_flip)
        return latents

    def texts(self, samples: np.ndarray, captions: np.ndarray) -> list[np.ndarray]:
        """Return the text states of one caption of each sample; see `Dataset.texts`."""
        by_row: dict[int, np.ndarray] = {}
        for source, rows in self._rows_by_source(samples):
            to_source = {int(ours): own for own, ours in enumerate(self._caption_maps[source])}
            own = np.array([to_source[int(caption)] for caption in captions[rows]])
            texts = self.sources[source].texts(samples[rows] - self._starts[source], own)
            by_row |= dict(zip(rows.tolist(), texts, strict=True))
        return [by_row[row] for row in range(len(samples))]

    def select_captions(self, samples: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Choose a caption that each sample has; see `Dataset.select_captions`."""
        chosen = np.empty(len(samples), np.int64)
        for source, rows in self._rows_by_source(samples):
            own = samples[rows] - self._starts[source]
            captions = self.sources[source].select_captions(own, draws[rows])
            chosen[rows] = self._caption_maps[source][captions]
        return chosen

    def _rows_by_source(self, samples: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(source, indices into `samples`) of each source that occurs."""
        source_of = np.searchsorted(self._starts, samples, "right") - 1
        return [(int(s), np.flatnonzero(source_of == s)) for s in np.unique(source_of)]


def _read(path: Path) -> list[tuple[str, float]]:
    """The (folder, weight) pairs of a mixture file."""
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


def _check_same_encoding(path: Path, first: Dataset, other: Dataset) -> None:
    """Raise ValueError if two sources were encoded in different ways."""
    ours, theirs = (
        {name: value for name, value in data.encoding.items() if name not in MAY_DIFFER}
        for data in (first, other)
    )
    if found := differences(ours, theirs):
        raise ValueError(
            f"{path}: {first.folder} (here) and {other.folder} (there) were encoded in different "
            f"ways ({'; '.join(found)}); encode them with the same settings to mix them"
        )
