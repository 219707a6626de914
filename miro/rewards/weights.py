"""Locating and loading the weights of a reward: a file, a folder, or a hub repository."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def split_weights(weights: str | None, count: int) -> list[str | None]:
    """Split "FIRST,SECOND" into `count` names; None for each name that is not given.

    Raises:
        ValueError: There are more than `count` names.
    """
    names: list[str | None] = [name.strip() or None for name in (weights or "").split(",")]
    if len(names) > count:
        raise ValueError(f"weights {weights!r} are {len(names)} names, at most {count} are allowed")
    return names + [None] * (count - len(names))


def display_name(weights: str) -> str:
    """The name of weights in a dataset's manifest.

    A path is reduced to its last component, so that manifests of different machines agree; a hub id
    is unchanged.
    """
    return Path(weights).resolve().name if Path(weights).exists() else weights


def resolve_folder(weights: str, patterns: Sequence[str]) -> Path:
    """A local folder, or the hub repository's files of these `patterns`, downloaded if not cached.

    Raises:
        ValueError: There is no such folder, and it cannot be downloaded.
    """
    if Path(weights).is_dir():
        return Path(weights)
    # Imported here: it takes half a second.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    # Download before any library loads: offline this fails at once, whereas transformers builds an
    # empty tokenizer without an error if its files cannot be fetched.
    try:
        return Path(snapshot_download(weights, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise ValueError(
            f"{weights!r} is neither a folder nor a hub id OWNER/NAME; download one with "
            "`hf download OWNER/NAME --local-dir FOLDER` and give FOLDER"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{weights!r} is not a folder and cannot be downloaded from the hub ({error}); run "
            f"`hf download {weights} --local-dir FOLDER` where there is a network and give FOLDER"
        ) from error


def resolve_file(weights: str, names: Sequence[str], hub: str) -> Path:
    """A local file, or the first of `names` that exists in a folder or hub repository.

    Args:
        weights: A file, a folder or a hub id.
        names: File names in order of preference; only the first is downloaded.
        hub: The published repository, for the error message.

    Raises:
        ValueError: There is no such file.
    """
    if Path(weights).is_file():
        return Path(weights)
    folder = resolve_folder(weights, names[:1])
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"{folder} contains no {' and no '.join(names)}; run "
        f"`hf download {hub} {names[0]} --local-dir FOLDER` and give FOLDER"
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError if it is missing or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the folder of a model, or a hub id") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object; download it again")
    return content


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load a state dict saved by torch.save to the CPU, with weights_only=True.

    Raises:
        ValueError: The file is damaged, or contains anything but tensors.
    """
    with weights_only_errors(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: not a state_dict of tensors; download it again")
    return state


@contextmanager
def weights_only_errors(source: object) -> Iterator[None]:
    """Re-raise the errors of torch.load(weights_only=True) as ValueError."""
    # torch.serialization aliases the module whose UnpicklingError torch.load raises.
    from torch.serialization import pickle

    try:
        yield
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise ValueError(
            f"{source}: damaged, or contains more than tensors, which is never unpickled; download "
            "it again"
        ) from error
