"""WebDataset tars: deterministic headers, and random access through a memory map.

Tars are written as ustar with fixed times and owners, so equal samples give equal bytes. The reader
also supports the long names of GNU and pax, and rejects members that could reach outside the
folder: links, devices, absolute names and names with "..".
"""

from __future__ import annotations

import mmap
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 512  # bytes
END = bytes(2 * BLOCK)  # end-of-archive mark


class ShardError(ValueError):
    """A tar that is truncated or damaged, or has an unsafe member."""


# Header of an empty regular file without a name: mode 0644; time, user and group 0.
_TEMPLATE = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


def header(name: str, size: int) -> bytes:
    """Return the ustar header of a regular file, preceded by a pax header if the name needs one.

    The bytes equal those of `tarfile`, which is ten times slower for short ASCII names.
    """
    encoded = name.encode()
    if len(encoded) > 100 or size >= 8**11 or not name.isascii():
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.PAX_FORMAT)
    block = bytearray(_TEMPLATE)
    block[: len(encoded)] = encoded
    block[124:135] = b"%011o" % size
    block[148:156] = b" " * 8  # the checksum is computed with its own field blank
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@dataclass(frozen=True)
class TarSample:
    """Byte ranges of a sample's members in a tar: extension -> (start, stop)."""

    key: str
    spans: dict[str, tuple[int, int]]


def map_file(path: Path) -> mmap.mmap:
    """Memory-map a tar read-only; raises ShardError if it is empty or compressed."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ShardError(f"{path}: the file is empty")
        if file.read(2) == b"\x1f\x8b":
            raise ShardError(f"{path}: a gzip-compressed tar; decompress it first with gunzip")
        # By default the map duplicates the file descriptor; thousands of shards would exhaust them.
        options = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, **options)


def scan(
    buffer: mmap.mmap, path: Path, on_unsafe: Callable[[str, str], None] | None = None
) -> Iterator[TarSample]:
    """Yield the samples of a mapped tar, consecutive members of one key, reading headers only.

    A key is a member's path up to the first "." of its file name, as in WebDataset. A link, a
    device, an absolute name or a name with ".." is passed to `on_unsafe(name, reason)` and skipped.

    Raises:
        ShardError: an unsafe member, if `on_unsafe` is None; or a truncated tar or a damaged
            header, after the samples before the incomplete one were yielded.
    """
    key: str | None = None
    last: str | None = None
    spans: dict[str, tuple[int, int]] = {}
    try:
        for name, flag, start, stop in _members(buffer):
            reason = _unsafe_reason(name, flag)
            if reason is not None:
                if on_unsafe is None:
                    raise ShardError(f"{path}: member {name!r} {reason}")
                on_unsafe(name, reason)
                continue
            if flag == b"5" or name.endswith("/"):
                continue
            folder, slash, file_name = name.removeprefix("./").rpartition("/")
            stem, _, extension = file_name.partition(".")
            member_key = folder + slash + stem
            if member_key != key or extension.lower() in spans:
                if key is not None:
                    yield TarSample(key, spans)
                    last = key
                key, spans = member_key, {}
            spans[extension.lower()] = (start, stop)
    except _Damaged as damage:
        complete = f"the last complete sample is {last!r}" if last else "no sample is complete"
        raise ShardError(f"{path}: {damage}; {complete}") from None
    if key is not None:
        yield TarSample(key, spans)


def iterate_shard(
    path: Path, on_unsafe: Callable[[str, str], None] | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, {extension: bytes}) of each sample in order; raises what `scan` raises."""
    path = Path(path)
    with map_file(path) as buffer:
        for sample in scan(buffer, path, on_unsafe):
            yield sample.key, {name: buffer[a:b] for name, (a, b) in sample.spans.items()}


class _Damaged(Exception):
    """The headers cannot be parsed any further."""


def _members(buffer: mmap.mmap) -> Iterator[tuple[str, bytes, int, int]]:
    """Yield (name, type flag, start, stop) of each member, with long names resolved."""
    offset, total = 0, len(buffer)
    long_name: str | None = None
    long_size: int | None = None
    ended = False
    while offset + BLOCK <= total:
        block = buffer[offset : offset + BLOCK]
        if not block[0] and not any(block):
            ended, offset = True, offset + BLOCK  # concatenated tars continue after the zeros
            continue
        ended = False
        size = _member_size(block)
        start, flag = offset + BLOCK, block[156:157]
        if long_size is not None and flag not in b"xgLK":
            size, long_size = long_size, None
        offset = start + size + -size % BLOCK
        if start + size > total:
            has = f"{_name(block)!r} has {total - start:,} of {size:,} bytes"
            raise _Damaged(f"the tar is truncated: {has}")
        if flag == b"x":
            records = dict(_pax_records(buffer[start : start + size]))
            if b"path" in records:
                long_name = records[b"path"].decode("utf-8", "replace")
            if records.get(b"size", b"").isdigit():
                long_size = int(records[b"size"])
        elif flag == b"L":
            long_name = buffer[start : start + size].rstrip(b"\0").decode("utf-8", "replace")
        elif flag not in b"gK":
            yield (_name(block) if long_name is None else long_name), flag, start, start + size
            long_name = None
    if not ended:
        raise _Damaged("the tar is truncated: it has no end-of-archive mark")


def _member_size(block: bytes) -> int:
    """The size in a header whose checksum is valid."""
    try:
        checksum = int(block[148:156].strip(b" \0") or b"0", 8)
        if sum(block) - sum(block[148:156]) + 8 * ord(" ") != checksum:
            raise _Damaged("a header is damaged (wrong checksum), or this is not a tar")
        if block[124] & 0x80:  # GNU: base 256, for 8 GB and more
            return int.from_bytes(block[125:136], "big")
        size = int(block[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        raise _Damaged("a header is damaged (not a number), or this is not a tar") from None
    if size < 0:
        raise _Damaged("a header is damaged (a negative size)")
    return size


def _name(block: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "replace")


def _pax_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (name, value) of the "length name=value" lines of a pax header."""
    while data:
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or not len(length) + 2 < int(length) <= len(data):
            raise _Damaged("an extended header is damaged")
        name, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        yield name, value
        data = data[int(length) :]


def _unsafe_reason(name: str, flag: bytes) -> str | None:
    """Why a member must not be read, or None; folders are skipped by the caller."""
    if flag not in (b"0", b"\0", b"7", b"5"):
        return "is a link, a device or a sparse file, not a regular file"
    if name.startswith("/") or ".." in name.split("/"):
        return "has a name that leads outside its folder"
    return None
