"""The compile lane: kernels are compiled for GPUs that are not there, and what came out is read."""

from pathlib import Path

import pytest

from miro_kernels.lab import interpreter

HERE = Path(__file__).parent


def pytest_configure() -> None:
    if interpreter.interpreting():
        raise pytest.UsageError(
            f"{HERE} compiles kernels, which TRITON_INTERPRET=1 prevents: "
            "python -m pytest tests/kernels/compiled, without it"
        )
