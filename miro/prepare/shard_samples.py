"""The samples of a shard of images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from miro.data.shards import ShardInfo, shard_path
from miro.sources.sample import RawSample, RejectedSample, read_sample
from miro.sources.tar import iterate_shard


def shard_samples(
    folder: Path, shard: ShardInfo
) -> Iterator[tuple[RawSample | RejectedSample, dict[str, bytes]]]:
    """Yield the samples of a shard in order, and what is rejected of them, with their members."""
    for key, members in iterate_shard(shard_path(folder, shard)):
        for sample in read_sample(f"{shard.name}:{key}", key, members):
            yield sample, members


def image_of(sample: RawSample | RejectedSample) -> bytes | None:
    """The image file of a sample, None if it is rejected."""
    return sample.image if isinstance(sample, RawSample) else None
