"""The best and worst pairs by a reward, as contact sheets: one image a sheet.

Only the shards that hold them are opened, one at a time, and an image is decoded once however many
sheets show it.
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
from miro.inspect.sample_stats import captions_of, image_member
from miro.inspect.score_stats import Columns
from miro.inspect.summary import Sheet, Shown

SIDE = 96  # pixels, the longer side of a thumbnail
CELL = SIDE + 4  # pixels of a sheet that a thumbnail lies in
ACROSS = 8  # thumbnails
MOUNT = "#2b3036"  # what lies between the thumbnails, in a light page and in a dark one
QUALITY = 85


@dataclass(frozen=True)
class _Pair:
    shard: int
    key: str
    kind: str
    score: float

    @property
    def sample(self) -> tuple[int, str]:
        return self.shard, self.key


@dataclass(frozen=True)
class _Seen:
    """A sample: its captions, and its thumbnail uint8 (h, w, 3), or why it cannot be decoded.

    None where the folder has no images at all: then captions are what can be shown.
    """

    captions: Mapping[str, str]
    thumbnail: np.ndarray | str | None


def why_no_images(manifest: Manifest) -> str:
    """Why a dataset's images cannot be shown; empty where they can."""
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
    columns: Columns,
    extremes: Mapping[tuple[str, str], np.ndarray],
    count: int,
) -> tuple[Sheet, ...]:
    """A sheet for each (reward, "best" or "worst") of `extremes`, of up to `count` samples each.

    extremes: pairs, int64, the most extreme first; of the pairs of one sample the first is shown.
    What cannot be decoded is left out of its sheet and named there.
    """
    chosen = _choose(folder, manifest, columns, extremes, count)
    wanted: dict[int, set[str]] = defaultdict(set)
    for pairs in chosen.values():
        for pair in pairs:
            wanted[pair.shard].add(pair.key)
    seen: dict[tuple[int, str], _Seen] = {}
    for shard, keys in sorted(wanted.items()):
        seen |= {(shard, key): sample for key, sample in _samples(folder, manifest, shard, keys)}
    return tuple(_sheet(reward, end, pairs, seen) for (reward, end), pairs in chosen.items())


def _choose(
    folder: Path,
    manifest: Manifest,
    columns: Columns,
    extremes: Mapping[tuple[str, str], np.ndarray],
    count: int,
) -> dict[tuple[str, str], list[_Pair]]:
    """The first `count` distinct samples of each, with the pair that made each one extreme."""
    rows = np.unique(np.concatenate([np.empty(0, np.int64), *extremes.values()]))
    names: dict[int, tuple[int, str, str]] = {}
    shard_of = np.searchsorted(columns.starts, rows, side="right") - 1
    for shard in np.unique(shard_of).tolist():
        keys, kinds, _ = read_shard_scores(scores_path(folder, manifest.shards[shard]))
        for row in rows[shard_of == shard].tolist():
            place = row - int(columns.starts[shard])
            names[row] = shard, keys[place], kinds[place]
    chosen: dict[tuple[str, str], list[_Pair]] = {}
    for (reward, end), found in extremes.items():
        pairs: dict[tuple[int, str], _Pair] = {}
        for row in found.tolist():
            pair = _Pair(*names[row], float(columns.values[reward][row]))
            pairs.setdefault(pair.sample, pair)
        chosen[reward, end] = list(pairs.values())[:count]
    return chosen


def _samples(
    folder: Path, manifest: Manifest, shard: int, keys: set[str]
) -> Iterator[tuple[str, _Seen]]:
    """The samples of one shard with these keys; ValueError for one that the shard does not hold."""
    index = ShardIndex(folder, replace(manifest, shards=(manifest.shards[shard],)))
    places = {key: i for i, key in enumerate(index.keys)}
    for key in sorted(keys):
        if key not in places:
            raise ValueError(
                f"{folder}: the scores name {key!r}, which {manifest.shards[shard].name} does not"
                " hold; delete its score file and run `miro annotate` again"
            )
        i = places[key]
        members = {name: index.member(i, name) for name in index.extensions(i)}
        try:
            blind = why_no_images(manifest)
            thumbnail = None if blind else _thumbnail(_image(members))
        except DecodeError as error:
            thumbnail = str(error)
        yield key, _Seen(captions_of(key, members), thumbnail)


def _image(members: Mapping[str, memoryview]) -> Tensor:
    """uint8 (3, H, W); DecodeError says why there is none."""
    name = image_member(members)
    if name is not None:
        return decode(bytes(members[name]))
    if LATENT not in members:
        raise DecodeError("no image among its members")
    latent = torch.from_numpy(npy_view(members[LATENT]).astype(np.float32))
    pixels = build_codec("pixels").decode(latent[None])[0]
    return (pixels * 255).round().to(torch.uint8)


def _thumbnail(pixels: Tensor) -> np.ndarray:
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    # A few large pixels stay pixels; images that are shrunk are averaged.
    way = Image.Resampling.NEAREST if max(image.size) <= SIDE else Image.Resampling.LANCZOS
    return np.asarray(ImageOps.contain(image, (SIDE, SIDE), way))


def _sheet(
    reward: str, end: str, pairs: list[_Pair], seen: Mapping[tuple[int, str], _Seen]
) -> Sheet:
    shown: list[Shown] = []
    skipped: list[str] = []
    thumbnails: list[np.ndarray] = []
    for pair in pairs:
        sample = seen[pair.sample]
        if isinstance(sample.thumbnail, str):
            skipped.append(f"{pair.key}: {sample.thumbnail}")
            continue
        caption = sample.captions.get(pair.kind, "")
        shown.append(Shown(pair.key, pair.kind, caption, pair.score))
        if sample.thumbnail is not None:
            thumbnails.append(sample.thumbnail)
    if not thumbnails:
        return Sheet(reward, end, tuple(shown), tuple(skipped))
    across = min(ACROSS, len(thumbnails))
    rows = -(-len(thumbnails) // across)
    sheet = Image.new("RGB", (across * CELL, rows * CELL), MOUNT)
    for place, thumbnail in enumerate(thumbnails):
        height, width = thumbnail.shape[:2]
        left = place % across * CELL + (CELL - width) // 2
        top = place // across * CELL + (CELL - height) // 2
        sheet.paste(Image.fromarray(thumbnail), (left, top))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return Sheet(reward, end, tuple(shown), tuple(skipped), across, buffer.getvalue())
