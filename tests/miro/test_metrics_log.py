"""metrics.jsonl has one line per report, also after an interruption."""

import json
from pathlib import Path

import pytest
from helpers.full_disk import fill

from miro.training.metrics_log import MetricsWriter, read_metrics


def write(folder: Path, resumed_at: int, *reports: int) -> None:
    writer = MetricsWriter(folder / "run" / "metrics.jsonl", folder / "run" / "board", resumed_at)
    for images in reports:
        writer.write(images, {"loss": images / 2})
    writer.close()


def images_in(folder: Path) -> list[int]:
    return [line["images"] for line in read_metrics(folder / "run" / "metrics.jsonl")]


def test_written_reports_are_read(tmp_path: Path) -> None:
    write(tmp_path, 0, 10, 20)

    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (first["images"], first["loss"]) == (10, 5.0) and second["loss"] == 10.0
    assert first["time"] <= second["time"]
    assert list((tmp_path / "run" / "board").glob("events.*")), "TensorBoard has them too"


def test_a_report_can_be_read_while_the_run_continues(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "board", 0)
    writer.write(10, {"loss": 1.0})

    assert [line["images"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10]
    writer.close()


def test_a_resumed_run_removes_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 0, 10, 20, 30)

    write(tmp_path, 20, 30, 40)

    assert images_in(tmp_path) == [10, 20, 30, 40]


def test_a_truncated_line_is_skipped_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 0, 10, 20)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])

    assert images_in(tmp_path) == [10]
    assert "metrics.jsonl" in caplog.text and "truncated" in caplog.text
    write(tmp_path, 10, 20)
    assert images_in(tmp_path) == [10, 20]
    assert [json.loads(line)["images"] for line in path.read_text().splitlines()] == [10, 20]


def test_reports_on_a_full_disk_are_written_once_there_is_space(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = small_disk / "metrics.jsonl"
    writer = MetricsWriter(path, small_disk / "board", 0)
    writer.write(10, {"loss": 1.0})
    filler = fill(small_disk)

    for images in range(20, 1000, 10):
        writer.write(images, {"loss": 1.0, "gradient_norm": 2.0})
        writer.flush()
    assert f"could not write {path}" in caplog.text and len(read_metrics(path)) < 90
    filler.unlink()
    writer.write(1000, {"loss": 1.0})
    writer.close()

    assert [line["images"] for line in read_metrics(path)] == list(range(10, 1001, 10))


def test_an_absent_file_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
