"""Bytes and errors of every op at the preset's shapes, against their upper bounds."""

from collections.abc import Callable
from itertools import accumulate
from math import ceil
from typing import Any

import pytest
import torch

from miro_kernels import attention, use_backend
from miro_kernels.lab import case_metrics, testing
from miro_kernels.lab.cases import CASES, MOST_BYTES, SHORTFALLS, Case

Count = Callable[..., Any]


@pytest.mark.usefixtures("count")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_bytes(case: Case) -> None:
    moved = case_metrics.counted(case, torch.bfloat16, case.batches[0])

    assert moved.keys() == set(case.directions)
    for direction, counts in moved.items():
        most = MOST_BYTES.get((case.op, direction), float("inf"))
        is_shortfall = (case.op, direction, "bytes_over_least") in SHORTFALLS
        assert 0.999 < counts.distinct / counts.least <= most
        assert counts.kernels / counts.least <= most or is_shortfall


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_errors(case: Case, device: str) -> None:
    if device == "cpu":
        pytest.skip("takes minutes in the interpreter; the kernel report has it")
    assert max(case_metrics.errors(case, torch.bfloat16, device).values()) <= testing.BAR


@pytest.mark.parametrize("lengths", [(0, 0, 0), (0, 3, 200), (64, 64, 64)], ids=str)
def test_attention_multiplies_no_padding(count: Count, lengths: tuple[int, ...]) -> None:
    """Matrix products are of each sample's own keys, rounded up to a tile."""
    heads, size, tokens = 2, 64, 256
    image, text = (len(lengths), tokens, heads, size), (sum(lengths), heads, size)
    given = {name: torch.randn(image).bfloat16() for name in ("q", "k", "v")}
    given |= {name: torch.randn(text).bfloat16() for name in ("text_k", "text_v")}
    given["text_offsets"] = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)

    with use_backend("triton"), count() as traffic:
        attention(**given, longest_text=512)

    in_tiles = sum(tokens + ceil(length / 64) * 64 for length in lengths)
    assert 0 < traffic.multiplications <= 2 * heads * size * tokens * in_tiles
