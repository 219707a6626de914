"""Results of benchmarks are not lost: the folder is made or refused before anything is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_utils import argument_parser, write_json


def test_the_folder_of_the_results_is_created_while_the_options_are_parsed(tmp_path: Path) -> None:
    args = argument_parser("Measure.").parse_args(["--out", str(tmp_path / "a" / "b")])
    assert args.out == tmp_path / "a" / "b" and args.out.is_dir()


def test_a_folder_that_cannot_be_written_is_refused_while_the_options_are_parsed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_:
        argument_parser("Measure.").parse_args(["--out", str(tmp_path / "file" / "b")])
    assert exit_.value.code == 2 and "cannot be written" in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        write_json({"rate": 3.5}, tmp_path / "file" / "result.json")
    assert json.loads(capsys.readouterr().out) == {"rate": 3.5}
