"""WebDataset tars made by others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from miro.images.pillow import IMAGE_EXTENSIONS
from miro.sources.sample import (
    MAX_IMAGE_BYTES,
    RawSample,
    RejectedSample,
    fingerprint,
    read_sample,
    unique_keys,
)
from miro.sources.tar import Sample, ShardError, map_file, scan

READ = frozenset({*IMAGE_EXTENSIONS, "json", "txt"})


class TarSource:
    """Samples {key}.jpg (or another image) with {key}.txt or {key}.json; a group is a tar.

    Other members, like the arrays of an encoded dataset, are passed over and never read.
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

    def units(self, group: int, done: int = 0) -> Iterator[Iterator[RawSample | RejectedSample]]:
        """A unit for each samples_per_shard of a tar, and one for a tar without samples."""
        tar, name = self._tars[group], self._names[group]
        prefix = f"{group:05d}_" if self.groups > 1 else ""
        samples: list[Sample] = []
        refused: list[RejectedSample] = []
        cut: list[RejectedSample] = []
        try:
            with closing(map_file(tar)) as buffer:
                for sample in scan(buffer, tar, _refuse_into(refused, name)):
                    samples.append(sample)
        except ShardError as error:
            cut = [RejectedSample(name, "shard", str(error).removeprefix(f"{tar}: "))]
        keys = list(unique_keys((s.key for s in samples), prefix))
        for first in range(done * self._size, max(len(samples), 1), self._size):
            part = slice(first, first + self._size)
            before = refused if first == 0 else []
            after = cut if part.stop >= len(samples) else []
            yield self._read(group, samples[part], keys[part], before, after)

    def _read(
        self,
        group: int,
        samples: list[Sample],
        keys: list[str],
        before: list[RejectedSample],
        after: list[RejectedSample],
    ) -> Iterator[RawSample | RejectedSample]:
        yield from before
        if samples:
            with closing(map_file(self._tars[group])) as buffer:
                for sample, key in zip(samples, keys, strict=True):
                    origin, members = f"{self._names[group]}:{sample.key}", {}
                    for extension, (start, stop) in sample.spans.items():
                        if extension not in READ:
                            members[extension] = b""  # its name is for a message
                        elif stop - start <= MAX_IMAGE_BYTES:
                            members[extension] = buffer[start:stop]
                        else:
                            reason = f"the .{extension} is too large: {stop - start:,} bytes"
                            yield RejectedSample(origin, "member", reason)
                            break
                    else:
                        yield from read_sample(origin, key, members)
        yield from after


def _refuse_into(rejections: list[RejectedSample], tar: str) -> Callable[[str, str], None]:
    def refuse(name: str, reason: str) -> None:
        rejections.append(RejectedSample(f"{tar}:{name}", "member", f"the member {reason}"))

    return refuse
