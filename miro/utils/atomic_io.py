"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

FULL = (errno.ENOSPC, errno.EDQUOT)


def no_space(path: Path, needed: int, error: OSError) -> OSError:
    """The error to raise for `error`: if the disk is full, one that says what a user can do."""
    if error.errno not in FULL:
        return error
    free = shutil.disk_usage(path.parent).free
    return OSError(
        error.errno,
        f"no space left on the device: at least {needed:,} bytes are needed, {free:,} are free."
        " Make room and run the same command again, all that was complete is kept. The file is",
        str(path),
    )


@contextmanager
def atomic_file(path: Path, size: int | None = None) -> Iterator[IO[bytes]]:
    """A file that appears at `path` when the block ends well, and not at all when it does not.

    `size` is the room needed in bytes, where it is known beforehand; it is only for the message.
    OSError (ENOSPC, EDQUOT) names the file, the room needed and the room left.
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
        # An error with another file's name comes from inside the block and says enough.
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            raise no_space(path, written if size is None else size, error) from error
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """fsync a file that was written by other means."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that a rename inside it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a small UTF-8 file atomically: a reader sees the old text or the new, never a part."""
    atomic_write(path, text.encode())


def atomic_write(path: Path, data: bytes | Callable[[Path], object]) -> None:
    """Put `data` at `path`, whole or not at all; a callable writes the path it is given."""
    if isinstance(data, bytes):
        with atomic_file(Path(path), len(data)) as file:
            file.write(data)
    else:
        with atomic_file(Path(path)) as file:
            data(Path(file.name))


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where that cannot be; whole or absent."""
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
    temporary.unlink(missing_ok=True)  # where both were one file already, `replace` does nothing
