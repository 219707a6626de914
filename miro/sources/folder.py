"""A folder of images with caption files of the same name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from miro.images.pillow import IMAGE_EXTENSIONS
from miro.sources.sample import (
    ABSENT,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    MAX_JSON_BYTES,
    RejectedSample,
    Samples,
    fingerprint,
    read_file,
    read_sample,
    unique_keys,
)


class FolderSource:
    """Images anywhere below a folder, each with a .txt or .json of the same name next to it."""

    def __init__(self, root: Path, images: list[str], samples_per_shard: int):
        self.total: int | None = len(images)
        self.groups = -(-len(images) // samples_per_shard)
        self.fingerprint = fingerprint(["folder in groups", str(samples_per_shard), *images])
        self._root = root
        self._images = images
        self._size = samples_per_shard

    def partitions(self, group: int, skip: int = 0) -> Iterator[Samples]:
        """Yield the only partition of a group, a slice of the images sorted by name."""
        part = slice(group * self._size, (group + 1) * self._size)
        if skip == 0:
            yield self._read(self._images[part], self._keys[part])

    @cached_property
    def _keys(self) -> list[str]:
        return list(unique_keys(os.path.splitext(name)[0] for name in self._images))

    def _read(self, images: list[str], keys: list[str]) -> Samples:
        for name, key in zip(images, keys, strict=True):
            yield from self._read_one(name, key)

    def _read_one(self, name: str, key: str) -> Samples:
        stem, extension = os.path.splitext(name)
        image = read_file(os.path.join(self._root, name), MAX_IMAGE_BYTES)
        if isinstance(image, str):
            yield RejectedSample(name, "image", image)
            return
        members = {extension[1:].lower(): image}
        base = os.path.basename(stem)
        for suffix, limit in (("json", MAX_JSON_BYTES), ("txt", MAX_CAPTION_BYTES)):
            content = read_file(os.path.join(self._root, f"{stem}.{suffix}"), limit)
            if isinstance(content, bytes):
                members[suffix] = content
            elif content != ABSENT:
                yield RejectedSample(name, "caption", f"{base}.{suffix} {content}")
                return
        if len(members) == 1:
            yield RejectedSample(
                name, "caption", f"{base}.txt {ABSENT}, and there is no {base}.json"
            )
            return
        yield from read_sample(name, key, members)


def list_images(root: Path) -> tuple[list[str], int]:
    """Return the images below a folder, as sorted relative paths, and the number of other files.

    Hidden files and folders are ignored; on macOS, each image may have a hidden "._" twin.
    """

    def fail(error: OSError) -> None:
        raise error  # by default os.walk skips folders it cannot read

    images: list[str] = []
    others = 0
    endings = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = os.path.relpath(folder, root)
        for name in files:
            if name.startswith("."):
                continue
            if name.lower().endswith(endings):
                images.append(name if relative == "." else f"{relative}/{name}")
            else:
                others += 1
    return sorted(images), others
