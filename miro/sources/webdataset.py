"""WebDataset tars as a source of captioned images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from miro.images.pillow import IMAGE_EXTENSIONS
from miro.sources.sample import (
    MAX_IMAGE_BYTES,
    RejectedSample,
    Samples,
    fingerprint,
    read_sample,
    unique_keys,
)
from miro.sources.tar import ShardError, TarSample, map_file, scan

READ_EXTENSIONS = frozenset({*IMAGE_EXTENSIONS, "json", "txt"})


class TarSource:
    """Samples {key}.jpg (or another image) with {key}.txt or {key}.json; one group per tar.

    Other members, such as the arrays of an encoded dataset, are not read.
    """

    def __init__(self, tars: list[Path], samples_per_shard: int):
        self.total: int | None = None
        self.groups = len(tars)
        self._tars = tars
        self._size = samples_per_shard
        root = os.path.commonpath([os.path.dirname(os.path.abspath(tar)) for tar in tars])
        self._names = [os.path.relpath(tar, root) for tar in tars]
        sizes = [f"{n} {t.stat().st_size}" for n, t in zip(self._names, tars, strict=True)]
        self.fingerprint = fingerprint(["tars in groups", str(samples_per_shard), *sizes])

    def partitions(self, group: int, skip: int = 0) -> Iterator[Samples]:
        """Yield one partition per samples_per_shard of a tar, or one for a tar without samples."""
        tar, name = self._tars[group], self._names[group]
        prefix = f"{group:05d}_" if self.groups > 1 else ""
        samples: list[TarSample] = []
        unsafe: list[RejectedSample] = []
        damage: list[RejectedSample] = []
        try:
            with closing(map_file(tar)) as buffer:
                for sample in scan(buffer, tar, _collect_unsafe(unsafe, name)):
                    samples.append(sample)
        except ShardError as error:
            damage = [RejectedSample(name, "shard", str(error).removeprefix(f"{tar}: "))]
        keys = list(unique_keys((s.key for s in samples), prefix))
        for first in range(skip * self._size, max(len(samples), 1), self._size):
            part = slice(first, first + self._size)
            before = unsafe if first == 0 else []
            after = damage if part.stop >= len(samples) else []
            yield self._read(group, samples[part], keys[part], before, after)

    def _read(
        self,
        group: int,
        samples: list[TarSample],
        keys: list[str],
        before: list[RejectedSample],
        after: list[RejectedSample],
    ) -> Samples:
        yield from before
        if samples:
            with closing(map_file(self._tars[group])) as buffer:
                for sample, key in zip(samples, keys, strict=True):
                    origin, members = f"{self._names[group]}:{sample.key}", {}
                    for extension, (start, stop) in sample.spans.items():
                        if extension not in READ_EXTENSIONS:
                            members[extension] = b""  # only its name is used, in a message
                        elif stop - start <= MAX_IMAGE_BYTES:
                            members[extension] = buffer[start:stop]
                        else:
                            reason = f"the .{extension} is too large: {stop - start:,} bytes"
                            yield RejectedSample(origin, "member", reason)
                            break
                    else:
                        yield from read_sample(origin, key, members)
        yield from after


def _collect_unsafe(rejected: list[RejectedSample], tar: str) -> Callable[[str, str], None]:
    """An `on_unsafe` callback of `scan` that appends to `rejected`."""

    def append(name: str, reason: str) -> None:
        rejected.append(RejectedSample(f"{tar}:{name}", "member", f"the member {reason}"))

    return append
