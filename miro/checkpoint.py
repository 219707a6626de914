"""A run's folder: where each thing lies, and checkpoints that are complete or absent.

    config.json  bins.json  versions.json     what the run is
    metrics.jsonl  tensorboard/               what it measured
    checkpoints/<images>/                     all that a resumed run needs; the last few are kept
    weights/<images>/                         averaged weights to sample from; all are kept

A checkpoint is written into a hidden folder beside its place, synced, and renamed: a stop at any
moment leaves the one before. Its manifest holds a checksum of every file, so that a damaged one is
refused by name. Tensors are safetensors; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger(__name__)

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: absent, damaged, or of another kind. Names the folder."""


class RunFolder:
    """The paths of a run; the only place that knows them."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.json"
        self.bins = self.root / "bins.json"
        self.versions = self.root / "versions.json"
        self.metrics = self.root / "metrics.jsonl"
        self.tensorboard = self.root / "tensorboard"
        self.checkpoints = self.root / "checkpoints"
        self.weights = self.root / "weights"

    def checkpoint(self, images: int) -> Path:
        return self.checkpoints / f"{images:012d}"

    def weights_at(self, images: int) -> Path:
        return self.weights / f"{images:012d}"

    def weights_written(self) -> list[tuple[int, Path]]:
        """(images, folder) of all averaged weights, oldest first."""
        return _numbered(self.weights)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    return sorted((int(path.name), path) for path in folder.iterdir() if path.name.isdigit())


def write_text(path: Path, text: str) -> None:
    """Replace a small file at once: a reader sees the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        _sync(file.fileno())
    os.replace(aside, path)


def save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint folder, complete or not at all.

    Raises:
        OSError: the disk is full or refuses; the partial folder is removed, others are untouched.
    """
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        owned = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(owned, aside / TENSORS)
        (aside / STATE).write_text(json.dumps(state))
        sums = {name: _checksum(aside / name) for name in (TENSORS, STATE)}
        (aside / MANIFEST).write_text(json.dumps({"version": 1, "sha256": sums}))
        for name in (TENSORS, STATE, MANIFEST):
            with open(aside / name, "rb") as file:
                _sync(file.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as an error of its own.
        shutil.rmtree(aside, ignore_errors=True)
        free = shutil.disk_usage(_existing(folder)).free
        raise OSError(
            f"could not write {folder}: {error} ({free / 2**20:.0f} MiB free); earlier "
            "checkpoints are untouched: make room and resume"
        ) from error
    _sync_folder(folder.parent)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of a checkpoint whose every byte is as it was written.

    Raises:
        CheckpointError: a file is absent, damaged or not ours.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["version"] != 1:
            raise CheckpointError(f"{folder} is of version {manifest['version']}, not 1")
        for name in (TENSORS, STATE):
            if _checksum(folder / name) != manifest["sha256"][name]:
                raise CheckpointError(f"{folder / name} is damaged: its checksum differs")
        return load_file(folder / TENSORS), json.loads((folder / STATE).read_text())
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: {error}") from error


def load_latest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint in `folder` that is whole, or None; damaged ones are named."""
    for _, path in reversed(_numbered(folder)):
        try:
            return load(path)
        except CheckpointError as error:
            log.warning("%s; trying the one before", error)
    return None


def keep_last(folder: Path, images: int, count: int) -> None:
    """Delete all but the last `count` checkpoints up to `images`, and what a stopped save left.

    One beyond `images` was damaged, and will be written again.
    """
    written = [path for number, path in _numbered(folder) if number <= images]
    for path in written[:-count]:
        shutil.rmtree(path)
    for path in folder.glob(".*.writing"):
        shutil.rmtree(path)


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
