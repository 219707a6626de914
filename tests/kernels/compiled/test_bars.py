"""Compiled code of every op at the preset's shapes and tiles."""

import pytest
import torch

from miro_kernels.lab import case_metrics
from miro_kernels.lab.cases import CASES, Case
from miro_kernels.lab.resources import MACHINES

MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC"}


@pytest.mark.parametrize("target", MACHINES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_compiled_code(case: Case, target: str) -> None:
    compiled = case_metrics.compiled(case, torch.bfloat16, target)

    assert compiled.keys() == set(case.directions) and all(compiled.values())
    for kernel in (kernel for kernels in compiled.values() for kernel in kernels):
        assert kernel.fits and kernel.occupancy > 0, kernel
        assert kernel.atomics == 0, kernel
        if target in MATRIX:
            assert kernel.spills == 0 and kernel.narrow == 0, kernel


@pytest.mark.parametrize("target", MATRIX)
def test_attention_uses_the_tensor_core_instructions_of_its_target(target: str) -> None:
    (case,) = (case for case in CASES if case.op == "attention")

    for direction, kernels in case_metrics.compiled(case, torch.bfloat16, target).items():
        names = {name for kernel in kernels for name in kernel.matrix}
        assert names and all(name.startswith(MATRIX[target]) for name in names), direction
