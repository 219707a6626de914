"""The metrics of a run: JSON lines, and TensorBoard beside them."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends reports to `path`, one JSON object a line, and to a TensorBoard folder.

    A resumed run takes back the lines after the point it resumes from, since it writes them again.
    A disk without room stops no run here, which is for its checkpoints to do: it is logged, lines
    wait in memory for room, and TensorBoard has to do without.
    """

    def __init__(self, path: Path, tensorboard: Path, resumed_at: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if line["images"] <= resumed_at]
        aside = path.with_name(f".{path.name}.writing")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(aside, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 closed by close()
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted run had drawn beyond this point.
        self._board: SummaryWriter | None = SummaryWriter(
            str(tensorboard), purge_step=resumed_at + 1
        )

    def write(self, images: int, values: Mapping[str, float]) -> None:
        record = {"images": images, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(record) + "\n")
        self._on_file(self._file.flush)
        for name, value in values.items():
            self._on_board(
                lambda board, name=name, value=value: board.add_scalar(name, value, images)
            )

    def flush(self) -> None:
        """Put everything on the disk, as a checkpoint does before it counts."""
        self._on_file(self._file.flush)
        self._on_file(lambda: os.fsync(self._file.fileno()))
        self._on_board(lambda board: board.flush())

    def close(self) -> None:
        self._on_file(self._file.close)
        self._on_board(lambda board: board.close())

    def _on_file(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            # What was not written is still in the file's buffer, and is tried again next time.
            log.error("could not write %s: %s", self._file.name, error)

    def _on_board(self, action: Callable[[Any], None]) -> None:
        if self._board is None:
            return
        try:
            action(self._board)
        except OSError as error:
            log.error("could not write %s: %s; no more is", self._board.log_dir, error)
            self._board = None  # Its thread has ended.


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut short by a stop is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s: a line that was cut short is left out", path)
    return records
