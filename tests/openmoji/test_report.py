"""The reports of a demo and of a training run: content, and refusal of invalid files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.report_folder import (
    FINAL,
    MODELS,
    START,
    TOTAL,
    make_demo,
    make_run,
    write_json,
    write_random_image,
)
from openmoji.demo_page import write_demo_report
from openmoji.demo_plots import score_curves
from openmoji.page_data import read_demo
from openmoji.readme_images import write_readme_images
from PIL import Image

from miro.report import plots
from miro.report.run_page import write_run_report


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of an unmodified demo. Do not write."""
    return write_demo_report(make_demo(tmp_path_factory.mktemp("whole")))


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return make_demo(tmp_path / "demo")


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def text_of(page: Path) -> str:
    """The visible text, without markup and style."""
    text = re.sub(r"<(style|svg).*?</\1>", " ", page.read_text("utf-8"), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))


def test_page_contains_every_result(page: Path) -> None:
    text = text_of(page)
    for models in FINAL.values():
        for row in models.values():
            colour, sharp, alignment, verifier = row
            for figure in (f"{colour:.1f}", f"{sharp:.2f}", f"{alignment:.3f}", f"{verifier:.3f}"):
                assert figure in text
    # Colourfulness and sharpness are above from the first checkpoint on: a lower bound.
    assert text.count("≥ 6.7×") == 6
    for figure in ("4.0×", "3.3×", "3.2×", "1.25×", "none", "± 0.018", "± 0.7"):
        assert figure in text
    for figure in ("25 minutes in total", "229", "0.412", "17 min 30 s", "27 s", "2.14.1"):
        assert figure in text
    for name in ("Baseline", "MIRO", "Alignment only", "Reward guidance", "Verifier"):
        assert name in text
    assert ">Colour attribution</text>" in page.read_text("utf-8")
    for label in ("s⁺ = 1", "a frog left of a star", "A note on trade."):
        assert label in text


def test_difference_has_a_standard_error_and_insignificance_is_stated(page: Path) -> None:
    text = text_of(page)
    assert "the difference, 0.326, has a standard error of 0.025." in text
    # With guidance 0.523 - 0.479 = 0.044 is less than twice the error.
    assert "the difference, 0.044, has a standard error of 0.025, so it is not significant" in text


def test_page_credits_openmoji(page: Path) -> None:
    html = page.read_text("utf-8")
    assert "https://openmoji.org" in html
    assert "CC BY-SA 4.0" in html


def test_page_is_self_contained(page: Path) -> None:
    html = page.read_text("utf-8")
    loaded = re.findall(r'(?:src|xlink:href)="([^"]*)"', html) + re.findall(r"url\(([^)]*)\)", html)
    assert sum(address.startswith("data:image/png;base64,") for address in loaded) == 2
    assert all(address.startswith(("data:", "#")) for address in loaded)
    assert "<script" not in html
    assert "@import" not in html
    assert re.findall(r"<link[^>]*>", html) == ['<link rel="icon" href="data:,">']


def test_ids_are_unique_across_plots(page: Path) -> None:
    html = page.read_text("utf-8")
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) > 20
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'(?:url\(#|href="#)([^")]+)', html))
    assert referred <= set(ids)


def test_same_results_give_the_same_page(page: Path, demo: Path) -> None:
    assert write_demo_report(demo).read_bytes() == page.read_bytes()


def test_text_from_files_is_escaped(demo: Path) -> None:
    attack = "<script>alert('$1$')</script>"

    def put(grids: list[dict[str, Any]]) -> None:
        grids[0] |= {"title": attack, "caption": attack}
        grids[0]["columns"][0] = grids[0]["rows"][0] = attack

    def rename(curves: dict[str, Any]) -> None:
        for model in ("baseline", "miro"):
            curves["guided"][model][attack] = curves["guided"][model].pop("alignment")

    def rename_final(results: dict[str, Any]) -> None:
        for models in results["final"].values():
            for row in models.values():
                row[attack] = row.pop("alignment")

    edit(demo / "grids.json", put)
    edit(demo / "curves.json", rename)
    edit(demo / "results.json", rename_final)
    page = write_demo_report(demo).read_text("utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_crossing_is_marked_at_the_data_efficiency(demo: Path) -> None:
    results = read_demo(demo)
    assert results.curves is not None
    crossing = results.curves.crossing("unguided", "alignment", 4.0)
    assert crossing is not None
    assert crossing.images == TOTAL / 4
    assert crossing.score == pytest.approx(0.436)
    assert not crossing.at_least
    series = {m: results.curves.values["unguided"][m]["alignment"] for m in ("baseline", "miro")}
    point = (crossing.images, crossing.score)
    axes = score_curves(results.curves.checkpoints, series, point).axes[0]
    points = {line.get_gid(): np.asarray(line.get_xydata()) for line in axes.get_lines()}
    assert points["crossing"].tolist() == [[TOTAL / 4, pytest.approx(0.436)]]
    assert points["saved"][:, 0].tolist() == [TOTAL / 4, TOTAL]


def test_no_crossing_is_marked_without_a_data_efficiency(page: Path) -> None:
    curves = read_demo(page.parent).curves
    assert curves is not None
    assert curves.crossing("guided", "verifier", None) is None
    axes = score_curves(curves.checkpoints, curves.values["guided"]["miro"]).axes[0]
    assert "crossing" not in [line.get_gid() for line in axes.get_lines()]
    assert "does not stay above the baseline’s final one" in text_of(page)


def test_curves_begin_at_start(demo: Path) -> None:
    curves = read_demo(demo).curves
    assert curves is not None
    assert curves.checkpoints[0] == START
    assert len(curves.values["guided"]["miro"]["verifier"]) == len(curves.checkpoints)
    crossing = curves.crossing("unguided", "colourfulness", TOTAL / START)
    assert crossing is not None and crossing.at_least


def test_unknown_values_are_dashes(demo: Path) -> None:
    def lose(results: dict[str, Any]) -> None:
        results["final"]["guided"]["miro"]["sharpness"] = None
        del results["final"]["unguided"]["only_alignment"]["colourfulness"]

    edit(demo / "results.json", lose)
    edit(demo / "curves.json", lambda c: c["guided"]["miro"]["sharpness"].__setitem__(5, None))
    assert "–" in text_of(write_demo_report(demo))


def test_absent_sections_are_explained(demo: Path) -> None:
    (demo / "curves.json").unlink()
    (demo / "grids.json").unlink()
    for model in MODELS:
        (demo / model / "metrics.jsonl").unlink()
    edit(
        demo / "results.json",
        lambda r: [r.pop(key) for key in list(r) if key not in ("final", "quick")],
    )
    text = text_of(write_demo_report(demo))
    for sentence in (
        "No curves: the demo has not evaluated its checkpoints yet.",
        "No grids: the demo has not generated them yet.",
        "No training metrics in this folder.",
        "Not measured by category in this run.",
        "No stage was timed.",
    ):
        assert sentence in text
    assert "0.523" in text


def test_quick_run_has_a_warning(page: Path, demo: Path) -> None:
    assert "quick run" not in text_of(page)
    edit(demo / "results.json", lambda results: results.update(quick=True))
    assert "its results are meaningless" in text_of(write_demo_report(demo))


def test_missing_results_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"results\.json: no such file; run `python -m openmoji demo`"
    ):
        write_demo_report(tmp_path)


@pytest.mark.parametrize("name", ["results.json", "curves.json", "grids.json"])
def test_broken_json_is_refused_by_name(demo: Path, name: str) -> None:
    path = demo / name
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: not JSON .*openmoji demo"):
        write_demo_report(demo)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("results.json", lambda r: r.pop("final"), "'final' is missing"),
        (
            "results.json",
            lambda r: r["final"]["guided"]["miro"].update(verifier="good"),
            r"final\.guided\.miro\.verifier is 'good', not a number",
        ),
        (
            "curves.json",
            lambda c: c["guided"]["miro"]["verifier"].pop(),
            r"guided\.miro\.verifier has not one value",
        ),
        ("curves.json", lambda c: c.pop("checkpoints"), "checkpoints is None"),
        ("grids.json", lambda g: g[0].pop("rows"), "has no or an invalid 'rows'"),
        ("grids.json", lambda g: g[0]["rows"].pop(), r"24 x 16 pixels, but .* 1 rows"),
    ],
)
def test_invalid_content_is_refused_by_field(
    demo: Path, name: str, change: Any, message: str
) -> None:
    edit(demo / name, change)
    with pytest.raises(ValueError, match=message):
        write_demo_report(demo)


def test_missing_and_broken_images_are_refused_by_name(demo: Path) -> None:
    (demo / "grids/trade.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"trade\.png: not an image"):
        write_demo_report(demo)
    (demo / "grids/trade.png").unlink()
    with pytest.raises(ValueError, match=r"trade\.png: no such file, but grids\.json lists it"):
        write_demo_report(demo)


def test_readme_images_are_small_and_labelled(demo: Path, tmp_path: Path) -> None:
    def at_full_size(grids: list[dict[str, Any]]) -> None:
        grids[0] |= {"cell": 32, "columns": ["a photo of a green frog above a car"] * 10}
        rng = np.random.default_rng(3)
        write_random_image(demo / grids[0]["image"], 320, 64, rng)

    edit(demo / "grids.json", at_full_size)
    grid, curves = write_readme_images(demo, tmp_path / "docs")
    assert grid.stat().st_size < 300_000
    assert curves.stat().st_size < 200_000
    with Image.open(grid) as image, Image.open(demo / "grids/targets.png") as cells:
        assert image.width > 3 * cells.width
        assert image.height > 3 * cells.height
    with Image.open(curves) as image:
        assert image.width > 1200


def test_readme_images_need_grids_and_curves(demo: Path, tmp_path: Path) -> None:
    (demo / "curves.json").unlink()
    with pytest.raises(ValueError, match=r"curves\.json: no curves; run `python -m openmoji demo`"):
        write_readme_images(demo, tmp_path)


def test_run_report_shows_configuration_plots_and_samples(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run <1>")
    write_random_image(run / "samples/000115200.png", 16, 16, np.random.default_rng(2))
    write_json(run / "evaluation.json", {"final": {"verifier": 0.514}})
    page = write_run_report(run)
    text = text_of(page)
    assert page == run / "report.html"
    for part in ("run &lt;1&gt;", "115,200", "learning_rate", "0.002", "/data/cats &amp; dogs"):
        assert part in text
    for part in ("Loss", "Gradient norm", "Throughput", "final.verifier", "0.514", "000115200"):
        assert part in text
    for part in ("MFU", "Loss by timestep and reward", "Loss by timestep", "Loss by art only"):
        assert part in text
    for line in ("1.28k images", "58.88k images", "115.2k images", "low", "middle", "high"):
        assert f">{line}</text>" in page.read_text()
    assert page.read_text().count("data:image/png") == 1


def test_a_logarithmic_axis_has_decimal_labels() -> None:
    figure = plots.line_plot({"run": ([1, 2, 3], [2.0, 0.3, 0.04])}, log=True)

    labels = re.findall(r">([^<]+)</text>", plots.svg(figure, "log"))

    assert {"0.05", "0.1", "0.2", "0.5", "1", "2"} <= set(labels)
    assert not [label for label in labels if "$" in label or label == "0.3"]


def test_absent_sections_of_a_run_report_are_explained(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    text = text_of(write_run_report(run))
    assert "No metrics have been logged yet." in text
    assert "Loss by timestep" not in text
    assert "miro sample" in text
    assert "Not evaluated yet." in text


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_run_report_refuses_a_folder_without_a_run(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: no such file; .*miro train"):
        write_run_report(run)


def test_run_report_refuses_metrics_without_images(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 1 has no 'images'"):
        write_run_report(run)
