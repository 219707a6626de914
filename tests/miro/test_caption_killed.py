"""`caption` killed before each file operation resumes to the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from helpers.corrupt import NOISE_PNG

from miro.prepare.annotate import AnnotateConfig, annotate

KILLED = """
    import itertools, os, signal, sys
    from pathlib import Path
    from miro.prepare.caption import CaptionConfig, caption

    source, table, root = map(Path, sys.argv[1:])

    def run(dest, kill_at=None):
        "Caption in a fork, killed at an event; True if it finished."
        child = os.fork()
        if child == 0:
            event_count = 0
            def watch(event, arguments):
                nonlocal event_count
                if event in ("os.rename", "os.truncate", "os.mkdir") or (
                    event == "open" and arguments[1] and set(arguments[1]) & set("wa")
                ):
                    if event_count == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    event_count += 1
            if kill_at is not None:
                sys.addaudithook(watch)
            caption(source, dest, config=CaptionConfig(table=table, batch_size=2, workers=1))
            os._exit(0)
        return os.waitpid(child, 0)[1] == 0

    def contents(folder):
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    assert run(root / "whole")
    for event in itertools.count():
        dest = root / str(event)
        if run(dest, event):
            break
        assert run(dest)
        assert contents(dest) == contents(root / "whole"), event
    print(event)
"""


def test_a_run_killed_at_any_file_operation_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    keys = [f"{i:02d}" for i in range(7)]
    for key in keys:
        path = tmp_path / "photos" / f"{key}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(NOISE_PNG)
        path.with_suffix(".txt").write_text(f"photo {key}")
    source, table = tmp_path / "source", tmp_path / "captions.parquet"
    annotate(path.parent, source, rewards=[], config=AnnotateConfig(samples_per_shard=3, workers=1))
    rows = [(key, name) for key in keys[1:] for name in ("long", "short")]
    columns = {"key": [key for key, _ in rows], "kind": [name for _, name in rows]}
    pq.write_table(pa.table({**columns, "caption": [f"{k} of {key}" for key, k in rows]}), table)
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])

    script = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(KILLED),
            str(source),
            str(table),
            str(tmp_path / "runs"),
        ],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert script.returncode == 0, script.stderr
    assert int(script.stdout) >= 12, script.stdout  # number of kills
