"""report.py and plot.py: the numbers of the sentences by hand, labels, what is absent or wrong."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import plot
import pytest
import report
from charts import markup
from helpers import result_examples as examples
from pictures import pictures
from report import write_report
from result_files import histories, read, read_folder
from result_kinds import KINDS

RESULTS = Path(__file__).parents[2] / "profiling" / "results"


def text_of(page: Path) -> str:
    """What a reader sees, without markup, style and plots."""
    text = re.sub(r"<(style|svg).*?</\1>", " ", page.read_text("utf-8"), flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of the page of all examples."""
    folder = examples.write(tmp_path_factory.mktemp("results"))
    return text_of(write_report(folder, folder / "report.html"))


def test_what_bounds_a_step_is_said_with_its_shares(page: str) -> None:
    assert (
        "A fused step of 64 images is projected to take 4,000 ms on an H100 SXM: 50 % of it is "
        "bound by FLOPs (matrix products are 62 %), 25 % by bytes and 25 % by launches. Eager’s is "
        "projected at 10,000 ms, 70 % of it bound by bytes. For each useful FLOP the fused step "
        "executes 1.250."
    ) in page
    assert (
        "Measured on an H100, it takes 100 ms with the rest compiled and 200 ms with the rest "
        "eager: 0.025 × and 0.050 × the projection"
    ) in page


def test_a_projection_is_held_against_its_own_device_alone(tmp_path: Path) -> None:
    folder = examples.write(tmp_path, **{"gpu-card": examples.gpu("another card")})

    page = text_of(write_report(folder, tmp_path / "report.html"))

    assert "On another card a training step with the kernels does 640 images/s" in page
    assert "with the rest compiled" not in page


def test_what_fusion_bought_is_said_with_its_ratios(page: str) -> None:
    assert (
        "On an H100 a training step with the kernels does 640 images/s: 1.25 × torch.compile alone "
        "(512) and 4.00 × eager (160), in 20.0 GB against 25.0 and 50.0."
    ) in page
    assert (
        "Of 2 passes timed alone 1 are faster than torch.compile’s beyond noise and 1 slower: from "
        "0.500 × (attention forward) to 2.00 × (adaln forward)."
    ) in page
    assert (
        "1 of 2 passes move fewer bytes than torch.compile’s would: from 0.400 × as many (adaln "
        "forward) to 1.00 × (attention forward)."
    ) in page
    # 1e9 bytes in 1 ms of 2000 GB/s, and 1e11 FLOPs in 2 ms of 500 TFLOP/s.
    assert "adaln forward 1.00 2.00 2.00 50 % bytes 25 % bytes 0.400" in page
    assert "attention forward 2.00 1.00 0.500 10 % FLOPs 20 % FLOPs 1.00" in page
    assert (
        "A fused step launches 1,000 kernels and moves 501 GB, where eager launches 1,000" in page
    )


def test_what_is_left_when_all_is_compiled_is_said_where_it_was_counted(tmp_path: Path) -> None:
    budget = examples.budget()
    variants = budget["variants"]
    variants |= {"torch.compile": variants["eager"], "fused, rest compiled": variants["fused"]}
    folder = examples.write(tmp_path, **{"budget-small": budget})

    page = text_of(write_report(folder, tmp_path / "report.html"))

    assert (
        "With the rest compiled it launches 1,000 kernels and moves 501 GB, where torch.compile "
        "alone launches 1,000 kernels and moves 3,501 GB (as Inductor"
    ) in page


def test_what_the_released_code_wastes_is_said_with_its_parts(page: str) -> None:
    assert (
        "both at their best, our step does 3.00 × the images/s of the released one (2.90 to 3.10), "
        "in 0.500 × its peak memory (libraries and compiler left out: 0.333 ×)."
    ) in page
    assert (
        "For each useful FLOP it executes 2.20, ours 1.10. Of the 3.00 ×, 2.00 × is fewer FLOPs "
        "executed an image; the remaining 1.50 × is FLOPs done faster."
    ) in page
    assert "Padding texts from 77 to 256 tokens, as the released training does, adds 10.0 %" in page


def test_what_a_gpu_hour_yields_is_said_and_labelled(page: str) -> None:
    assert (
        "A fused step on an H100, batch 64, yields 2.30 M images in a GPU-hour, so 512 M images "
        "take 222 GPU-hours of steps; the released training took 832, 3.74 × as many."
    ) in page
    # 64 images in 4 s, and in 2.5 s where only launches take as long.
    assert "images in a GPU-hour: H100 SXM 0.06 M, twice 0.09 M." in page
    assert "fused an H100 640 2.30 222 MEASURED 2026-01-02, an H100, commit abc1234 (" in page
    assert (
        "fused twice 25.6 0.09 5,556 PROJECTION twice: 50 % of 2 TFLOP/s in matrix products, 25 % "
        "in attention, 50 % of 2 TB/s elsewhere, 1000 µs a launch, no host"
    ) in page
    assert "16 × H100 171 0.62 832 PUBLISHED" in page


def test_data_and_rewards_are_shown_where_they_were_measured(page: str) -> None:
    assert (
        "The loader alone makes 9,000 images/s; a training step of the demo behind it takes in "
        "200, and waits for data 0.4 % of the time."
    ) in page
    assert "do 1.75 × the images/s of seven passes (1.65 to 1.85)" in page
    assert "projected to take 123 H100-hours at 40 % of peak; the released code took 369." in page


def test_a_folder_without_results_says_what_makes_each(tmp_path: Path) -> None:
    page = text_of(write_report(tmp_path, tmp_path / "report.html"))

    for kind in KINDS:
        if kind.name != "tiles":
            assert f"No file {kind.pattern} among the results; make one with {kind.command}" in page
    assert "MEASURED" not in page


def test_a_step_without_the_released_code_claims_nothing_of_it(tmp_path: Path) -> None:
    folder = examples.write(tmp_path, **{"step-cpu": examples.step(released=False)})

    page = text_of(write_report(folder, tmp_path / "report.html"))

    assert "step-cpu.json was made without the released package" in page
    assert "For each useful FLOP it executes" not in page


def test_names_from_the_files_cannot_become_markup(tmp_path: Path) -> None:
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
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "not a result that a script of profiling/ writes"),
        ('{"rows": [], "date": "2026-01-02"}', "not a result that a script of profiling/ writes"),
        (json.dumps(_without(examples.gpu(), "peaks", "gigabytes")), "peaks.gigabytes is missing"),
        (json.dumps(examples.gpu() | {"rows": []}), "rows is not a list with something in it"),
        (
            json.dumps(examples.gpu() | {"peaks": {"gigabytes": float("nan"), "teraflops": 1}}),
            "peaks.gigabytes is nan, not a positive number; make it again with `make gpu-check`",
        ),
        (json.dumps(_without(examples.budget(), "variants", "fused")), "variants.fused is missing"),
    ],
)
def test_a_file_that_is_not_understood_is_named(tmp_path: Path, content: str, said: str) -> None:
    wrong = examples.write(tmp_path) / "wrong.json"
    wrong.write_text(content)

    with pytest.raises(ValueError, match=re.escape(said)) as error:
        write_report(tmp_path, tmp_path / "report.html")

    assert str(wrong) in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_the_scripts_say_what_is_wrong_and_exit_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    monkeypatch.setattr(sys, "argv", ["plot.py", str(wrong)])

    command = [sys.executable, report.__file__, "--results", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True)

    assert run.returncode == 2 and f"report: {wrong}: not a result" in run.stderr
    assert plot.main() == 2 and f"plot: {wrong}: not a result" in capsys.readouterr().err


def test_history_compares_files_of_equal_settings_alone(tmp_path: Path) -> None:
    files = {
        "a": examples.precision("2026-01-02", 100.0),
        "b": examples.precision("2026-01-05", 120.0),
        "c": examples.precision("2026-01-03", 10.0, threads=2),
    }
    for name, record in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))

    series = histories(read_folder(tmp_path))
    page = text_of(write_report(tmp_path, tmp_path / "report.html"))

    found = {name: [result.path.stem for result in of] for name, of in series.items()}
    assert found == {"precision": ["a", "b"], "precision, threads 2": ["c"]}
    assert "images_per_second: eager fp32 100 (99–101) 120 (119–121) faster" in page


def test_of_one_day_the_longer_name_is_the_later_and_is_told_by_its_commit(tmp_path: Path) -> None:
    for name, commit in (("run-2026-01-02-late", "2222222"), ("run-2026-01-02", "1111111")):
        record = examples.precision("2026-01-02", 100.0, commit=commit)
        (tmp_path / f"{name}.json").write_text(json.dumps(record))

    found = read_folder(tmp_path)
    picture = plot.history(found)

    assert [result.path.stem for result in found] == ["run-2026-01-02", "run-2026-01-02-late"]
    assert picture is not None
    drawn = markup(picture.figure, "history")
    assert drawn.index("01-02 1111111") < drawn.index("01-02 2222222")


def test_plot_tells_the_kind_by_the_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anything = tmp_path / "anything.json"
    anything.write_text(json.dumps(examples.budget()))
    monkeypatch.setattr(sys, "argv", ["plot.py", str(anything)])

    assert plot.main() == 0

    for stem in ("anything", "anything-groups"):
        drawn = (tmp_path / f"{stem}.svg").read_text("utf-8")
        # A file of its own, in the colours of the reader's theme.
        assert "--miro: #" in drawn and "prefers-color-scheme: dark" in drawn
        assert "fused" in drawn and "GEMM" in drawn and "projected" in drawn


def test_plot_draws_several_files_as_their_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "late.json", tmp_path / "early.json"]
    for path, date, rate in zip(paths, ("2026-01-05", "2026-01-02"), (120.0, 100.0), strict=True):
        path.write_text(json.dumps(examples.precision(date, rate)))
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, paths), "--out", str(tmp_path / "to")])

    assert plot.main() == 0

    drawn = (tmp_path / "to" / "history-precision.svg").read_text("utf-8")
    assert drawn.index("2026-01-02") < drawn.index("2026-01-05")


def test_every_checked_in_result_is_read_and_drawn() -> None:
    for path in sorted(RESULTS.glob("*.json")):
        assert pictures(read(path)), path.name


def test_the_checked_in_page_is_that_of_the_checked_in_results(tmp_path: Path) -> None:
    checked_in = RESULTS / "report.html"

    made = write_report(RESULTS, tmp_path / "report.html")

    again = "python profiling/report.py makes it again"
    assert text_of(made) == text_of(checked_in), again
    if f"with matplotlib {matplotlib.__version__}." in text_of(checked_in):
        # Another version may draw the same numbers in other words.
        assert made.read_bytes() == checked_in.read_bytes(), again
    assert checked_in.stat().st_size < 1.5e6
