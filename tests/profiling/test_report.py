"""report.py: the numbers of its sentences by hand, labels, missing and invalid files."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import report
from bench_utils import RESULTS
from helpers import result_examples as examples
from page.charts import svg
from page.result_files import RESULT_TYPES, histories, load, load_folder
from page.result_plots import history_plot, plots_of


def write_report(folder: Path, path: Path) -> Path:
    return report.write_report(load_folder(folder), path)


def text_of(page: Path) -> str:
    """The text of a page, without markup, style and plots."""
    text = re.sub(r"<(style|svg).*?</\1>", " ", page.read_text("utf-8"), flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of the page of all examples."""
    folder = examples.write(tmp_path_factory.mktemp("results"))
    return text_of(write_report(folder, folder / "report.html"))


def test_the_page_answers_what_bounds_a_step(page: str) -> None:
    assert (
        "A fused step of 64 images is projected to take 4,000 ms on an H100 SXM: 50 % of it is "
        "bound by FLOPs (matrix products are 62 %), 25 % by bytes and 25 % by launches. The eager "
        "step is projected to take 10,000 ms, 70 % of it bound by bytes. For each useful FLOP the "
        "fused step executes 1.250."
    ) in page
    assert (
        "Measured on an H100, it takes 100 ms with the rest compiled and 200 ms with the rest "
        "eager: 0.025 × and 0.050 × the projection"
    ) in page


def test_a_projection_is_compared_with_measurements_on_its_device_only(tmp_path: Path) -> None:
    folder = examples.write(tmp_path, **{"gpu-card": examples.gpu("another card")})

    page = text_of(write_report(folder, tmp_path / "report.html"))

    assert "On another card a training step with the kernels reaches 640 images/s" in page
    assert "with the rest compiled" not in page


def test_the_page_answers_what_fusion_gains(page: str) -> None:
    assert (
        "On an H100 a training step with the kernels reaches 640 images/s: 1.25 × torch.compile "
        "alone (512) and 4.00 × eager (160), in 20.0 GB against 25.0 and 50.0."
    ) in page
    assert (
        "Of 2 passes timed alone 1 are faster than torch.compile’s beyond noise and 1 slower: from "
        "0.500 × (attention forward) to 2.00 × (adaln forward)."
    ) in page
    assert (
        "1 of 2 passes move fewer bytes than torch.compile’s: from 0.400 × (adaln forward) to "
        "1.00 × (attention forward)."
    ) in page
    # 1e9 bytes in 1 ms of 2000 GB/s, and 1e11 FLOPs in 2 ms of 500 TFLOP/s.
    assert "adaln forward 1.00 2.00 2.00 50 % bytes 25 % bytes 0.400" in page
    assert "attention forward 2.00 1.00 0.500 10 % FLOPs 20 % FLOPs 1.00" in page
    assert (
        "A fused step launches 1,000 kernels and moves 501 GB; the eager one launches 1,000" in page
    )


def test_counts_of_compiled_steps_are_on_the_page_if_the_budget_has_them(tmp_path: Path) -> None:
    budget = examples.budget()
    variants = budget["variants"]
    variants |= {"torch.compile": variants["eager"], "fused, rest compiled": variants["fused"]}
    folder = examples.write(tmp_path, **{"budget-small": budget})

    page = text_of(write_report(folder, tmp_path / "report.html"))

    assert (
        "With the rest compiled it launches 1,000 kernels and moves 501 GB; torch.compile alone "
        "launches 1,000 kernels and moves 3,501 GB (as Inductor"
    ) in page


def test_the_page_answers_how_much_the_released_code_wastes(page: str) -> None:
    assert (
        "the fastest variant of each: our step reaches 3.00 × the images/s of the released one "
        "(2.90 to 3.10), in 0.500 × its peak memory (0.333 × without libraries and compiler)."
    ) in page
    assert (
        "For each useful FLOP it executes 2.20, ours 1.10. Of the 3.00 ×, 2.00 × is fewer FLOPs "
        "executed per image; the remaining 1.50 × is a higher rate of FLOPs."
    ) in page
    assert "Padding texts from 77 to 256 tokens, as the released training does, adds 10.0 %" in page


def test_the_page_answers_what_a_gpu_hour_yields_with_labels(page: str) -> None:
    assert (
        "A fused step on an H100, batch 64, yields 2.30 M images per GPU-hour, so 512 M images "
        "take 222 GPU-hours of steps; the released training took 832, 3.74 × as many."
    ) in page
    # 64 images in 4 s; in 2.5 s on a device of twice the rates and equal launch latency.
    assert "images per GPU-hour: H100 SXM 0.06 M, twice 0.09 M." in page
    assert "fused an H100 640 2.30 222 MEASURED 2026-01-02, an H100, commit abc1234 (" in page
    assert (
        "fused twice 25.6 0.09 5,556 PROJECTION twice: 50 % of 2 TFLOP/s in matrix products, 25 % "
        "in attention, 50 % of 2 TB/s elsewhere, 1000 µs per launch, no host time"
    ) in page
    assert "16 × H100 171 0.62 832 PUBLISHED" in page


def test_data_and_rewards_have_their_measurements(page: str) -> None:
    assert (
        "The loader alone reaches 9,000 images/s. A training step of the demo behind it consumes "
        "200 and waits for data 0.4 % of the time."
    ) in page
    assert "reach 1.75 × the images/s of seven passes (1.65 to 1.85)" in page
    assert "projected to take 123 H100-hours at 40 % of peak; the released code took 369." in page


def test_a_page_without_results_names_the_command_for_each(tmp_path: Path) -> None:
    page = text_of(write_report(tmp_path, tmp_path / "report.html"))

    for type_ in RESULT_TYPES:
        if type_.name != "tiles":
            hint = f"No file {type_.pattern} among the results; write one with {type_.command}"
            assert hint in page
    assert "MEASURED" not in page


def test_a_step_without_the_released_code_makes_no_claim_about_it(tmp_path: Path) -> None:
    folder = examples.write(tmp_path, **{"step-cpu": examples.step(released=False)})

    page = text_of(write_report(folder, tmp_path / "report.html"))

    assert "step-cpu.json was written without the released package" in page
    assert "For each useful FLOP it executes" not in page


def test_names_in_the_files_are_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert('&')</script>"
    step = examples.step()
    step["variants"][f"ours {hostile}"] = step["variants"]["ours compiled bf16"]
    folder = examples.write(tmp_path, **{"gpu-card": examples.gpu(hostile), "step-cpu": step})

    page = write_report(folder, tmp_path / "report.html").read_text("utf-8")

    assert "<script" not in page
    assert html.escape(hostile, quote=False).replace("'", "&#39;") in page


def _without(record: dict[str, Any], *path: str) -> dict[str, Any]:
    inner = record
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return record


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "no script of profiling/ writes such a result"),
        ('{"rows": [], "date": "2026-01-02"}', "no script of profiling/ writes such a result"),
        (json.dumps(_without(examples.gpu(), "peaks", "gigabytes")), "peaks.gigabytes is missing"),
        (
            json.dumps(examples.gpu() | {"rows": []}),
            "rows is [], not an object or a non-empty list",
        ),
        (
            json.dumps(examples.gpu() | {"peaks": {"gigabytes": float("nan"), "teraflops": 1}}),
            "peaks.gigabytes is nan, not a positive number; regenerate it with `make gpu-check`",
        ),
        (json.dumps(_without(examples.budget(), "variants", "fused")), "variants.fused is missing"),
    ],
)
def test_an_invalid_file_is_named_in_the_error(tmp_path: Path, content: str, message: str) -> None:
    wrong = examples.write(tmp_path) / "wrong.json"
    wrong.write_text(content)

    with pytest.raises(ValueError, match=re.escape(message)) as error:
        write_report(tmp_path, tmp_path / "report.html")

    assert str(wrong) in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_the_script_reports_an_invalid_file_and_exits_with_2(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")

    for arguments in (["--results", tmp_path], [wrong]):
        command = [sys.executable, report.__file__, *arguments]
        run = subprocess.run(command, capture_output=True, text=True)

        assert run.returncode == 2
        assert f"report: {wrong}: no script of profiling/ writes such a result" in run.stderr


def test_history_compares_files_with_equal_settings_only(tmp_path: Path) -> None:
    files = {
        "a": examples.precision("2026-01-02", 100.0),
        "b": examples.precision("2026-01-05", 120.0),
        "c": examples.precision("2026-01-03", 10.0, threads=2),
    }
    for name, record in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))

    series = histories(load_folder(tmp_path))
    page = text_of(write_report(tmp_path, tmp_path / "report.html"))

    found = {name: [r.path.stem for r in results] for name, results in series.items()}
    assert found == {"precision": ["a", "b"], "precision, threads 2": ["c"]}
    assert "eager fp32: images_per_second 100 (99–101) 120 (119–121) faster" in page


def test_files_of_one_day_are_sorted_by_name_and_labelled_by_commit(tmp_path: Path) -> None:
    for name, commit in (("run-2026-01-02-late", "2222222"), ("run-2026-01-02", "1111111")):
        record = examples.precision("2026-01-02", 100.0, commit=commit)
        (tmp_path / f"{name}.json").write_text(json.dumps(record))

    found = load_folder(tmp_path)
    plot = history_plot(found)

    assert [result.path.stem for result in found] == ["run-2026-01-02", "run-2026-01-02-late"]
    assert plot is not None
    drawn = svg(plot.figure, "history")
    assert drawn.index("01-02 1111111") < drawn.index("01-02 2222222")


def test_a_page_of_given_files_has_their_plots_and_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The type of a file is that of its content, not of its name."""
    records = {
        "anything": examples.budget(),
        "late": examples.precision("2026-01-05", 120.0),
        "early": examples.precision("2026-01-02", 100.0),
    }
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    files = [str(tmp_path / f"{name}.json") for name in records]
    out = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["report.py", *files, "--out", str(out)])

    assert report.main() == 0

    page = out.read_text("utf-8")
    assert "From 3 result files" in page and "Roofline of a step" in page
    # The page follows the theme of the reader.
    assert "--miro: #" in page and "prefers-color-scheme: dark" in page
    history = page[page.index('id="history"') :]
    assert history.index("2026-01-02") < history.index("2026-01-05")
    assert "relative to the first" in history


def test_every_checked_in_result_is_valid_and_has_plots() -> None:
    for path in sorted(RESULTS.glob("*.json")):
        assert plots_of(load(path)), path.name


def test_the_checked_in_page_matches_the_checked_in_results(tmp_path: Path) -> None:
    checked_in = RESULTS / "report.html"

    page = write_report(RESULTS, tmp_path / "report.html")

    remedy = "regenerate it with python profiling/report.py"
    assert text_of(page) == text_of(checked_in), remedy
    if f"with matplotlib {matplotlib.__version__}." in text_of(checked_in):
        # The SVG of other versions differs.
        assert page.read_bytes() == checked_in.read_bytes(), remedy
    assert checked_in.stat().st_size < 1.5e6
