"""The private names of torch that miro uses exist, and stand in one module."""

import re
from pathlib import Path

import pytest
import torch
import torch._dynamo.config
import torch._functorch.config

import miro

NAMES = [
    "_foreach_add_", "_foreach_lerp", "_foreach_lerp_", "_foreach_mul", "_foreach_mul_",
    "_dynamo.config.specialize_float",
    "_functorch.config.ban_recompute_materialized_backward",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_name_exists(name: str) -> None:
    owner = torch
    for part in name.split("."):
        assert hasattr(owner, part), f"torch.{name} is gone: {part} is missing"
        owner = getattr(owner, part)


def test_no_other_module_uses_private_names_of_torch() -> None:
    pattern = re.compile(r"\btorch\._\w|from torch import _|from torch\._")
    users = [
        path.name
        for folder in miro.__path__
        for path in Path(folder).rglob("*.py")
        if pattern.search(path.read_text(encoding="utf-8"))
    ]

    assert users == ["torch_internals.py"]
