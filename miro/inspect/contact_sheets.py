"""Contact sheets of the best and worst samples by each reward.

Only the shards of these samples are opened, one at a time, and each image is decoded once.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from miro.data.npy import npy_view
from miro.data.reader import LATENT
from miro.data.shards import Manifest, ShardIndex, read_shard_scores, scores_path
from miro.encoders.vae import build_codec
from miro.images.decoder import DecodeError
from miro.images.pillow import decode
from miro.inspect.sample_stats import image_member, valid_captions
from miro.inspect.score_stats import ScoreColumns
from miro.inspect.summary import ContactSheet, SheetSample

THUMBNAIL = 96  # pixels of the longer side
CELL = THUMBNAIL + 4  # pixels of a thumbnail with its border
MAX_COLUMNS = 8
BACKGROUND = "#2b3036"  # readable on a light page and on a dark one
QUALITY = 85


@dataclass(frozen=True)
class _Pair:
    """An (image, caption) pair and its score."""

    shard: int
    key: str
    caption_type: str
    score: float

    @property
    def sample(self) -> tuple[int, str]:
        return self.shard, self.key


@dataclass(frozen=True)
class _Thumbnail:
    """A sample's captions and its thumbnail, uint8 (h, w, 3), or the error of its image.

    The thumbnail is None if the folder has no images; then only captions are shown.
    """

    captions: Mapping[str, str]
    pixels: np.ndarray | str | None


def why_no_images(manifest: Manifest) -> str:
    """The reason why a dataset's images cannot be shown; empty if they can."""
    latents = (manifest.encoding or {}).get("latents")
    if manifest.kind == "images" or latents == "pixels":
        return ""
    return (
        f"This folder holds latents of {latents}, not images; inspect the folder that it was"
        " encoded from to see them."
    )


def contact_sheets(
    folder: Path,
    manifest: Manifest,
    columns: ScoreColumns,
    extremes: Mapping[tuple[str, str], np.ndarray],
    count: int,
) -> tuple[ContactSheet, ...]:
    """Draw the contact sheets; images that cannot be decoded are left out and named.

    Args:
        folder: The dataset folder.
        manifest: Its manifest.
        columns: Its scores.
        extremes: Pairs, int64, by (reward, "best" or "worst"), the most extreme first. A sample
            with several pairs is shown with the first.
        count: Samples per sheet.
    """
    selected = _select(folder, manifest, columns, extremes, count)
    by_shard: dict[int, set[str]] = defaultdict(set)
    for pairs in selected.values():
        for pair in pairs:
            by_shard[pair.shard].add(pair.key)
    thumbnails: dict[tuple[int, str], _Thumbnail] = {}
    for shard, keys in sorted(by_shard.items()):
        thumbnails |= {(shard, key): t for key, t in _thumbnails(folder, manifest, shard, keys)}
    return tuple(_draw(reward, end, pairs, thumbnails) for (reward, end), pairs in selected.items())


def _select(
    folder: Path,
    manifest: Manifest,
    columns: ScoreColumns,
    extremes: Mapping[tuple[str, str], np.ndarray],
    count: int,
) -> dict[tuple[str, str], list[_Pair]]:
    """The first `count` distinct samples of each sheet, with their most extreme pairs."""
    rows = np.unique(np.concatenate([np.empty(0, np.int64), *extremes.values()]))
    names: dict[int, tuple[int, str, str]] = {}
    shard_of = np.searchsorted(columns.starts, rows, side="right") - 1
    for shard in np.unique(shard_of).tolist():
        keys, caption_types, _ = read_shard_scores(scores_path(folder, manifest.shards[shard]))
        for row in rows[shard_of == shard].tolist():
            index = row - int(columns.starts[shard])
            names[row] = shard, keys[index], caption_types[index]
    selected: dict[tuple[str, str], list[_Pair]] = {}
    for (reward, end), extreme in extremes.items():
        pairs: dict[tuple[int, str], _Pair] = {}
        for row in extreme.tolist():
            pair = _Pair(*names[row], float(columns.values[reward][row]))
            pairs.setdefault(pair.sample, pair)
        selected[reward, end] = list(pairs.values())[:count]
    return selected


def _thumbnails(
    folder: Path, manifest: Manifest, shard: int, keys: set[str]
) -> Iterator[tuple[str, _Thumbnail]]:
    """Yield the thumbnails of samples of one shard; ValueError if the shard lacks one."""
    index = ShardIndex(folder, replace(manifest, shards=(manifest.shards[shard],)))
    positions = {key: i for i, key in enumerate(index.keys)}
    for key in sorted(keys):
        if key not in positions:
            raise ValueError(
                f"{folder}: the scores name {key!r}, which {manifest.shards[shard].name} does not"
                " hold; delete its score file and run `miro annotate` again"
            )
        i = positions[key]
        members = {name: index.member(i, name) for name in index.extensions(i)}
        try:
            pixels = None if why_no_images(manifest) else _shrink(_decode(members))
        except DecodeError as error:
            pixels = str(error)
        yield key, _Thumbnail(valid_captions(key, members), pixels)


def _decode(members: Mapping[str, memoryview]) -> Tensor:
    """Decode a sample's image, or its latent of pixels, to uint8 (3, H, W)."""
    name = image_member(members)
    if name is not None:
        return decode(bytes(members[name]))
    if LATENT not in members:
        raise DecodeError("no image among its members")
    latent = torch.from_numpy(npy_view(members[LATENT]).astype(np.float32))
    pixels = build_codec("pixels").decode(latent[None])[0]
    return (pixels * 255).round().to(torch.uint8)


def _shrink(pixels: Tensor) -> np.ndarray:
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    # Enlarge with sharp pixels, shrink with antialiasing.
    enlarge = max(image.size) <= THUMBNAIL
    resampling = Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
    return np.asarray(ImageOps.contain(image, (THUMBNAIL, THUMBNAIL), resampling))


def _draw(
    reward: str, end: str, pairs: list[_Pair], thumbnails: Mapping[tuple[int, str], _Thumbnail]
) -> ContactSheet:
    samples: list[SheetSample] = []
    skipped: list[str] = []
    images: list[np.ndarray] = []
    for pair in pairs:
        thumbnail = thumbnails[pair.sample]
        if isinstance(thumbnail.pixels, str):
            skipped.append(f"{pair.key}: {thumbnail.pixels}")
            continue
        caption = thumbnail.captions.get(pair.caption_type, "")
        samples.append(SheetSample(pair.key, pair.caption_type, caption, pair.score))
        if thumbnail.pixels is not None:
            images.append(thumbnail.pixels)
    if not images:
        return ContactSheet(reward, end, tuple(samples), tuple(skipped))
    columns = min(MAX_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * CELL, rows * CELL), BACKGROUND)
    for number, image in enumerate(images):
        height, width = image.shape[:2]
        left = number % columns * CELL + (CELL - width) // 2
        top = number // columns * CELL + (CELL - height) // 2
        sheet.paste(Image.fromarray(image), (left, top))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return ContactSheet(reward, end, tuple(samples), tuple(skipped), columns, buffer.getvalue())
