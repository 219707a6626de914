"""Jobs run in the order of their dependencies, and an error ends all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from openmoji.jobs import Job, run_jobs


def touch(path: Path, needs: tuple[Path, ...], report) -> None:
    assert all(need.exists() for need in needs), "started before its dependencies"
    report(1, 1, "")
    path.write_text(str(os.getpid()))


def fail(report) -> None:
    raise ValueError("this one fails")


def test_a_job_starts_after_its_dependencies(tmp_path: Path):
    a, b, c = (tmp_path / name for name in "abc")
    seconds = run_jobs(
        [
            Job("c", touch, (c, (a, b)), needs=("a", "b")),
            Job("a", touch, (a, ())),
            Job("b", touch, (b, (a,)), needs=("a",)),
        ],
        workers=2,
    )
    assert set(seconds) == {"a", "b", "c"} and c.exists()


def test_an_error_is_raised_and_later_jobs_are_not_started(tmp_path: Path):
    with pytest.raises(ValueError, match="this one fails"):
        run_jobs(
            [Job("fails", fail), Job("later", touch, (tmp_path / "x", ()), ("fails",))], workers=1
        )
    assert not (tmp_path / "x").exists()


def test_workers_end_if_their_parent_is_killed(tmp_path: Path):
    script = tmp_path / "endless.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, pathlib, sys, time
            from openmoji.jobs import Job, run_jobs

            def endless(path, report):
                pathlib.Path(path).write_text(str(os.getpid()))
                time.sleep(600)

            if __name__ == "__main__":
                run_jobs([Job("endless", endless, (sys.argv[1],))], workers=1)
            """
        )
    )
    pid_file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, str(script), str(pid_file)])
    try:
        deadline = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text()):
            assert time.monotonic() < deadline and parent.poll() is None
            time.sleep(0.1)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        worker = int(pid_file.read_text())
        while time.monotonic() < deadline and _alive(worker):
            time.sleep(0.2)
        assert not _alive(worker)
    finally:
        parent.kill()


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
