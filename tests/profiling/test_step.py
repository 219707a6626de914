"""bench_step.py: its arithmetic on given durations, and a tiny run."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench_step
import pytest
import torch
import worker
from bench_step import Settings, Worker, add_mfu, ratios, text_lengths, variants
from bench_utils import LATENTS
from count_flops import derived
from our_worker import narrowed

SCRIPT = Path(bench_step.__file__)
COMMON = Settings(4, 2, [3, 3], 3, "fp32", False, "auto", "cpu", None, 1)


@dataclass
class FakeWorker(Worker):
    """A worker with given durations."""

    name: str
    batch: int = 8
    rounds: list[list[dict[str, float]]] = field(default_factory=list)


def fake(name: str, *rounds: float) -> FakeWorker:
    """A worker with rounds of one step of these seconds, without data."""
    return FakeWorker(
        name, rounds=[[{"data": 9.0, "forward": s / 2, "backward": s / 2}] for s in rounds]
    )


def test_ratios_compare_the_fastest_variants_round_by_round() -> None:
    workers: list[Any] = [
        fake("ours compiled bf16", 1.0, 2.0, 1.0),
        fake("ours eager fp32", 4.0, 6.0, 5.0),
        fake("released compiled fp32", 3.0, 8.0, 2.0),
        fake("released eager fp32", 9.0, 9.0, 9.0),
        fake("released, texts padded to 256", 6.0, 12.0, 6.0),
    ]

    found = ratios(workers)

    assert {name: row["median"] for name, row in found.items()} == {
        "released": 3.0, "released padded": 6.0, "eager": 4.0,
    }  # fmt: skip
    assert (found["released"]["p20"], found["released"]["p80"]) == (2.0, 4.0)
    assert workers[0].rates() == [8.0, 4.0, 8.0]


def test_the_mfu_of_a_compiled_step_uses_the_flops_of_the_eager_one() -> None:
    def row(rate: float, precision: str, **counted: float) -> dict[str, Any]:
        rates = {"median": rate, "p20": rate, "p80": rate}
        return {"precision": precision, "images_per_second": rates, "counted": counted}

    rows = {
        "ours compiled bf16": row(4.0, "bf16"),
        "ours eager fp32": row(1.0, "fp32", executed_flops=21.0, useful_flops=20.0),
        "released, texts padded to 256": row(2.0, "bf16"),
        "released eager bf16": row(1.0, "bf16", executed_flops=70.0, useful_flops=30.0),
    }

    add_mfu(rows, {"bf16": 200.0, "fp32": None})

    assert {name: row.get("mfu") for name, row in rows.items()} == {
        "ours compiled bf16": 4 * 20 / 200, "ours eager fp32": None,
        "released, texts padded to 256": 2 * 30 / 200, "released eager bf16": 30 / 200,
    }  # fmt: skip


def test_variants_have_the_settings_of_their_names() -> None:
    found = variants(COMMON, ["fp32", "bf16"], released=True)

    for variant in found:
        settings = variant.settings(COMMON)
        assert settings.compiled == ("eager" not in variant.name)
        assert settings.padded == (256 if "padded" in variant.name else 3)
        assert variant.released == variant.name.startswith("released")
        assert settings.lengths == COMMON.lengths
    assert len({variant.name for variant in found}) == len(found) == 9


def test_ragged_texts_have_various_lengths() -> None:
    lengths = text_lengths(64, 100)

    assert max(lengths) == 100 and min(lengths) >= 1 and 40 < sum(lengths) / 64 < 60


def test_a_tiny_step_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--scale", "16", "--batch", "2", "--text", "4"]
    command += ["--steps", "1", "--rounds", "2", "--warmup", "1", "--threads", "1"]
    command += ["--device", "cpu", "--only", "ours eager fp32", "--peak", "1e12"]
    command += ["--out", str(tmp_path)]

    run = subprocess.run(command, capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.glob("step-cpu-*.json")
    record = json.loads(path.read_text())
    row = record["variants"]["ours eager fp32"]
    assert set(row["milliseconds"]) == {"data", "forward", "backward", "optimizer"}
    # At least weights, gradients, two moments and the EMA, in fp32.
    states = 5 * 4 * row["counted"]["parameters"]
    assert row["peak_bytes"] - row["library_bytes"] > states > 1e6
    assert row["library_bytes"] > 1e8 and record["ratio"]["eager"]["median"] == 1.0
    assert row["mfu"] == row["counted"]["useful_flops"] * row["images_per_second"]["median"] / 1e12
    # Only the logits of attention are recomputed, half of its forward; gradients of the image are
    # not computed.
    parts = derived(narrowed(16), 4, LATENTS)
    recomputed = parts["attention"] / 2 / sum(parts.values()) / 3
    counted = row["counted"]
    assert 0.95 < counted["executed_flops"] / counted["useful_flops"] < 1.001 + recomputed


def test_the_flops_of_attention_on_a_cpu_are_counted() -> None:
    q = torch.randn(2, 3, 5, 16, requires_grad=True)
    forward = 2 * 2 * (2 * 3 * 5 * 5 * 16)

    with worker.FlopCounterMode(display=False) as counter:
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert counter.get_total_flops() == forward
        out.sum().backward()

    # Backward recomputes the logits: five products to two of forward.
    assert counter.get_total_flops() == forward + forward * 5 // 2


def test_a_baseline_that_does_not_start_is_reported_with_the_error(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--released", str(tmp_path), "--scale", "16"]
    command += ["--batch", "1", "--text", "2", "--steps", "1", "--rounds", "1", "--warmup", "1"]
    command += ["--only", "ours eager fp32", "released eager fp32", "--device", "cpu"]

    run = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
    assert "released eager fp32 ended: ModuleNotFoundError" in run.stdout
    assert "no MFU: the peak of" in run.stdout


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("theirs", "no variant theirs; choose from ours compiled fp32"),
        ("released eager fp32", "must include a variant of ours"),
    ],
)
def test_variants_that_cannot_be_compared_are_rejected(only: str, message: str) -> None:
    command = [sys.executable, str(SCRIPT), "--released", "folder", "--only", only]

    run = subprocess.run(command, capture_output=True, text=True)

    assert run.returncode == 2 and message in run.stderr


def test_a_worker_that_ends_early_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = bench_step.replace(COMMON, scale=16, lengths=[1, 1, 1])  # one more than the batch
    variant = bench_step.Variant("ours eager fp32")

    with pytest.raises(ValueError, match="ours eager fp32 ended"):
        Worker(variant, settings, None)
