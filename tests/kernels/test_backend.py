"""Backend selection: by name, by device, or an error."""

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


def run_process(code: str, **variables: str) -> subprocess.CompletedProcess:
    # In a process, because TRITON_INTERPRET and MIRO_KERNELS are read once, at import.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_auto_selects_torch_on_a_cpu_and_logs_it_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_default", "auto")
    monkeypatch.setattr(backend, "_logged", set())

    with caplog.at_level(logging.INFO):
        swiglu(X)
        swiglu(X)

    (message,) = caplog.messages
    assert "auto selected torch" in message and "on cpu" in message


def test_triton_on_a_cpu_without_the_interpreter_raises() -> None:
    with use_backend("triton"), pytest.raises(ValueError) as error:
        swiglu(X)

    for part in ("swiglu", "triton", "cpu", "TRITON_INTERPRET"):
        assert part in str(error.value)


def test_use_backend_nests_and_ends_with_its_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "_default", "torch")
    with use_backend("triton"):
        with use_backend("auto"):
            assert backend.backend() == "torch", "auto falls back to MIRO_KERNELS"
        assert backend.backend() == "triton"
    assert backend.backend() == "torch"


@pytest.mark.parametrize("name", ["tritn", "", "cuda"])
def test_an_unknown_backend_raises_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="auto, triton, torch, flash_attn"), use_backend(name):
        pass


def test_the_environment_variable_sets_the_backend_and_is_checked() -> None:
    code = (
        "import importlib, os; from miro_kernels import backend; print(backend.backend());"
        "os.environ['MIRO_KERNELS'] = 'fast'; importlib.reload(backend)"
    )

    found = run_process(code, MIRO_KERNELS="torch")

    assert found.stdout.strip() == "torch"
    assert "MIRO_KERNELS must be one of" in found.stderr and "got 'fast'" in found.stderr


def test_ops_import_and_run_without_triton() -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a);"
        "import torch, miro_kernels as m; from miro_kernels import _triton;"
        "assert not _triton.AVAILABLE; print(m.swiglu(torch.ones(2)).item());"
        "context = m.use_backend('triton'); context.__enter__(); m.swiglu(torch.ones(2))"
    )

    found = run_process(code)

    assert found.stdout.startswith("0.73"), found.stderr
    assert "Triton is not installed" in found.stderr


def test_a_run_whose_backend_is_unsupported_does_not_start(encoded: Path, tmp_path: Path) -> None:
    options = ["demo", "--run", str(tmp_path / "run"), "--data", str(encoded)]

    with pytest.raises(ValueError, match="triton was requested.*cpu"):
        cli.train([*options, "--kernels", "triton"])

    assert not (tmp_path / "run").exists()


def test_the_command_line_lists_the_backends(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.train(["demo", "--kernels", "cuda"])

    message = capsys.readouterr().err
    assert all(name in message for name in backend.BACKENDS)
