"""Where captioned images come from: a folder of images, or WebDataset tars made by others.

A source is cut into units, each of which becomes one shard. The cut depends on the source and the
shard size alone, so a run that is stopped, or shared out among processes, makes the same shards.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from miro.data.decode import IMAGE_EXTENSIONS
from miro.data.tar import Sample, ShardError, map_file, scan

MAX_IMAGE_BYTES = 256 * 2**20
MAX_CAPTION_BYTES = 2**20
MAX_JSON_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Candidate:
    """An image (not decoded yet) with at least one caption. `extra`: what else its JSON says."""

    origin: str
    key: str
    extension: str
    image: bytes
    captions: dict[str, str]
    extra: dict[str, Any]


@dataclass(frozen=True)
class Rejection:
    """A line of rejected.jsonl. `whole`: a sample was lost, not just one caption of several."""

    source: str
    field: str
    reason: str
    whole: bool = True


class Source(Protocol):
    """`total`: how many samples there are, None where only reading would tell.

    `fingerprint`: changes with the samples and with how they are cut into units.
    """

    total: int | None
    fingerprint: str

    def units(self, done: int = 0) -> Iterator[Iterator[Candidate | Rejection]]:
        """What each unit holds, in a fixed order, without the first `done` units."""
        ...


def open_source(path: Path, samples_per_shard: int) -> Source:
    """The source at `path`: a tar, a folder of tars, or a folder with images in it or below it.

    ValueError where there is nothing to read, before any file has been opened.
    """
    if path.is_file():
        if not path.name.endswith(".tar"):
            raise ValueError(f"{path}: neither a folder nor a .tar file")
        return TarSource([path], samples_per_shard)
    tars = sorted(path.glob("*.tar"))
    images, others = _list_images(path)
    if tars and images:
        raise ValueError(f"{path}: holds both tars and images; annotate them one after the other")
    if tars:
        return TarSource(tars, samples_per_shard)
    if not images:
        raise ValueError(
            f"{path}: no images found in it or below it ({others} other files); images end in "
            + ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
        )
    return FolderSource(path, images, samples_per_shard)


class FolderSource:
    """Images anywhere below a folder, each with its caption beside it: the same name, `.txt`."""

    def __init__(self, root: Path, images: list[str], samples_per_shard: int):
        self.total: int | None = len(images)
        self._root = root
        self._images = images
        self._size = samples_per_shard
        self.fingerprint = _fingerprint(["folder", str(samples_per_shard), *images])

    def units(self, done: int = 0) -> Iterator[Iterator[Candidate | Rejection]]:
        keys = unique_keys(os.path.splitext(name)[0] for name in self._images)
        named = list(zip(self._images, keys, strict=True))
        for first in range(done * self._size, len(named), self._size):
            yield (self._read(*item) for item in named[first : first + self._size])

    def _read(self, name: str, key: str) -> Candidate | Rejection:
        stem, extension = os.path.splitext(name)
        image = _read_file(os.path.join(self._root, name), MAX_IMAGE_BYTES)
        if isinstance(image, str):
            return Rejection(name, "image", image)
        text = _read_file(os.path.join(self._root, stem + ".txt"), MAX_CAPTION_BYTES)
        if isinstance(text, str):
            return Rejection(name, "caption", f"{os.path.basename(stem)}.txt {text}")
        caption = read_caption(text)
        if caption.problem:
            return Rejection(name, "caption", caption.problem)
        captions = {"original": caption.text}
        return Candidate(name, key, extension[1:].lower(), image, captions, {})


class TarSource:
    """WebDataset tars: {key}.jpg (or another image) with {key}.txt, or {key}.json with captions."""

    def __init__(self, tars: list[Path], samples_per_shard: int):
        self.total: int | None = None
        self._tars = tars
        self._size = samples_per_shard
        sizes = [f"{tar.name} {tar.stat().st_size}" for tar in tars]
        self.fingerprint = _fingerprint(["tars", str(samples_per_shard), *sizes])

    def units(self, done: int = 0) -> Iterator[Iterator[Candidate | Rejection]]:
        number = 0
        for index, tar in enumerate(self._tars):
            prefix = f"{index:05d}_" if len(self._tars) > 1 else ""
            samples: list[Sample] = []
            refused: list[Rejection] = []
            cut: list[Rejection] = []
            try:
                with closing(map_file(tar)) as buffer:
                    for sample in scan(buffer, tar, _refuse_into(refused, tar.name)):
                        samples.append(sample)
            except ShardError as error:
                cut = [Rejection(tar.name, "shard", str(error).removeprefix(f"{tar}: "))]
            keys = list(unique_keys((s.key for s in samples), prefix))
            for first in range(0, max(len(samples), 1), self._size):
                part = slice(first, first + self._size)
                if number >= done:
                    notes = (
                        refused if first == 0 else [],
                        cut if part.stop >= len(samples) else [],
                    )
                    yield self._read(tar, samples[part], keys[part], *notes)
                number += 1

    def _read(
        self,
        tar: Path,
        samples: list[Sample],
        keys: list[str],
        before: list[Rejection],
        after: list[Rejection],
    ) -> Iterator[Candidate | Rejection]:
        yield from before
        if samples:
            with closing(map_file(tar)) as buffer:
                for sample, key in zip(samples, keys, strict=True):
                    members = {name: buffer[a:b] for name, (a, b) in sample.spans.items()}
                    yield from read_sample(f"{tar.name}:{sample.key}", key, members)
        yield from after


def read_sample(
    origin: str, key: str, members: dict[str, bytes]
) -> Iterator[Candidate | Rejection]:
    """A WebDataset sample, or why not. A bad caption among good ones is set aside alone."""
    extension = next((name for name in IMAGE_EXTENSIONS if name in members), None)
    if extension is None:
        yield Rejection(origin, "image", f"no image among the members {sorted(members)}")
        return
    found: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    if "json" in members:
        try:
            extra = _read_json(members["json"])
        except ValueError as error:
            yield Rejection(origin, "caption", f"the .json {error}")
            return
        found = _captions_of(extra)
    if "txt" in members and "original" not in found:
        found = {"original": members["txt"], **found}
    captions: dict[str, str] = {}
    problems: dict[str, str] = {}
    for kind, value in found.items():
        caption = read_caption(value)
        if caption.problem:
            problems[kind] = caption.problem
        else:
            captions[kind] = caption.text
    if not captions:
        reason = next(iter(problems.values()), "no .txt, and no caption in a .json")
        yield Rejection(origin, "caption", reason)
        return
    for kind, reason in problems.items():
        yield Rejection(origin, f"captions.{kind}", reason, whole=False)
    yield Candidate(origin, key, extension, members[extension], captions, extra)


@dataclass(frozen=True)
class Caption:
    """A caption that can be used, or the problem it has."""

    text: str = ""
    problem: str = ""


def read_caption(value: Any) -> Caption:
    """A caption as a `.txt` (bytes) or a `.json` (a string) holds it, without outer white space."""
    if isinstance(value, bytes):
        if len(value) > MAX_CAPTION_BYTES:
            return Caption(problem=f"the caption has {len(value):,} bytes, more than 1 MB")
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            byte = value[error.start]
            return Caption(problem=f"the caption is not UTF-8 (byte 0x{byte:02x} at {error.start})")
    if not isinstance(value, str):
        return Caption(problem=f"the caption is not text but {type(value).__name__}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        return Caption(problem="the caption is not Unicode text (it holds half a surrogate pair)")
    if size > MAX_CAPTION_BYTES:
        return Caption(problem=f"the caption has {size:,} bytes, more than 1 MB")
    text = value.strip()
    return Caption(text) if text else Caption(problem="the caption is empty")


def unique_keys(names: Iterable[str], prefix: str = "") -> Iterator[str]:
    """A sample key for each name: ASCII, at most 64 characters of its end, no "." and no "/"."""
    taken: set[str] = set()
    repeats: dict[str, int] = {}
    for name in names:
        base = re.sub(r"[^A-Za-z0-9_-]", "_", name)[-64:] or "sample"
        key = base
        while key in taken:
            repeats[base] = repeats.get(base, 1) + 1
            key = f"{base}-{repeats[base]}"
        taken.add(key)
        yield prefix + key


def _list_images(root: Path) -> tuple[list[str], int]:
    """Images below a folder, as sorted relative paths, and the number of other files.

    Hidden files and folders are left out: they are not pictures but what systems keep about them.
    """

    def refuse(error: OSError) -> None:
        raise error  # os.walk would pass over a folder it may not read

    images: list[str] = []
    others = 0
    endings = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
    for folder, folders, files in os.walk(root, onerror=refuse):
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


def _read_file(path: str, limit: int) -> bytes | str:
    """The bytes of a plain file, or why it cannot be read."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return "is not a plain file"
        if status.st_size > limit:
            return f"is too large: {status.st_size:,} bytes, the limit is {limit:,}"
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return "is missing"
    except (PermissionError, NotADirectoryError) as error:
        return f"cannot be read: {error.strerror}"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "is a link to itself"
        raise


def _read_json(data: bytes) -> dict[str, Any]:
    """A JSON object; ValueError says what is wrong with it."""
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"has {len(data):,} bytes, more than {MAX_JSON_BYTES:,}")
    try:
        content = json.loads(data)
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"holds no object but {type(content).__name__}")
    return content


def _captions_of(content: dict[str, Any]) -> dict[str, Any]:
    """Takes the captions out of a sample's JSON: {kind: caption}, kinds fit for a member's name."""
    captions = content.pop("captions", None)
    single = content.pop("caption", None)
    found = dict(captions) if isinstance(captions, dict) else {}
    if isinstance(captions, list):
        found = {"original" if i == 0 else f"original_{i}": text for i, text in enumerate(captions)}
    if single is not None and "original" not in found:
        found = {"original": single, **found}
    return {re.sub(r"[^A-Za-z0-9_-]", "_", kind): text for kind, text in found.items()}


def _refuse_into(rejections: list[Rejection], tar: str) -> Any:
    def refuse(name: str, reason: str) -> None:
        rejections.append(Rejection(f"{tar}:{name}", "member", f"the member {reason}"))

    return refuse


def _fingerprint(parts: list[str]) -> str:
    """SHA-256 in hex of the parts, each ended by a zero byte."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(os.fsencode(part) + b"\0")
    return digest.hexdigest()
