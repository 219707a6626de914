"""Files that are whole or absent, and WebDataset tars read by their headers through a memory map.

Tars are written as plain ustar with time and owner fixed: the same samples give the same bytes. The
reader also understands the GNU and pax long names of other people's tars, and refuses whatever
could reach outside the folder: links, devices, absolute names, names with "..".
"""

from __future__ import annotations

import mmap
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 512  # bytes; a tar is made of blocks of this size
END = bytes(2 * BLOCK)  # what a tar ends with


class ShardError(ValueError):
    """A tar that cannot be read to its end, or holds a member that is not safe to read."""

    def __init__(self, message: str, last_key: str | None = None):
        super().__init__(message)
        self.last_key = last_key


class TruncatedShardError(ShardError):
    """A tar that ends, or makes no sense, before its end mark; names it and the last good key."""


# The header of an empty, nameless plain file: mode 0644, and time, user and group 0.
_BLANK = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


def header(name: str, size: int) -> bytes:
    """The tar header of a plain file: ustar, after a pax record where the name needs one.

    The bytes are those of `tarfile`, which takes ten times as long for a name that needs no record.
    """
    encoded = name.encode()
    if len(encoded) > 100 or size >= 8**11 or not name.isascii():
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.PAX_FORMAT)
    block = bytearray(_BLANK)
    block[: len(encoded)] = encoded
    block[124:135] = b"%011o" % size
    block[148:156] = b" " * 8  # the checksum is taken as if it were blank
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@dataclass(frozen=True)
class Sample:
    """Where one sample lies in a tar: extension -> (first byte, byte after the last)."""

    key: str
    spans: dict[str, tuple[int, int]]


def map_file(path: Path) -> mmap.mmap:
    """A read-only memory map of a tar; ShardError where it is empty or compressed."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise TruncatedShardError(f"{path}: the file is empty")
        if file.read(2) == b"\x1f\x8b":
            raise ShardError(f"{path}: a gzip-compressed tar; decompress it first with gunzip")
        # From Python 3.13 on a map need not keep its file open: thousands of shards, no open files.
        keep = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, **keep)


def scan(
    buffer: mmap.mmap, path: Path, on_refused: Callable[[str, str], None] | None = None
) -> Iterator[Sample]:
    """The samples of a mapped tar, by its headers only: consecutive members of one key.

    A key is a member's path up to the first "." of its file name, as in WebDataset. A link, a
    device, an absolute name or one with ".." is given to `on_refused(name, reason)` and left out;
    without it ShardError. TruncatedShardError where the tar ends before its end mark or a header is
    damaged: the samples before the one under way have been yielded by then.
    """
    key: str | None = None
    last: str | None = None
    spans: dict[str, tuple[int, int]] = {}
    try:
        for name, kind, start, stop in _members(buffer):
            reason = _refusal(name, kind)
            if reason is not None:
                if on_refused is None:
                    raise ShardError(f"{path}: member {name!r} {reason}", last)
                on_refused(name, reason)
                continue
            if kind == b"5" or name.endswith("/"):
                continue
            folder, slash, file_name = name.removeprefix("./").rpartition("/")
            stem, _, extension = file_name.partition(".")
            here = folder + slash + stem
            if here != key or extension.lower() in spans:
                if key is not None:
                    yield Sample(key, spans)
                    last = key
                key, spans = here, {}
            spans[extension.lower()] = (start, stop)
    except _Damaged as damage:
        good = "no sample is whole" if last is None else f"the last good sample is {last!r}"
        raise TruncatedShardError(f"{path}: {damage}; {good}", last) from None
    if key is not None:
        yield Sample(key, spans)


def iterate_shard(
    path: Path, on_refused: Callable[[str, str], None] | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: bytes}) of a tar's samples, in order; raises what `scan` raises."""
    path = Path(path)
    with map_file(path) as buffer:
        for sample in scan(buffer, path, on_refused):
            yield sample.key, {name: buffer[a:b] for name, (a, b) in sample.spans.items()}


class _Damaged(Exception):
    """Why the headers cannot be followed any further."""


def _members(buffer: mmap.mmap) -> Iterator[tuple[str, bytes, int, int]]:
    """(name, type flag, first byte, byte after the last) of each member, long names resolved."""
    at, total = 0, len(buffer)
    long_name: str | None = None
    long_size: int | None = None
    ended = False
    while at + BLOCK <= total:
        block = buffer[at : at + BLOCK]
        if not block[0] and not any(block):
            ended, at = True, at + BLOCK  # tars that were joined with `cat` go on after the zeros
            continue
        ended = False
        size = _checked_size(block)
        start, kind = at + BLOCK, block[156:157]
        if long_size is not None and kind not in b"xgLK":
            size, long_size = long_size, None
        at = start + size + -size % BLOCK
        if start + size > total:
            has = f"{_name(block)!r} has {total - start:,} of {size:,} bytes"
            raise _Damaged(f"the tar is cut short: {has}")
        if kind == b"x":
            records = dict(_pax_records(buffer[start : start + size]))
            if b"path" in records:
                long_name = records[b"path"].decode("utf-8", "replace")
            if records.get(b"size", b"").isdigit():
                long_size = int(records[b"size"])
        elif kind == b"L":
            long_name = buffer[start : start + size].rstrip(b"\0").decode("utf-8", "replace")
        elif kind not in b"gK":
            yield (_name(block) if long_name is None else long_name), kind, start, start + size
            long_name = None
    if not ended:
        raise _Damaged("the tar is cut short: it has no end mark")


def _checked_size(block: bytes) -> int:
    """The size a header states, after its checksum was found right."""
    try:
        stated = int(block[148:156].strip(b" \0") or b"0", 8)
        if sum(block) - sum(block[148:156]) + 8 * ord(" ") != stated:
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
    """The "length name=value" lines of a pax header."""
    while data:
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or not len(length) + 2 < int(length) <= len(data):
            raise _Damaged("an extended header is damaged")
        name, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        yield name, value
        data = data[int(length) :]


def _refusal(name: str, kind: bytes) -> str | None:
    """Why a member is not read, or None; folders are harmless and skipped elsewhere."""
    if kind not in (b"0", b"\0", b"7", b"5"):
        return "is a link, a device or a sparse file, not a plain file"
    if name.startswith("/") or ".." in name.split("/"):
        return "has a name that leads outside its folder"
    return None
