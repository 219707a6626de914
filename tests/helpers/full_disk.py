"""Small disks, and filling them."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """Mount a tmpfs at `folder`; the test is skipped where this process may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, left: int = 0) -> Path:
    """Fill a disk up to `left` bytes, though others write to it; return the file to delete."""
    filler = disk / "filler"
    try:
        filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - left)))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    return filler
