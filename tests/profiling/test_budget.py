"""step_budget.py: counts against hand-counted operations, and a tiny run."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import step_budget
import torch
from count_flops import derived
from roofline import DEVICES, Device, Operation, by_bound, by_group, project
from step_budget import LATENTS, Budget, budget, useful_flops

from miro.model.transformer import ModelConfig
from miro.training.presets import preset

TINY = ModelConfig(channels=64, depth=3, heads=2, hidden=96, patch=4)


def test_a_matrix_product_reads_two_inputs_and_writes_one_output() -> None:
    with torch.device("meta"):
        a, b = torch.empty(3, 5), torch.empty(5, 7)
        with Budget() as found:
            torch.mm(a, b)

    assert found.operations["mm"] == Operation(
        "mm", "GEMM", 1, 1, 2 * 3 * 5 * 7, 4 * (15 + 35 + 21)
    )


def test_views_are_free_and_an_expanded_tensor_is_read_once() -> None:
    with torch.device("meta"):
        row = torch.empty(1, 4)
        with Budget() as found:
            row.expand(8, 4).transpose(0, 1).add(1)

    assert set(found.operations) == {"add"}
    assert found.operations["add"].bytes == 4 * (4 + 32)


def test_host_operations_are_not_counted() -> None:
    with Budget() as found:
        torch.promote_types(torch.int8, torch.float32)
        torch.tensor(1.0)

    assert not found.operations


def test_executed_flops_of_a_preset_are_within_two_percent_of_useful_ones() -> None:
    config, batch, text = preset("small").model, 64, 65

    executed = sum(row.flops for row in budget(config, batch, text, "triton"))

    assert 0.99 < executed / useful_flops(config, batch, text) < 1.02


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_step_has_the_flops_of_three_passes_and_recomputed_logits(backend: str) -> None:
    batch, text = 3, 5
    parts = derived(TINY, text, LATENTS)

    found = sum(row.flops for row in budget(TINY, batch, text, backend))

    # Once per batch, and embedding lookups, which are matrix products in the reference only.
    once, lookups = 2 * 7 * 64 * (17 * 128 + 128 * 6 * 64), 2 * 7 * 64 * 64 * (3 * 7 - 1)
    per_image = sum(parts.values()) - once - (lookups if backend == "triton" else 0)
    # The fused backward recomputes the logits of attention; gradients of images and texts are not
    # needed.
    least, most = 2.7 * batch * per_image, 3 * batch * per_image + 3 * once
    assert least < found < most + batch * parts["attention"] / 2


@pytest.fixture(scope="module")
def by_inductor() -> dict[str, list[Operation]]:
    """Operations of TINY on two images by torch.compile, with and without fused operators.

    In a subprocess, because torch caches the absence of a GPU once it has compiled.
    """
    code = (
        "import json, sys; from dataclasses import asdict; from step_budget import *\n"
        "config = ModelConfig(**json.loads(sys.argv[1]))\n"
        "rows = {how: [asdict(row) for row in compiled_budget(config, 2, 3, how == 'fused')]"
        " for how in ('alone', 'fused')}\n"
        "print('rows', json.dumps(rows))"
    )
    command = [sys.executable, "-c", code, json.dumps(asdict(TINY))]
    path = os.pathsep.join([str(Path(step_budget.__file__).parent), *filter(None, sys.path)])
    run = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout.partition("rows ")[2])
    return {how: [Operation(**row) for row in rows] for how, rows in answer.items()}


def test_torch_compile_has_the_same_flops_in_fewer_launches_and_bytes(
    by_inductor: dict[str, list[Operation]],
) -> None:
    compiled, eager = by_inductor["alone"], budget(TINY, 2, 3, "torch")

    def total(rows: list[Operation], column: str, *groups: str) -> float:
        return sum(getattr(row, column) for row in rows if not groups or row.group in groups)

    products = "GEMM", "attention"
    assert total(compiled, "flops", *products) == pytest.approx(
        total(eager, "flops", *products), rel=0.05
    )
    assert total(compiled, "launches") < total(eager, "launches") / 2
    assert total(compiled, "bytes") < total(eager, "bytes")
    by_name = {row.op: row for row in compiled}
    assert by_name["triton"].group == "elementwise and reductions" and not by_name["triton"].flops


def test_fused_operators_stay_opaque_calls_when_the_rest_is_compiled(
    by_inductor: dict[str, list[Operation]],
) -> None:
    compiled = {row.op: row for row in by_inductor["fused"]}
    alone = {row.op: row for row in budget(TINY, 2, 3, "triton")}

    for op in step_budget.LAUNCHES:
        assert compiled[op] == alone[op]
    assert compiled["triton"].launches < 70


def test_each_block_calls_its_fused_operators() -> None:
    rows = {row.op: row for row in budget(TINY, 2, 3, "triton")}

    calls = {op: row.calls for op, row in rows.items() if op in step_budget.LAUNCHES}
    assert calls == {
        "reward_adaln": 1, "reward_adaln_backward": 1, "reward_gated_residual_adaln": 6,
        "reward_gated_residual_adaln_backward": 6, "qk_norm_rope": 3, "qk_norm_rope_backward": 3,
        "attention": 3, "attention_backward": 3, "swiglu": 4, "swiglu_backward": 4,
    }  # fmt: skip
    assert rows["attention_backward"].launches == 6
    # Two halves read and one written, in bf16: 64 tokens of two images in three blocks, and three
    # tokens of two texts in one.
    assert rows["swiglu"].bytes == 2 * (3 * 96) * (3 * 2 * 64 + 2 * 3)


def test_a_projection_is_the_larger_of_flops_and_bytes_plus_launches() -> None:
    device = Device(1e12, 1e9, gemm=0.5, attention=0.1, memory=0.5, launch=1e-3)
    product = Operation("mm", "GEMM", 1, 2, flops=1e12, bytes=1.0)
    copy = Operation("copy_", "data movement", 1, 1, flops=0.0, bytes=1e9)

    table = project([product, copy], device)

    assert list(table["seconds"]) == pytest.approx([2.0 + 2e-3, 2.0 + 1e-3])
    assert by_bound(table) == pytest.approx({"FLOPs": 2.0, "bytes": 2.0, "launches": 0.003})
    groups = by_group(project([product, copy, product], device))
    assert list(groups.index) == ["GEMM", "data movement"]
    assert groups["flops"]["GEMM"] == 2e12
    assert list(groups["seconds"]) == pytest.approx([4.004, 2.001])


def test_the_script_prints_its_table_and_writes_its_result(tmp_path: Path) -> None:
    script = Path(step_budget.__file__)
    command = [sys.executable, str(script), "--preset", "demo", "--batch", "2", "--text", "3"]
    command += ["--without-inductor"]

    run = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
    assert "projection, nothing was run" in run.stdout
    record = json.loads((tmp_path / "budget-demo.json").read_text())
    assert record["assumptions"].keys() == DEVICES.keys()
    eager, fused = (record["variants"][name]["counted"] for name in ("eager", "fused"))
    assert fused["fused"]["launches"] > 0 and "fused" not in eager
    moved = [sum(group["bytes"] for group in found.values()) for found in (eager, fused)]
    assert moved[1] < moved[0]
    assert record["useful_flops"] == pytest.approx(
        fused["GEMM"]["flops"] + fused["attention"]["flops"], rel=0.1
    )
    assert run.stdout.count("FLOPs executed over useful: ") == 2
