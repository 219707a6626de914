"""The `Dataset` protocol that training reads from, and the base of datasets in one folder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from miro.data.index_sampler import SourceRange
from miro.data.shards import Manifest, ShardIndex, read_scores

LatentShape = tuple[int, int, int]
"""(C, H, W)."""


class Dataset(Protocol):
    """Latents, text states and scores of n samples, addressed by sample index."""

    folder: Path  # where the data was read from, for messages
    keys: list[str]  # n sample keys
    shapes: tuple[LatentShape, ...]  # all latent shapes that occur
    shape_index: np.ndarray  # integers (n,), index in `shapes` of each sample
    latent_shape: LatentShape  # of the grid that the position embedding refers to
    has_std: bool  # whether latents are posteriors: mean and standard deviation
    text_dim: int  # channels of the text states
    caption_types: tuple[str, ...]  # such as "original"; a sample may lack some of them
    rewards: tuple[str, ...]  # columns of `scores`
    scores: np.ndarray  # float32 (n, caption types, rewards), raw, NaN where missing
    encoding: dict[str, Any]  # how the data was encoded, as in manifest.json
    source_ranges: tuple[SourceRange, ...]  # consecutive, with their sampling weights

    def __len__(self) -> int: ...

    def latents(self, samples: np.ndarray, flip: np.ndarray | None = None) -> np.ndarray:
        """Return float32 (b, C, H, W), or (b, 2, C, H, W) mean and deviation if `has_std`.

        Args:
            samples: int64 (b,) indices of samples of one latent shape.
            flip: bool (b,), which images are flipped horizontally before they are encoded.
        """
        ...

    def texts(self, samples: np.ndarray, captions: np.ndarray) -> list[np.ndarray]:
        """Return the text states, float16 (tokens, text_dim), of one caption of each sample.

        Args:
            samples: int64 (b,) sample indices.
            captions: int64 (b,) indices in `caption_types`.
        """
        ...

    def select_captions(self, samples: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Choose a caption that each sample has, by a random integer >= 0 for each.

        Returns:
            int64 (b,) indices in `caption_types`.
        """
        ...


class FolderDataset:
    """Keys, latent shapes, captions and scores of one dataset folder; see `Dataset`.

    Args:
        folder: the dataset folder, with its manifest and an index of its shards.
        encoding: how latents and text states are encoded, as in manifest.json.
        rewards: columns of `scores`, all rewards of the manifest if None.
        latent_shape_of: sample index -> (C, H, W); called only if `encoding` lists several shapes.
        captions_of: sample index -> the caption types of the sample, in lower case.

    Raises:
        ValueError: a sample has no caption or an unlisted latent shape, or the scores do not match.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        index: ShardIndex,
        encoding: Mapping[str, Any],
        rewards: Sequence[str] | None,
        latent_shape_of: Callable[[int], tuple[int, ...]],
        captions_of: Callable[[int], Collection[str]],
    ) -> None:
        self.folder, self.index, self.keys = folder, index, index.keys
        self.caption_types = manifest.captions
        self.rewards = manifest.rewards if rewards is None else tuple(rewards)
        channels, height, width = encoding["latent_shape"]
        self.latent_shape: LatentShape = (channels, height, width)
        self.has_std = bool(encoding["has_std"])
        self.text_dim = int(encoding["text_dim"])
        self.encoding = dict(encoding)
        self.source_ranges = (SourceRange(0, len(self)),)
        self.shapes, self.shape_index = self._scan_shapes(latent_shape_of)
        if "latent_shapes" in self.encoding:
            self.encoding["latent_shapes"] = [list(shape) for shape in self.shapes]
        self._captions, self._caption_counts = self._scan_captions(captions_of)
        self.scores = self._align_scores(manifest)

    def __len__(self) -> int:
        return len(self.keys)

    def select_captions(self, samples: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Choose a caption that each sample has; see `Dataset.select_captions`."""
        chosen = self._captions[samples, draws % self._caption_counts[samples]]
        return chosen.astype(np.int64)

    def _scan_shapes(
        self, latent_shape_of: Callable[[int], tuple[int, ...]]
    ) -> tuple[tuple[LatentShape, ...], np.ndarray]:
        """The latent shapes that occur, and uint8 (n,) the index in them of each sample."""
        listed = [tuple(shape) for shape in self.encoding.get("latent_shapes", ())]
        if len(listed) < 2:
            return (self.latent_shape,), np.zeros(len(self), np.uint8)
        number = {shape: k for k, shape in enumerate(listed)}
        shape_index = np.empty(len(self), np.uint8)
        for sample, key in enumerate(self.keys):
            shape = latent_shape_of(sample)
            if shape not in number:
                raise ValueError(
                    f"{self.folder}: the latent of sample {key!r} is {shape}, which the manifest "
                    "does not list; encode the folder again"
                )
            shape_index[sample] = number[shape]
        present, shape_index = np.unique(shape_index, return_inverse=True)
        return tuple(listed[k] for k in present), shape_index.astype(np.uint8)

    def _scan_captions(
        self, captions_of: Callable[[int], Collection[str]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (n, caption types), the types each sample has first, and (n,) their number."""
        names = [name.lower() for name in self.caption_types]
        present = np.zeros((len(self), len(names)), bool)
        for sample in range(len(self)):
            captions = captions_of(sample)
            present[sample] = [name in captions for name in names]
        counts = present.sum(1)
        if not counts.all():
            key = self.keys[int(counts.argmin())]
            raise ValueError(
                f"{self.folder}: sample {key!r} has no encoded caption; encode the folder again"
            )
        return np.argsort(~present, axis=1, kind="stable").astype(np.uint8), counts

    def _align_scores(self, manifest: Manifest) -> np.ndarray:
        """The score table as (samples, caption types, rewards), in the order of the samples."""
        shape = (len(self), len(self.caption_types), len(self.rewards))
        scores = np.full(shape, np.nan, np.float32)
        present = set(self.rewards) & set(manifest.rewards)
        if not present:
            return scores
        sample_of = {key: i for i, key in enumerate(self.keys)}
        if len(sample_of) < len(self):
            raise ValueError(
                f"{self.folder}: two shards hold a sample of the same key, so its scores are "
                "ambiguous; make the folder again from sources with distinct keys"
            )
        caption_index = {name: i for i, name in enumerate(self.caption_types)}
        table = read_scores(self.folder, manifest)
        try:
            samples = [sample_of[key] for key in table.keys]
            captions = [caption_index[name] for name in table.captions]
        except KeyError as error:
            raise ValueError(
                f"{self.folder}: the scores name {error}, which is in no shard; run `miro encode` "
                "again to copy the scores anew"
            ) from None
        for column, name in enumerate(self.rewards):
            if name in present:
                scores[samples, captions, column] = table.values[:, table.rewards.index(name)]
        return scores
