"""What the samples themselves hold, their captions and the sizes of their images.

Only so many are looked at, the first of shards spread evenly over the dataset; no image is
decoded.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from miro.data.reader import LATENT, RECORD
from miro.data.shards import Manifest, check_shard
from miro.images.decoder import DecodeError
from miro.images.pillow import IMAGE_EXTENSIONS, image_size
from miro.inspect.summary import Looks
from miro.sources.sample import RawSample, read_sample
from miro.sources.tar import map_file, scan

MOST_SHARDS = 200  # opened, however many there are
MOST_SIZES = 8  # listed


def captions_of(key: str, members: Mapping[str, bytes | memoryview]) -> dict[str, str]:
    """{kind: caption} of a sample, as `annotate` read them; none where it has no good one."""
    texts = {name: bytes(members[name]) for name in (RECORD, "txt") if name in members}
    # Read as it was then, but for the image, which only has to be named.
    for item in read_sample("", key, {"png": b"", **texts}):
        if isinstance(item, RawSample):
            return item.captions
    return {}


def image_member(extensions: Iterable[str]) -> str | None:
    """The member that holds the image, of those a sample has."""
    names = set(extensions)
    return next((name for name in IMAGE_EXTENSIONS if name in names), None)


def look(folder: Path, manifest: Manifest, limit: int) -> Looks:
    """Look at about `limit` samples, or all where there are no more; ValueError: a bad shard."""
    every = manifest.samples <= limit
    shards = manifest.shards
    if not every:
        count = min(len(shards), MOST_SHARDS, limit)
        shards = tuple(shards[i * len(shards) // count] for i in range(count))
    share = math.ceil(limit / len(shards))
    samples = unusable = no_image = characters = longest = 0
    kinds: Counter[str] = Counter()
    distinct: set[int] = set()  # hashes: a caption may have a megabyte
    sizes: Counter[tuple[int, int]] = Counter()
    for shard in shards:
        path = check_shard(folder, shard)
        with map_file(path) as buffer:
            for sample in itertools.islice(scan(buffer, path), None if every else share):
                samples += 1
                spans = sample.spans
                texts = {n: buffer[slice(*spans[n])] for n in (RECORD, "txt") if n in spans}
                captions = captions_of(sample.key, texts)
                unusable += not captions
                kinds.update(list(captions))
                distinct.update(map(hash, captions.values()))
                characters += sum(map(len, captions.values()))
                longest = max([longest, *map(len, captions.values())])
                image = image_member(spans)
                if image is None:
                    no_image += LATENT not in spans
                    continue
                try:
                    sizes[image_size(buffer[slice(*spans[image])])] += 1
                except DecodeError:
                    no_image += 1
    count = kinds.total()
    found = Looks(
        samples, every, dict(kinds), unusable, count, len(distinct),
        characters / count if count else 0.0, longest, no_image=no_image,
    )  # fmt: skip
    return _with_sizes(found, sizes)


def _with_sizes(looks: Looks, sizes: Counter[tuple[int, int]]) -> Looks:
    if not sizes:
        return looks
    shorter = sorted(min(size) for size in sizes.elements())
    aspect = sorted(width / height for width, height in sizes.elements())
    last = len(aspect) - 1
    quantiles = (0.0, 0.25, 0.5, 0.75, 1.0)
    return replace(
        looks,
        sizes={f"{w} × {h}": count for (w, h), count in sizes.most_common(MOST_SIZES)},
        shorter_side={str(q): float(shorter[round(q * last)]) for q in quantiles},
        aspect={str(q): aspect[round(q * last)] for q in quantiles},
    )
