"""The compiled lane: kernels are compiled without a GPU, and their machine code is examined."""

from pathlib import Path

import pytest

from miro_kernels.lab import interpret

HERE = Path(__file__).parent


def pytest_configure() -> None:
    if interpret.interpreting():
        raise pytest.UsageError(
            f"{HERE} compiles kernels, which TRITON_INTERPRET=1 prevents: "
            "python -m pytest tests/kernels/compiled, without it"
        )
