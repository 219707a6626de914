"""Where a reward's weights are: a file, a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


def parts(weights: str | None, count: int) -> list[str | None]:
    """WEIGHTS as what it names, `count` of them, in order; None where one is not named.

    A reward made of two things takes "FIRST,SECOND", and "FIRST" alone where the second lies in the
    folder of the first or is to be the published one. A name holds no comma.

    Raises:
        ValueError: more are named than there are.
    """
    given: list[str | None] = [part.strip() or None for part in (weights or "").split(",")]
    if len(given) > count:
        raise ValueError(f"weights {weights!r} name {len(given)} things where {count} are taken")
    return given + [None] * (count - len(given))


def named(weights: str) -> str:
    """Weights as a dataset's manifest names them: a file or folder by its own name, as it may lie
    elsewhere on another machine; what the hub or a library has, as it is."""
    return Path(weights).resolve().name if Path(weights).exists() else weights


def find_folder(weights: str, patterns: Sequence[str]) -> Path:
    """The folder itself, or the hub repository's files of these `patterns`, downloaded if need be.

    Raises:
        ValueError: neither is there; the message says how to get it.
    """
    if Path(weights).is_dir():
        return Path(weights)
    if weights.count("/") != 1 or weights.startswith((".", "/", "~")):
        raise ValueError(
            f"{weights!r} is no folder, and no hub id either (which looks like OWNER/NAME)"
        )
    # Imported here: it takes half a second.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    # Asked as a whole and before any library asks: that fails at once where there is no network,
    # and transformers makes an empty tokenizer, without a word, of files it could not reach.
    try:
        return Path(snapshot_download(weights, allow_patterns=list(patterns)))
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"{weights!r} is no folder, and cannot be had from the hub ({error}). Where there is a "
            f"network: hf download {weights} --local-dir FOLDER; then give FOLDER"
        ) from error


def find_file(weights: str, names: Sequence[str]) -> Path:
    """The file itself, or the first of `names` that the folder or hub repository holds.

    Raises:
        ValueError: it is not there; the message says how to get it.
    """
    if Path(weights).is_file():
        return Path(weights)
    # One file of a repository, not all its versions: each is gigabytes.
    folder = find_folder(weights, names[:1])
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} holds no {' and no '.join(names)}")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, on the host.

    Raises:
        ValueError: the file is damaged, or holds more than tensors.
    """
    with tensors_alone(path):
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def tensors_alone(what: object) -> Iterator[None]:
    """What torch.load raises inside, where a file is not one of tensors alone, as a ValueError."""
    # Its name is known only there.
    from torch.serialization import pickle

    try:
        yield
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise ValueError(
            f"{what}: damaged, or holds more than tensors, which is never loaded; get it again"
        ) from error
