"""compare.py: regressions and the exit code."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from compare import compare

SCRIPT = Path(__file__).parents[2] / "profiling" / "compare.py"


def timed(median: float, spread: float = 1.0) -> dict[str, float]:
    return {"median": median, "p20": median - spread, "p80": median + spread}


@pytest.fixture
def record() -> dict[str, Any]:
    return {
        "device": "a machine",
        "variants": {
            "ours": {
                "images_per_second": timed(100),
                "milliseconds": {"forward": timed(10)},
                "counted": {"executed_flops": 500, "launches": {"forward": 7}},
            }
        },
        "ratio": {"eager": timed(3, 0.1)},
    }


def verdicts(before: Any, after: Any) -> dict[str, str]:
    return {c.name.split()[-1]: c.verdict for c in compare(before, after) if c.verdict != "same"}


def test_equal_records_have_no_regression(record: dict) -> None:
    changes = compare(record, copy.deepcopy(record))

    assert len(changes) == 5 and {change.verdict for change in changes} == {"same"}


def test_a_counted_quantity_regresses_by_one(record: dict) -> None:
    after = copy.deepcopy(record)
    after["variants"]["ours"]["counted"] = {"executed_flops": 499, "launches": {"forward": 8}}

    assert verdicts(record, after) == {"executed_flops": "shrank", "forward": "grew"}


def test_a_timed_quantity_regresses_beyond_both_ranges(record: dict) -> None:
    after = copy.deepcopy(record)
    ours = after["variants"]["ours"]
    ours["images_per_second"] = timed(98.5)  # its p80 is above the p20 before
    ours["milliseconds"]["forward"] = timed(12.5)
    after["ratio"]["eager"] = timed(3.5, 0.1)

    assert verdicts(record, after) == {"forward": "slower", "eager": "faster"}


def test_a_lower_rate_is_slower(record: dict) -> None:
    after = copy.deepcopy(record)
    after["variants"]["ours"]["images_per_second"] = timed(90)

    assert verdicts(record, after) == {"images_per_second": "slower"}


def test_a_quantity_cannot_change_from_counted_to_timed(record: dict) -> None:
    after = copy.deepcopy(record)
    after["variants"]["ours"]["counted"]["executed_flops"] = timed(500)

    with pytest.raises(ValueError, match="executed_flops is timed in one file and counted"):
        compare(record, after)


@pytest.mark.parametrize(("grown", "code"), [(0, 0), (1, 1), (None, 2)])
def test_the_exit_code_reports_regressions(
    record: dict, tmp_path: Path, grown: int | None, code: int
) -> None:
    after: Any = copy.deepcopy(record)
    if grown is None:
        after = {"device": "another"}
    else:
        after["variants"]["ours"]["counted"]["executed_flops"] += grown
    files = [tmp_path / "before.json", tmp_path / "after.json"]
    for file, found in zip(files, (record, after), strict=True):
        file.write_text(json.dumps(found))

    run = subprocess.run([sys.executable, SCRIPT, *files], capture_output=True, text=True)

    assert run.returncode == code, run.stderr
    assert ("warning: device differs" in run.stdout) == (grown is None)
