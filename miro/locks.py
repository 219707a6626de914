"""One process at a time in a folder that is being written."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)


def lock(file: IO[bytes], folder: Path) -> None:
    """Hold `file` until it is closed; ValueError names the folder if another process holds it.

    The lock goes with the process, however it ends. A file system without locks is said once.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{folder}: another process is writing this folder; wait until it ends"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        log.warning("%s: this file system has no locks; run one process only", folder)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make the folder if it is absent, and be the only process that writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab") as file:
        lock(file, folder)
        yield


@contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Wait until no other process of this user and machine is inside a block of this name."""
    path = Path(tempfile.gettempdir()) / f"{name}.{os.getuid()}.lock"
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
