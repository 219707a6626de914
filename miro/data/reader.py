"""Read a dataset folder that `miro encode` wrote.

The members of a sample:

{key}.latent.npy               float16 (C, H, W), or (2, C, H, W) mean and standard deviation
{key}.text.{caption type}.npy  float16 (tokens, text_dim), the text states of a caption
{key}.json                     as in the images folder it was encoded from
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from miro.data.dataset_base import FolderDataset
from miro.data.npy import npy_shape, npy_view
from miro.data.shards import (
    Manifest,
    ShardIndex,
    ShardInfo,
    read_shard_scores,
    scores_path,
    write_scores,
)
from miro.utils.atomic_io import atomic_write

LATENT = "latent.npy"
RECORD = "json"


def text_extension(caption_type: str) -> str:
    """Return the member extension of the text states of a caption type."""
    return f"text.{caption_type}.npy".lower()


class EncodedDataset(FolderDataset):
    """Memory-mapped latents and text states of an encoded folder; see `Dataset`.

    Args:
        folder: a folder that `miro encode` wrote.
        rewards: columns of `scores`, all rewards of the folder if None.

    Raises:
        ValueError: the folder is not an encoded one, is empty or is damaged.
    """

    def __init__(self, folder: Path | str, rewards: Sequence[str] | None = None) -> None:
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if manifest.kind != "encoded" or manifest.encoding is None:
            raise ValueError(
                f"{folder} holds {manifest.kind}, not latents; run `miro encode {folder} DEST` "
                "and train on DEST, or encode during training with --on-the-fly True"
            )
        if not manifest.samples:
            raise ValueError(f"{folder} holds no samples yet; let `miro encode` finish a shard")
        index = ShardIndex(folder, manifest)
        extensions = {text_extension(name): name.lower() for name in manifest.captions}
        super().__init__(
            folder,
            manifest,
            index,
            manifest.encoding,
            rewards,
            latent_shape_of=lambda sample: npy_shape(index.member(sample, LATENT))[-3:],
            captions_of=lambda sample: [
                extensions[name] for name in index.extensions(sample) if name in extensions
            ],
        )

    def latent(self, sample: int) -> np.ndarray:
        """Return float16 (C, H, W), or (2, C, H, W) mean and standard deviation, as a view."""
        return npy_view(self.index.member(sample, LATENT))

    def text(self, sample: int, caption: int) -> np.ndarray:
        """Return the text states of one caption, float16 (tokens, text_dim), as a view."""
        return npy_view(self.index.member(sample, text_extension(self.caption_types[caption])))

    def metadata(self, sample: int) -> dict[str, Any]:
        """Return the sample's .json: "captions", by type, and further fields of its source."""
        return json.loads(bytes(self.index.member(sample, RECORD)))

    def latents(self, samples: np.ndarray, flip: np.ndarray | None = None) -> np.ndarray:
        """Return latents of one shape, float32; see `Dataset.latents`. `flip` must be None."""
        assert flip is None, "a stored latent cannot be flipped"
        shape = self.shapes[self.shape_index[samples[0]]]
        latents = np.empty((len(samples), *((2,) if self.has_std else ()), *shape), np.float32)
        np.stack([self.latent(i) for i in samples], out=latents)
        return latents

    def texts(self, samples: np.ndarray, captions: np.ndarray) -> list[np.ndarray]:
        """Return the text states of one caption of each sample; see `Dataset.texts`."""
        return [self.text(i, c) for i, c in zip(samples, captions, strict=True)]


def copy_scores(source: Path, dest: Path, shard: ShardInfo) -> None:
    """Copy the score table of a shard from an images folder to its encoded folder.

    Rows of samples that could not be encoded are dropped. Does nothing where the source has no
    table, or `dest` has an equal one.
    """
    table, copy = scores_path(source, shard), scores_path(dest, shard)
    if not table.is_file():
        return
    data = table.read_bytes()
    if copy.is_file() and copy.read_bytes() == data:
        return
    keys, captions, columns = read_shard_scores(table)
    index = ShardIndex(dest, Manifest("encoded", (), (shard,)))
    encoded = {(key, name) for i, key in enumerate(index.keys) for name in index.extensions(i)}
    keep = [pair in encoded for pair in zip(keys, map(text_extension, captions), strict=True)]
    if all(keep):
        atomic_write(copy, data)
        return
    rows = np.flatnonzero(keep)
    write_scores(
        copy,
        [keys[row] for row in rows],
        [captions[row] for row in rows],
        {name: values[rows] for name, values in columns.items()},
    )
