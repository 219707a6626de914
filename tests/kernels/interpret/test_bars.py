"""Bytes and errors of every op at the preset's shapes, against the bars they must reach."""

import pytest
import torch

from miro_kernels.lab import measure, testing
from miro_kernels.lab.cases import CASES, MOST_BYTES, SHORTFALLS, Case


@pytest.mark.usefixtures("count")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_bytes(case: Case) -> None:
    moved = measure.bytes_moved(case, torch.bfloat16)

    assert moved.keys() == set(case.directions)
    for direction, found in moved.items():
        most = MOST_BYTES.get((case.op, direction), float("inf"))
        short = (case.op, direction, "bytes_over_least") in SHORTFALLS
        assert 0.999 < found.distinct / found.least <= most
        assert found.kernels / found.least <= most or short


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_errors(case: Case, device: str) -> None:
    assert max(measure.errors(case, torch.bfloat16, device).values()) <= testing.BAR
