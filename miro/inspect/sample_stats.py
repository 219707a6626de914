"""Statistics of captions and image sizes, from a subset of the samples; no image is decoded."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from miro.data.reader import LATENT, RECORD
from miro.data.shards import Manifest, check_shard
from miro.images.decoder import DecodeError
from miro.images.pillow import IMAGE_EXTENSIONS, image_size
from miro.inspect.summary import SampleStats
from miro.sources.sample import RawSample, read_sample
from miro.sources.tar import map_file, scan

MAX_SHARDS = 200  # opened
MAX_SIZES = 8  # listed
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def valid_captions(key: str, members: Mapping[str, bytes | memoryview]) -> dict[str, str]:
    """The valid captions of a sample by caption type."""
    texts = {name: bytes(members[name]) for name in (RECORD, "txt") if name in members}
    # An encoded sample has no image; an empty one makes its captions a valid sample.
    for sample in read_sample("", key, {"png": b"", **texts}):
        if isinstance(sample, RawSample):
            return sample.captions
    return {}


def image_member(extensions: Iterable[str]) -> str | None:
    """The extension of the image among the members of a sample, None without an image."""
    names = set(extensions)
    return next((name for name in IMAGE_EXTENSIONS if name in names), None)


def read_sample_stats(folder: Path, manifest: Manifest, max_samples: int) -> SampleStats:
    """Read the statistics of at most about `max_samples` samples.

    If the dataset has more, the first samples of shards spread evenly over it are read.

    Raises:
        ValueError: A shard is missing or damaged.
    """
    complete = manifest.samples <= max_samples
    shards = manifest.shards
    if not complete:
        count = min(len(shards), MAX_SHARDS, max_samples)
        shards = tuple(shards[i * len(shards) // count] for i in range(count))
    per_shard = None if complete else math.ceil(max_samples / len(shards))
    samples = without_caption = without_image = characters = max_length = 0
    types: Counter[str] = Counter()
    distinct: set[int] = set()  # hashes, as a caption may have a megabyte
    sizes: Counter[tuple[int, int]] = Counter()
    for shard in shards:
        path = check_shard(folder, shard)
        with map_file(path) as buffer:
            for sample in itertools.islice(scan(buffer, path), per_shard):
                samples += 1
                spans = sample.spans
                texts = {n: buffer[slice(*spans[n])] for n in (RECORD, "txt") if n in spans}
                captions = valid_captions(sample.key, texts)
                without_caption += not captions
                types.update(list(captions))
                distinct.update(map(hash, captions.values()))
                characters += sum(map(len, captions.values()))
                max_length = max([max_length, *map(len, captions.values())])
                image = image_member(spans)
                if image is None:
                    without_image += LATENT not in spans
                    continue
                try:
                    sizes[image_size(buffer[slice(*spans[image])])] += 1
                except DecodeError:
                    without_image += 1
    return SampleStats(
        samples,
        complete,
        caption_types=dict(types),
        without_caption=without_caption,
        captions=types.total(),
        distinct=len(distinct),
        mean_length=characters / types.total() if types else 0.0,
        max_length=max_length,
        without_image=without_image,
        **_size_stats(sizes),
    )


def _size_stats(sizes: Counter[tuple[int, int]]) -> dict[str, Any]:
    if not sizes:
        return {}
    shorter = sorted(min(size) for size in sizes.elements())
    ratios = sorted(width / height for width, height in sizes.elements())
    last = len(ratios) - 1
    return {
        "sizes": {f"{w} × {h}": count for (w, h), count in sizes.most_common(MAX_SIZES)},
        "shorter_side": {str(q): float(shorter[round(q * last)]) for q in QUANTILES},
        "aspect_ratio": {str(q): ratios[round(q * last)] for q in QUANTILES},
    }
