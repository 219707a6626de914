"""The launches per op in profiling/step_budget.py equal those of the ops' own code."""

import pytest
import torch
from step_budget import LAUNCHES  # noqa: E402

from miro_kernels.lab import case_metrics
from miro_kernels.lab.cases import CASES

OPS = {
    "reward_adaln": "reward_adaln",
    "reward_adaln gated": "reward_gated_residual_adaln",
    "qk_norm_rope": "qk_norm_rope",
    "attention": "attention",
    "swiglu": "swiglu",
}


@pytest.mark.parametrize("name", OPS)
def test_an_op_has_as_many_launches_as_in_the_step_budget(name: str) -> None:
    (case,) = (case for case in CASES if case.op == name)

    kernels = case_metrics.compiled(case, torch.bfloat16, "sm_90")

    assert len(kernels["forward"]) == LAUNCHES[OPS[name]]
    assert len(kernels["backward"]) == LAUNCHES[f"{OPS[name]}_backward"]
