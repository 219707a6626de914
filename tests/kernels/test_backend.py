"""Which code computes an op: asked for, found out, or refused."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from miro.cli import train as cli
from miro_kernels import backend, swiglu, use_backend

X = torch.ones(2, 4)


def in_a_process(code: str, **variables: str) -> subprocess.CompletedProcess:
    # TRITON_INTERPRET and MIRO_KERNELS are read once, at import.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_auto_takes_torch_on_a_cpu_and_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_default", "auto")
    monkeypatch.setattr(backend, "_said", set())

    with caplog.at_level(logging.INFO):
        swiglu(X)
        swiglu(X)

    (message,) = caplog.messages
    assert "auto chose torch" in message and "on cpu" in message


def test_triton_is_refused_where_it_cannot_run() -> None:
    with use_backend("triton"), pytest.raises(ValueError) as error:
        swiglu(X)

    for part in ("swiglu", "triton", "cpu", "TRITON_INTERPRET"):
        assert part in str(error.value)


def test_the_innermost_choice_counts_and_ends_with_its_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "_default", "torch")
    with use_backend("triton"):
        with use_backend("auto"):
            assert backend.backend() == "torch", "auto leaves it to the variable"
        assert backend.backend() == "triton"
    assert backend.backend() == "torch"


@pytest.mark.parametrize("name", ["tritn", "", "cuda"])
def test_an_unknown_backend_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="auto, triton, torch, flash_attn"), use_backend(name):
        pass


def test_the_variable_decides_and_is_checked() -> None:
    code = (
        "import importlib, os; from miro_kernels import backend; print(backend.backend());"
        "os.environ['MIRO_KERNELS'] = 'fast'; importlib.reload(backend)"
    )

    found = in_a_process(code, MIRO_KERNELS="torch")

    assert found.stdout.strip() == "torch"
    assert "MIRO_KERNELS must be one of" in found.stderr and "got 'fast'" in found.stderr


def test_ops_import_and_compute_without_triton() -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a);"
        "import torch, miro_kernels as m; from miro_kernels import _triton;"
        "assert not _triton.AVAILABLE; print(m.swiglu(torch.ones(2)).item());"
        "choice = m.use_backend('triton'); choice.__enter__(); m.swiglu(torch.ones(2))"
    )

    found = in_a_process(code)

    assert found.stdout.startswith("0.73"), found.stderr
    assert "Triton is not installed" in found.stderr


def test_a_run_whose_kernels_cannot_be_had_does_not_begin(encoded: Path, tmp_path: Path) -> None:
    options = ["demo", "--run", str(tmp_path / "run"), "--data", str(encoded)]

    with pytest.raises(ValueError, match="triton was asked for.*cpu"):
        cli.train([*options, "--kernels", "triton"])

    assert not (tmp_path / "run").exists()


def test_the_command_line_offers_the_backends(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.train(["demo", "--kernels", "cuda"])

    message = capsys.readouterr().err
    assert all(name in message for name in backend.BACKENDS)
