"""Private names of torch and triton that the lab uses: each still exists, and is in one module."""

import ast
import importlib
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import pytest

from miro_kernels import lab

FOLDER = Path(lab.__file__).parent
PRIVATE = ("private_torch", "private_triton")
# Not documented, although without an underscore.
UNDOCUMENTED = ("triton.runtime", "triton.runtime.interpreter", "triton.runtime.jit")


def imported(module: str) -> Iterator[tuple[str, str]]:
    """(module, name) of each import of a file of the lab, without importing it."""
    for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


@pytest.mark.parametrize(
    ("module", "name"), [pair for module in PRIVATE for pair in imported(module)]
)
def test_a_private_name_exists(module: str, name: str) -> None:
    assert not name or hasattr(importlib.import_module(module), name), f"{module}.{name} is gone"


@pytest.mark.parametrize("module", PRIVATE)
def test_the_attributes_that_the_lab_patches_exist(module: str) -> None:
    private = importlib.import_module(f"miro_kernels.lab.{module}")
    gone = []
    for dotted in private.ATTRIBUTES:
        first, *rest = dotted.split(".")
        try:
            reduce(getattr, rest, getattr(private, first))
        except AttributeError:
            gone.append(dotted)

    assert gone == []


def test_no_other_module_of_the_lab_imports_private_names() -> None:
    wrong = [
        f"{path.name}: {module}.{name}"
        for path in sorted(FOLDER.glob("*.py"))
        if path.stem not in PRIVATE
        for module, name in imported(path.stem)
        if module.split(".")[0] in ("torch", "triton")
        and (
            module in UNDOCUMENTED or any(p.startswith("_") for p in f"{module}.{name}".split("."))
        )
    ]

    assert wrong == []
