"""Atomic file writes: a file is complete or absent, and synced before it counts."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def no_space(path: Path, needed: int, error: OSError) -> OSError:
    """Return the error to raise for `error`: on a full disk, one with sizes and a remedy."""
    if error.errno not in DISK_FULL:
        return error
    free = shutil.disk_usage(path.parent).free
    return OSError(
        error.errno,
        f"no space left on the device: at least {needed:,} bytes are needed, {free:,} are free."
        " Make room and run the same command again, complete files are reused. The file is",
        str(path),
    )


@contextmanager
def atomic_file(path: Path, size: int | None = None) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` if the block succeeds and is removed if not.

    `size` in bytes, where known, is for the error message only.

    Raises:
        OSError: on a full disk (ENOSPC, EDQUOT), with the file, the room needed and the room left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        written = temporary.stat().st_size if temporary.exists() else 0
        temporary.unlink(missing_ok=True)
        # An error with another file name was raised by the block itself.
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            raise no_space(path, written if size is None else size, error) from error
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Fsync a file that a library wrote and closed."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that a rename in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a small UTF-8 file atomically."""
    atomic_write(path, text.encode())


def atomic_write(path: Path, data: bytes | Callable[[Path], object]) -> None:
    """Write `data` to `path` atomically; a callable is given the temporary path to write."""
    if isinstance(data, bytes):
        with atomic_file(Path(path), len(data)) as file:
            file.write(data)
    else:
        with atomic_file(Path(path)) as file:
            data(Path(file.name))


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `source` at `target` atomically, or copy where the file system cannot link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        atomic_write(target, lambda path: shutil.copyfile(source, path))
        return
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # rename(2) does nothing if both names are one inode
