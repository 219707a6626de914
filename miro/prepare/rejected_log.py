"""rejected.jsonl: one line per rejected sample or caption, with the reason.

Several processes may append to one log. A line is written once, however often a run restarts.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from miro.sources.sample import RejectedSample
from miro.utils.atomic_io import no_space
from miro.utils.locks import locked_file


class RejectedLog:
    """The open log of a dataset folder; lines that it has already are not written again.

    Attributes:
        path: The file.
        last: Source and reason of the latest rejection.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = ""
        self._known: set[tuple[str, str]] = set()
        self._size = 0  # bytes of the complete lines that are in `_known`
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by __exit__
        try:
            with self._locked():
                pass
        except BaseException:
            self._file.close()
            raise

    def add(self, rejection: RejectedSample) -> None:
        """Append a line unless it is known; OSError (ENOSPC) leaves no incomplete line."""
        self.last = f"{rejection.source}: {rejection.reason}"
        identity = rejection.source, rejection.field
        with self._locked():
            if identity in self._known:
                return
            content = {"source": rejection.source, "field": rejection.field}
            line = json.dumps({**content, "reason": rejection.reason}).encode() + b"\n"
            try:
                written = self._file.write(line)
                if written != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                self._file.truncate(self._size)
                raise no_space(self.path, len(line), error) from error
            self._size += len(line)
            self._known.add(identity)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the file, and read the lines that other processes have appended."""
        with locked_file(self._file, self.path.parent):
            self._file.seek(self._size)
            lines = self._file.read().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):  # a process was killed while writing it
                lines.pop()
                self._file.truncate(self._size + sum(map(len, lines)))
            self._known |= {self._identity(line) for line in lines}
            self._size += sum(map(len, lines))
            yield

    def __len__(self) -> int:
        return len(self._known)

    def __enter__(self) -> RejectedLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _identity(self, line: bytes) -> tuple[str, str]:
        try:
            content = json.loads(line)
            return content["source"], content["field"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path}: {line[:80]!r} is not a line of this log") from None
