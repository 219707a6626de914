"""Counted quantities do not grow beyond those checked in."""

import json
import subprocess
import sys
from pathlib import Path

import step_budget
from bench_utils import LATENTS
from compare import compare
from count_flops import ours

from miro.training.presets import preset

RESULTS = Path(__file__).parents[2] / "profiling" / "results"


def test_a_step_takes_no_more_launches_flops_or_bytes(tmp_path: Path) -> None:
    """In a subprocess, because global torch state of other tests changes a step."""
    before = json.loads((RESULTS / "budget-small.json").read_text())

    command = [sys.executable, step_budget.__file__, "--without-inductor", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)

    after = json.loads((tmp_path / "budget-small.json").read_text())
    changes = compare(before, after)
    ours = (before["variants"][variant] for variant in ("eager", "fused"))
    groups = [group for variant in ours for group in variant["counted"]]
    assert before["settings"] == after["settings"] and len(changes) == 4 * len(groups)
    assert not [str(change) for change in changes if change.regression]


def test_our_presets_have_the_flops_that_are_checked_in() -> None:
    rows = json.loads((RESULTS / "flops.json").read_text())["rows"]
    own = [row for row in rows if row["model"] in ("small", "large")]

    assert len(own) == 4
    for row in own:
        found = ours(row["model"], preset(row["model"]).model, row["text"], LATENTS)
        assert (found.forward, found.parameters) == (row["forward"], row["parameters"])
