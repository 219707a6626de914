"""rejected.jsonl: what was set aside, and why; a line for each, once, whoever stops the run."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import TracebackType

from miro.data.tar import no_space
from miro.locks import lock


class RejectedLog:
    """The open log of one dataset folder. While it is open, no other process can open it.

    Lines are written as they come. A unit that is done again meets its own lines and adds none, so
    the file is the same however often the run was stopped.
    """

    def __init__(self, path: Path):
        self.path = path
        self.last = ""  # the reason of the latest line
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by __exit__
        try:
            lock(self._file, path.parent)
        except ValueError:
            self._file.close()
            raise
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # the process died while it wrote this one
            torn = lines.pop()
            self._file.truncate(self._file.tell() - len(torn))
        self._known = {self._identity(line) for line in lines}

    def add(self, source: str, field: str, reason: str) -> None:
        """Set something aside, unless it is already; OSError (ENOSPC) leaves no part of a line."""
        self.last = f"{source}: {reason}"
        if (source, field) in self._known:
            return
        line = json.dumps({"source": source, "field": field, "reason": reason}).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(end)
            raise no_space(self.path, len(line), error) from error
        self._known.add((source, field))

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
