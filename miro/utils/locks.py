"""File locks: one process at a time writes a folder.

`flock` itself and not the package filelock, which cannot lock an open data file (rejected.jsonl),
polls while it waits, and on file systems without locks leaves a marker that outlives its process.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

# The errors of a file system that does not implement flock.
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def exclusive_lock(folder: Path, rank: int = 0) -> Iterator[None]:
    """Create `folder` if absent and lock it for one process per rank; ends with the process.

    Raises:
        ValueError: another process holds the lock, or `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder, which is created if absent")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / (f".lock-{rank}" if rank else ".lock"), "ab") as file:
        try:
            _flock(file, folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another process is writing this folder; wait until it ends"
            ) from None
        yield


@contextmanager
def blocking_lock(folder: Path) -> Iterator[None]:
    """Wait for the lock that the processes writing to `folder` share, and hold it for the block."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".turn", "ab") as file, locked_file(file, folder):
        yield


@contextmanager
def locked_file(file: IO[bytes], folder: Path) -> Iterator[None]:
    """Wait for the lock of an open file of `folder`, and hold it for the block."""
    _flock(file, folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        _flock(file, folder, fcntl.LOCK_UN)


@contextmanager
def machine_lock(name: str) -> Iterator[None]:
    """Wait until no other process of this user on this machine is in a block of the same name."""
    folder = Path(tempfile.gettempdir())
    with open(folder / f"{name}.{os.getuid()}.lock", "ab") as file, locked_file(file, folder):
        yield


@lru_cache
def _warn_unsupported(folder: Path) -> None:
    log.warning("%s: this file system has no locks; run one process only", folder)


def _flock(file: IO[bytes], folder: Path, operation: int) -> None:
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _warn_unsupported(folder)
