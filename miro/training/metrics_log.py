"""Metrics of a run on disk: metrics.jsonl and TensorBoard."""

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
    """Appends metrics to `path`, one JSON object per line, and to a TensorBoard folder.

    A resumed run first removes the lines after the checkpoint, since it writes them again. A
    full disk is logged and does not stop the run (a checkpoint's error does): lines stay in the
    file's buffer until there is room, and TensorBoard is turned off.
    """

    def __init__(self, path: Path, tensorboard: Path, resumed_at: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = [line for line in read_metrics(path) if line["images"] <= resumed_at]
        staging = path.with_name(f".{path.name}.writing")
        staging.write_text("".join(json.dumps(line) + "\n" for line in earlier))
        os.replace(staging, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 closed by close()
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides the points that an interrupted run wrote after its checkpoint.
        self._board: SummaryWriter | None = SummaryWriter(
            str(tensorboard), purge_step=resumed_at + 1
        )

    def write(self, images: int, values: Mapping[str, float]) -> None:
        """Append the metrics after `images` images."""
        record = {"images": images, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(record) + "\n")
        self._try_file(self._file.flush)
        for name, value in values.items():
            self._try_board(
                lambda board, name=name, value=value: board.add_scalar(name, value, images)
            )

    def flush(self) -> None:
        """Fsync the file; a run does so before each checkpoint."""
        self._try_file(self._file.flush)
        self._try_file(lambda: os.fsync(self._file.fileno()))
        self._try_board(lambda board: board.flush())

    def close(self) -> None:
        """Close both outputs."""
        self._try_file(self._file.close)
        self._try_board(lambda board: board.close())

    def _try_file(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            # The lines are still in the file object's buffer; the next flush writes them.
            log.error("could not write %s: %s", self._file.name, error)

    def _try_board(self, action: Callable[[Any], None]) -> None:
        if self._board is None:
            return
        try:
            action(self._board)
        except OSError as error:
            log.error("could not write %s: %s; TensorBoard is off", self._board.log_dir, error)
            self._board = None  # Its writer thread has ended.


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file; a truncated last line is logged and skipped."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s: a truncated line is skipped", path)
    return records
