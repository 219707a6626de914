"""bench_sample.py: a row by hand, and a tiny run."""

import json
import subprocess
import sys
from pathlib import Path

import bench_sample
from bench_sample import Variant, summary


def test_a_row_by_hand() -> None:
    variant = Variant("reward guidance", batch=8, compiled=True)

    row = summary(variant, times=[2.0, 1.0, 4.0], eager=[4.0, 3.0, 4.0], steps=10)

    assert variant.eager == "reward guidance, batch 8, eager"
    assert row["seconds"] == {"median": 2.0, "p20": 1.0, "p80": 4.0}
    assert row["images_per_second"]["median"] == 4.0
    assert row["ratio"]["eager"] == {"median": 2.0, "p20": 1.0, "p80": 3.0}
    assert row["counted"] == {"evaluations_per_image": 20}


def test_the_script_times_every_variant(tmp_path: Path) -> None:
    command = [sys.executable, bench_sample.__file__, "--batches", "1", "2", "--steps", "2"]
    command += ["--rounds", "2", "--eager-only", "--device", "cpu", "--out", str(tmp_path)]

    run = subprocess.run(command, capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.glob("sample-demo-*.json")
    rows = json.loads(path.read_text())["variants"]
    assert len(rows) == 4
    for name, row in rows.items():
        assert row["ratio"]["eager"]["median"] == 1.0
        assert row["counted"]["evaluations_per_image"] == (4 if "reward" in name else 2)
