"""What is counted has not grown since it was checked in."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from compare import compare
from count_flops import LATENTS, ours
from step_budget import budget, grouped

from miro.presets import preset

RESULTS = Path(__file__).parents[2] / "profiling" / "results"


@pytest.mark.parametrize(("variant", "backend"), [("eager", "torch"), ("fused", "triton")])
def test_a_step_takes_no_more_launches_flops_or_bytes(variant: str, backend: str) -> None:
    record = json.loads((RESULTS / "budget-small.json").read_text())
    settings = record["settings"]

    rows = budget(preset(settings["preset"]).model, settings["batch"], settings["text"], backend)

    found = {row.group: {"counted": asdict(row)} for row in grouped(rows)}
    before = {
        name: {"counted": row} for name, row in record["variants"][variant]["counted"].items()
    }
    changes = compare(before, found)
    assert found.keys() == before.keys() and len(changes) == 4 * len(before)
    assert not [str(change) for change in changes if change.regression]


def test_our_networks_have_the_flops_that_are_checked_in() -> None:
    rows = json.loads((RESULTS / "flops.json").read_text())["rows"]
    own = [row for row in rows if row["model"] in ("small", "large")]

    assert len(own) == 4
    for row in own:
        found = ours(row["model"], preset(row["model"]).model, row["text"], LATENTS)
        assert (found.forward, found.parameters) == (row["forward"], row["parameters"])
