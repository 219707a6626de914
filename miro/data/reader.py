"""What an encoded dataset folder holds, and how it is read.

{key}.latent.npy        float16 (C, H, W), or (2, C, H, W): mean and standard deviation
{key}.text.{kind}.npy   float16 (length, dim), a caption's token states
{key}.json              as in the images folder it was made from
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from miro.data.index_sampler import SourceRange
from miro.data.npy import npy_shape, npy_view
from miro.data.shards import (
    Manifest,
    ShardIndex,
    ShardInfo,
    read_scores,
    read_shard_scores,
    scores_path,
    write_scores,
)
from miro.utils.atomic_io import atomic_write

Shape = tuple[int, int, int]  # (C, H, W) of a latent

LATENT = "latent.npy"  # the extensions of an encoded sample's members
RECORD = "json"


def text_extension(caption_kind: str) -> str:
    """The member that holds the token states of a sample's caption of this kind."""
    return f"text.{caption_kind}.npy".lower()


class EncodedDataset:
    """A folder made by `miro encode`, memory-mapped.

    latent_shape: (C, H, W) of the network's own grid; shapes: all that occur, and shape_of: (n,)
    which of them each sample has; has_std: whether the latents are posteriors (mean and deviation);
    text_dim; caption_kinds; rewards: names of the scores' columns, which the folder need not have;
    scores: float32 (samples, caption kinds, rewards), raw, NaN where not known; encoding: the
    record of how it was made, with the shapes that occur; parts: its sources, of which it has one.
    """

    def __init__(self, folder: Path | str, rewards: Sequence[str] | None = None) -> None:
        """`rewards`: the columns of `scores`; all the folder has where it is None."""
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if manifest.kind != "encoded" or manifest.encoding is None:
            raise ValueError(
                f"{folder} holds {manifest.kind}, not latents; run `miro encode {folder} DEST` "
                "and train on DEST, or let the run encode as it goes: --on-the-fly True"
            )
        if not manifest.samples:
            raise ValueError(f"{folder} holds no samples yet; let `miro encode` finish a shard")
        self._open(folder, manifest, rewards, ShardIndex(folder, manifest), manifest.encoding)

    def _open(
        self,
        folder: Path,
        manifest: Manifest,
        rewards: Sequence[str] | None,
        index: ShardIndex,
        encoding: Mapping[str, Any],
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.caption_kinds = manifest.captions
        self.rewards = manifest.rewards if rewards is None else tuple(rewards)
        channels, height, width = encoding["latent_shape"]
        self.latent_shape: Shape = (channels, height, width)
        self.has_std = bool(encoding["has_std"])
        self.text_dim = int(encoding["text_dim"])
        self.encoding = dict(encoding)
        self.index = index
        self.keys = self.index.keys
        self.parts = (SourceRange(0, len(self)),)
        self.shapes, self.shape_of = self._scan_shapes()
        if "latent_shapes" in self.encoding:
            self.encoding["latent_shapes"] = [list(shape) for shape in self.shapes]
        self._choices, self._choice_counts = self._scan_captions()
        self.scores = self._aligned_scores()

    def __len__(self) -> int:
        return len(self.keys)

    def latent(self, sample: int) -> np.ndarray:
        """(C, H, W), or (2, C, H, W) mean and standard deviation; float16, a view of the file."""
        return npy_view(self.index.member(sample, LATENT))

    def text(self, sample: int, caption: int) -> np.ndarray:
        """(length, dim) token states of one caption of a sample; float16, a view of the file."""
        return npy_view(self.index.member(sample, text_extension(self.caption_kinds[caption])))

    def latents(self, samples: np.ndarray, mirrored: np.ndarray | None = None) -> np.ndarray:
        """float32 (n, C, H, W), or (n, 2, C, H, W) mean and deviation, of samples of one shape.

        mirrored: which images are seen in a mirror; stored ones never are.
        """
        assert mirrored is None, "a stored latent cannot be mirrored"
        shape = self.shapes[self.shape_of[samples[0]]]
        found = np.empty((len(samples), *((2,) if self.has_std else ()), *shape), np.float32)
        np.stack([self.latent(i) for i in samples], out=found)
        return found

    def texts(self, samples: np.ndarray, captions: np.ndarray) -> list[np.ndarray]:
        """Each sample's token states of one of its captions, float16 (length, dim)."""
        return [self.text(i, c) for i, c in zip(samples, captions, strict=True)]

    def record(self, sample: int) -> dict[str, Any]:
        """The sample's .json: "captions" {kind: text} and whatever else its source said."""
        return json.loads(bytes(self.index.member(sample, RECORD)))

    def choose_captions(self, samples: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """A caption kind for each sample, of those it has: int64 (n,) for int (n,) draws >= 0."""
        kinds = self._choices[samples, draws % self._choice_counts[samples]]
        return kinds.astype(np.int64)

    def _scan_shapes(self) -> tuple[tuple[Shape, ...], np.ndarray]:
        """The shapes that occur, and (n,) which of them each sample has."""
        declared = [tuple(shape) for shape in self.encoding.get("latent_shapes", ())]
        if len(declared) < 2:
            return (self.latent_shape,), np.zeros(len(self), np.uint8)
        number = {shape: k for k, shape in enumerate(declared)}
        found = np.empty(len(self), np.uint8)
        for sample, key in enumerate(self.keys):
            shape = self._shape(sample)
            if shape not in number:
                raise ValueError(
                    f"{self.folder}: the latent of sample {key!r} is {shape}, which its manifest "
                    "does not list; encode it again"
                )
            found[sample] = number[shape]
        held, shape_of = np.unique(found, return_inverse=True)
        return tuple(declared[k] for k in held), shape_of.astype(np.uint8)

    def _shape(self, sample: int) -> tuple[int, ...]:
        """(C, H, W) of a sample's latent."""
        return npy_shape(self.index.member(sample, LATENT))[-3:]

    def _kinds(self, sample: int) -> Collection[str]:
        """The extensions of the captions a sample has."""
        return self.index.extensions(sample)

    def _scan_captions(self) -> tuple[np.ndarray, np.ndarray]:
        """Each sample's caption kinds, uint8 (n, kinds), those it has first; and their count."""
        names = [text_extension(kind) for kind in self.caption_kinds]
        held = np.zeros((len(self), len(names)), bool)
        for sample in range(len(self)):
            extensions = self._kinds(sample)
            held[sample] = [name in extensions for name in names]
        counts = held.sum(1)
        if not counts.all():
            key = self.keys[int(counts.argmin())]
            raise ValueError(
                f"{self.folder}: sample {key!r} has no encoded caption; encode it again"
            )
        return np.argsort(~held, axis=1, kind="stable").astype(np.uint8), counts

    def _aligned_scores(self) -> np.ndarray:
        """The score table as (samples, caption kinds, rewards), in the order of the samples."""
        shape = (len(self), len(self.caption_kinds), len(self.rewards))
        scores = np.full(shape, np.nan, np.float32)
        held = set(self.rewards) & set(self.manifest.rewards)
        if not held:
            return scores
        sample_of = {key: i for i, key in enumerate(self.keys)}
        if len(sample_of) < len(self):
            raise ValueError(
                f"{self.folder}: two shards hold a sample of the same key, so scores cannot be "
                "told apart; make the folder again from sources with distinct keys"
            )
        kind_of = {kind: i for i, kind in enumerate(self.caption_kinds)}
        table = read_scores(self.folder, self.manifest)
        try:
            samples = [sample_of[key] for key in table.keys]
            kinds = [kind_of[caption] for caption in table.captions]
        except KeyError as error:
            raise ValueError(
                f"{self.folder}: the scores name {error}, which no shard holds; run `miro encode` "
                "again, it copies the scores anew"
            ) from None
        for column, name in enumerate(self.rewards):
            if name in held:
                scores[samples, kinds, column] = table.values[:, table.rewards.index(name)]
        return scores


def copy_scores(source: Path, dest: Path, shard: ShardInfo) -> None:
    """Bring the score table of an encoded shard up to date with the source's.

    Rows of samples that could not be encoded are left out. Nothing is done where the source has no
    table, or DEST has the same.
    """
    table, copy = scores_path(source, shard), scores_path(dest, shard)
    if not table.is_file():
        return
    data = table.read_bytes()
    if copy.is_file() and copy.read_bytes() == data:
        return
    keys, kinds, columns = read_shard_scores(table)
    index = ShardIndex(dest, Manifest("encoded", (), (shard,)))
    held = {
        (key, extension) for i, key in enumerate(index.keys) for extension in index.extensions(i)
    }
    kept = [pair in held for pair in zip(keys, map(text_extension, kinds), strict=True)]
    if all(kept):
        atomic_write(copy, data)
        return
    rows = np.flatnonzero(kept)
    write_scores(
        copy,
        [keys[row] for row in rows],
        [kinds[row] for row in rows],
        {name: values[rows] for name, values in columns.items()},
    )
