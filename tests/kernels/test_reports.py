"""The checked-in kernel report, and the GPU check on a machine without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from miro_kernels.lab import testing
from miro_kernels.lab.cases import CASES, MOST_BYTES, MOST_OVER_INDUCTOR, SHORTFALLS

ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / "profiling" / "results" / "kernels.json").read_text())["rows"]
RESOURCES = {"registers", "spills", "shared", "occupancy", "wide", "narrow", "mma", "atomics"}


def test_the_report_has_a_row_for_every_op_and_direction() -> None:
    expected = [(case.op, direction) for case in CASES for direction in case.directions]

    assert [(row["op"], row["direction"]) for row in ROWS] == expected
    for row in ROWS:
        assert {"sm_80", "sm_90", "sm_100"} <= row["compiled"].keys()
        assert all(found.keys() == RESOURCES for found in row["compiled"].values())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['op']} {row['direction']}")
def test_every_row_of_the_report_meets_its_bounds_or_is_a_known_shortfall(row: dict) -> None:
    key = (row["op"], row["direction"])
    bounds = {
        "bytes_over_least": MOST_BYTES.get(key, float("inf")),
        "bytes_over_inductor": MOST_OVER_INDUCTOR.get(key, float("inf")),
        "error_over_eager": testing.BAR,
    }

    for metric, bound in bounds.items():
        assert row[metric] <= bound or (*key, metric) in SHORTFALLS
    for target in ("sm_80", "sm_90", "sm_100"):
        assert {row["compiled"][target][name] for name in ("spills", "narrow", "atomics")} == {0}


def test_the_readme_has_the_figures_of_the_report() -> None:
    readme = (ROOT / "kernels" / "README.md").read_text()

    for row in ROWS:
        figures = [f"{row[name]:.2f}" for name in row if "_over_" in name]
        assert f"| {' | '.join([row['op'], row['direction'], *figures])} |" in readme


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to check")
def test_the_gpu_check_reports_a_missing_gpu() -> None:
    script = ROOT / "profiling" / "gpu_check.py"

    found = subprocess.run([sys.executable, script], capture_output=True, text=True)

    assert found.returncode == 2 and "has no GPU" in found.stdout
