"""The whole demo at its quick size: every stage, its report, and going on after a stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from openmoji.demo import MODELS, DemoConfig, run_demo

from miro.evaluate.measure import data_efficiency


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick demo that was killed while it trained, and then run to its end."""
    folder = tmp_path_factory.mktemp("demo") / "quick"
    command = [sys.executable, "-m", "openmoji", "demo", "--quick", "--folder", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not any((folder / "miro" / "checkpoints").glob("0*")):
        assert process.poll() is None and time.monotonic() < deadline, "it did not come to train"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1.5)  # its workers see that it is gone
    run_demo(DemoConfig(folder=folder, quick=True))
    return folder


def test_the_results_have_every_figure(folder: Path):
    results = json.loads((folder / "results.json").read_text())
    metrics = {"colourfulness", "sharpness", "alignment", "verifier"}
    for setting in ("unguided", "guided"):
        assert set(results["crossing_factor"][setting]) == metrics
        assert set(results["final"][setting]) == set(MODELS)
        assert all(set(row) == metrics for row in results["final"][setting].values())
        assert all(len(row) == 6 for row in results["verifier_by_category"][setting].values())
    assert set(results["diversity"]) == set(MODELS)
    assert results["images_per_second"] > 0
    assert {"scenes", "fit-clip", "train miro", "final miro"} <= set(results["seconds"])
    assert set(results["alignment_auc"]) == {
        "swapped_objects", "flipped_relation", "swapped_colours", "wrong_count", "replaced_object"
    }  # fmt: skip


def test_the_report_shows_it(folder: Path):
    page = (folder / "report.html").read_text()
    assert "quick run" in page and "OpenMoji" in page and "data:image/png" in page


def test_the_three_models_are_the_same_network_seed_and_images(folder: Path):
    configs = [json.loads((folder / model / "config.json").read_text()) for model in MODELS]
    rewards = [config["conditioning"].pop("rewards") for config in configs]
    assert rewards == [[], ["colourfulness", "sharpness", "alignment"], ["alignment"]]
    assert configs[0] == configs[1] == configs[2]


def test_a_second_call_does_nothing_again(folder: Path):
    weights = sorted(folder.glob("*/weights/*/tensors.safetensors"))
    before = [path.stat().st_mtime_ns for path in weights]
    run_demo(DemoConfig(folder=folder, quick=True))
    assert [path.stat().st_mtime_ns for path in weights] == before


def test_another_demo_in_the_same_folder_is_refused(folder: Path):
    with pytest.raises(ValueError, match="quick: False here, True there"):
        run_demo(DemoConfig(folder=folder))


@pytest.mark.parametrize(
    ("curve", "factor"),
    [
        ([0.0, 0.4, 0.6, 0.9], 400 / 150),  # half way from 0.4 to 0.6
        ([0.9, 0.3, 0.7, 0.9], 400 / 150),  # being above early does not count
        ([0.0, 0.5, 0.6, 0.9], 4.0),  # from that mark on
        ([0.6, 0.7, 0.8, 0.9], 4.0),  # the first mark lies before the start
        ([0.0, 0.3, 0.6, 0.4], None),  # it ends below
        ([0.0, 0.3, 0.6, 0.5], None),  # equal is not above
        ([0.0, 0.3, 0.4, 0.5 + 1e-9], 1.0),  # only just
    ],
)
def test_the_crossing_factor_is_of_staying_above(curve: list[float], factor: float | None):
    marks, baseline = [50, 100, 200, 400], [0.1, 0.2, 0.4, 0.5]
    found = data_efficiency(marks, baseline, curve, start=100)
    assert found == (None if factor is None else pytest.approx(factor))
