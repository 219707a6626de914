"""One process at a time in a folder that is being written."""

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


_ABSENT = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What a file system answers that has no locks."""


def lock(file: IO[bytes], folder: Path) -> None:
    """Hold `file` until it is closed; ValueError names the folder if another process holds it.

    The lock goes with the process, however it ends. A file system without locks is said once.
    """
    try:
        _flock(file, folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{folder}: another process is writing this folder; wait until it ends"
        ) from None


@contextmanager
def held(file: IO[bytes], folder: Path) -> Iterator[None]:
    """Wait for `file`, and hold it for the block."""
    _flock(file, folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        _flock(file, folder, fcntl.LOCK_UN)


@lru_cache
def _say_no_locks(folder: Path) -> None:
    log.warning("%s: this file system has no locks; run one process only", folder)


def _flock(file: IO[bytes], folder: Path, operation: int) -> None:
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        _say_no_locks(folder)


@contextmanager
def exclusive_lock(folder: Path, rank: int = 0) -> Iterator[None]:
    """Make the folder if it is absent, and be the only process of this rank that writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / (f".lock-{rank}" if rank else ".lock"), "ab") as file:
        lock(file, folder)
        yield


@contextmanager
def blocking_lock(folder: Path) -> Iterator[None]:
    """Wait for the processes that share the folder, for the moment it takes to write for all."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".turn", "ab") as file, held(file, folder):
        yield


@contextmanager
def machine_lock(name: str) -> Iterator[None]:
    """Wait until no other process of this user and machine is inside a block of this name."""
    path = Path(tempfile.gettempdir()) / f"{name}.{os.getuid()}.lock"
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
