"""rejected.jsonl: one line per skipped sample with the reason, once, however often a run restarts.

Several processes may write one log: each line is added under a lock, after those of others.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from miro.utils.atomic_io import no_space
from miro.utils.locks import locked_file


class RejectedLog:
    """The open log of one dataset folder.

    Lines are written as they come. A unit that is done again meets its own lines and adds none, so
    the file is the same however often the run was stopped.
    """

    def __init__(self, path: Path):
        self.path = path
        self.last = ""  # the reason of the latest line
        self._known: set[tuple[str, str]] = set()
        self._read = 0  # bytes of whole lines that are in `_known`
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by __exit__
        try:
            with self._alone():
                pass
        except BaseException:
            self._file.close()
            raise

    def add(self, source: str, field: str, reason: str) -> None:
        """Set something aside, unless it is already; OSError (ENOSPC) leaves no part of a line."""
        self.last = f"{source}: {reason}"
        with self._alone():
            if (source, field) in self._known:
                return
            content = {"source": source, "field": field, "reason": reason}
            line = json.dumps(content).encode() + b"\n"
            try:
                written = self._file.write(line)
                if written != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                self._file.truncate(self._read)
                raise no_space(self.path, len(line), error) from error
            self._read += len(line)
            self._known.add((source, field))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only process at the log, and know what it says."""
        with locked_file(self._file, self.path.parent):
            self._file.seek(self._read)
            lines = self._file.read().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):  # its process died while it wrote this one
                lines.pop()
                self._file.truncate(self._read + sum(map(len, lines)))
            self._known |= {self._identity(line) for line in lines}
            self._read += sum(map(len, lines))
            yield

    def __len__(self) -> int:
        return len(self._known)

    def __enter__(self) -> RejectedLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._file.close()

    def _identity(self, line: bytes) -> tuple[str, str]:
        try:
            content = json.loads(line)
            return content["source"], content["field"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path}: {line[:80]!r} is not a line of this log") from None
