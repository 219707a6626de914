"""Tests of compiled code for GPUs that are not present, in a process without the interpreter."""

from pathlib import Path

import pytest

from miro_kernels.lab import interpreter

HERE = Path(__file__).parent


def pytest_configure() -> None:
    if interpreter.interpreting():
        raise pytest.UsageError(
            f"{HERE} compiles kernels; unset TRITON_INTERPRET and run "
            "python -m pytest tests/kernels/compiled"
        )
