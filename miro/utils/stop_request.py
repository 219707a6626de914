"""Requests to stop a run: SIGTERM, SIGHUP and Ctrl-C set a flag that the training loop reads.

`miro train` listens before it imports torch, so a signal during start-up is not lost, and until the
process ends, so a second one does not kill a rank that is leaving.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

# sysexits.h, EX_TEMPFAIL: "the user is invited to retry". Schedulers requeue on it.
EXIT_STOPPED = 75
STOPPED_FILE = "MIRO_STOPPED_FILE"
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

_received: list[int] = []


class Stopped(RuntimeError):
    """A request to stop was received and the run saved a checkpoint."""


def listen() -> Callable[[], None]:
    """Install the signal handlers and return a function that restores the previous ones.

    Python allows handlers in the main thread only; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    previous = {number: signal.signal(number, _handle) for number in SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if _handle not in previous.values():
            _received.clear()

    return restore


def requested() -> bool:
    """Whether a signal was received."""
    return bool(_received)


def _handle(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and signal.SIGINT in _received:
        raise KeyboardInterrupt
    _received.append(number)
    if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
        # Not print, which a signal handler may interrupt and re-enter.
        os.write(2, b"stopping after this step to save; Ctrl-C again leaves at once\n")


def exit_status(environment: Mapping[str, str] = os.environ) -> int:
    """The exit status of a stopped rank.

    torchrun and srun end the other ranks when one exits with another status than 0. Where a launch
    script names a file in MIRO_STOPPED_FILE, the rank creates it and exits with 0, and the script
    itself exits with 75.
    """
    if not (file := environment.get(STOPPED_FILE)):
        return EXIT_STOPPED
    Path(file).touch()
    return 0
