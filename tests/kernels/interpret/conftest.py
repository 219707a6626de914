"""Kernel tests in Triton's interpreter with every access checked, or on a GPU without checks."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from miro.prepare.annotate import annotate
from miro.prepare.encode import EncodeConfig, encode
from miro_kernels.lab import interpreter, traffic

HERE = Path(__file__).parent
DEVICE = "cpu" if interpreter.interpreting() else "cuda"
os.environ["DS_ACCELERATOR"] = DEVICE


def pytest_configure() -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            f"{HERE} needs a GPU or the interpreter: run "
            "TRITON_INTERPRET=1 python -m pytest tests/kernels/interpret"
        )
    if DEVICE == "cpu":
        interpreter.patch_interpreter()


@pytest.fixture
def device() -> str:
    """cpu in the interpreter, else cuda."""
    return DEVICE


@pytest.fixture
def count() -> Callable[..., AbstractContextManager[traffic.Traffic]]:
    """lab.traffic.count; skips the test on a GPU, where traffic cannot be counted."""
    if DEVICE != "cpu":
        pytest.skip("traffic is counted in the interpreter")
    return traffic.count


@pytest.fixture(autouse=True)
def checked(request: pytest.FixtureRequest):
    """Check the accesses of every kernel of every test, unless the test uses `count` itself.

    torch.empty returns NaN, which exposes results that no kernel wrote.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # noqa: B010
    if DEVICE == "cuda" or "count" in request.fixturenames:
        yield
        return
    with traffic.count():
        yield


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path) -> Path:
    """An encoded dataset of 64 noise images, since a GPU machine may lack the OpenMoji artwork."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    draw = np.random.default_rng(3)
    for n in range(64):
        pixels = draw.integers(256, size=(32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{n:02}.png")
        caption = " ".join(["a", "red", "cat", "two", "dog"][: 1 + n % 5])
        (folder / "images" / f"{n:02}.txt").write_text(caption)
    annotate(folder / "images", folder / "scored", rewards=["colourfulness", "sharpness"])
    encode(folder / "scored", folder / "encoded", config=EncodeConfig(text=str(tiny_t5)))
    return folder / "encoded"
