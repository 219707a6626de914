"""A run's folder: where each thing lies, and checkpoints that are complete or absent.

    config.json  bins.json  versions.json     what the run is
    metrics.jsonl  tensorboard/               what it measured
    deepspeed.json                            what DeepSpeed was told
    checkpoints/<images>/, checkpoints/latest all that a resumed run needs; few are kept
    weights/<images>/                         averaged weights to sample from; all are kept

A checkpoint is written into a hidden folder beside its place, synced, and renamed: a stop at any
moment leaves the one before. Its manifest holds a checksum of every file, so that a damaged one is
refused by name. Tensors are safetensors; nothing is ever unpickled.

Each rank writes one file of tensors, PART. There a tensor is called KEY/NAME@START: the elements
from START on of KEY (master, ema, a moment) of the flattened parameter NAME. So a checkpoint says
nothing of how a run was cut, and one of any other cut can take it up.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from miro.utils.atomic_io import sync_file, sync_folder

log = logging.getLogger(__name__)

TENSORS, STATE, MANIFEST, LATEST = "tensors.safetensors", "state.json", "manifest.json", "latest"
PART = "rank-{:05d}.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: absent, damaged, or of another kind. Names the folder."""


class RunFolder:
    """The paths of a run; the only place that knows them."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.json"
        self.bins = self.root / "bins.json"
        self.versions = self.root / "versions.json"
        self.deepspeed = self.root / "deepspeed.json"
        self.metrics = self.root / "metrics.jsonl"
        self.tensorboard = self.root / "tensorboard"
        self.checkpoints = self.root / "checkpoints"
        self.latest = self.checkpoints / LATEST
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


def save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint folder of one file of tensors, complete or not at all.

    Raises:
        OSError: the disk is full or refuses; the partial folder is removed, others are untouched.
    """
    begin(folder)
    try:
        commit(folder, {TENSORS: write_tensors(folder, TENSORS, tensors)}, state)
    except OSError as error:
        raise cleanup_error(folder, str(error)) from error


def staging_path(folder: Path) -> Path:
    """Where a checkpoint is before it is complete."""
    return folder.with_name(f".{folder.name}.writing")


def begin(folder: Path) -> None:
    """Make room for the files of a checkpoint; what an earlier attempt left goes."""
    shutil.rmtree(staging_path(folder), ignore_errors=True)
    staging_path(folder).mkdir(parents=True)


def write_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> str:
    """Write and sync one file of a checkpoint that was begun; return its checksum.

    Raises:
        OSError: the disk is full or refuses.
    """
    path = staging_path(folder) / name
    try:
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
    except SafetensorError as error:
        # It reports a full disk as an error of its own.
        raise OSError(str(error)) from error
    sync_file(path)
    return _checksum(path)


def commit(folder: Path, sums: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Complete a checkpoint whose files of tensors, with these checksums, are all written."""
    aside = staging_path(folder)
    (aside / STATE).write_text(json.dumps(state))
    sync_file(aside / STATE)
    sums = {**sums, STATE: _checksum(aside / STATE)}
    (aside / MANIFEST).write_text(json.dumps({"version": 2, "sha256": sums}))
    sync_file(aside / MANIFEST)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(aside, folder)
    sync_folder(folder.parent)


def cleanup_error(folder: Path, reason: str) -> OSError:
    """Remove what is written of a checkpoint; the error that says so."""
    shutil.rmtree(staging_path(folder), ignore_errors=True)
    free = shutil.disk_usage(_existing(folder)).free
    return OSError(
        f"could not write {folder}: {reason} ({free / 2**20:.0f} MiB free); earlier checkpoints "
        "are untouched: make room and resume"
    )


class CheckpointReader:
    """An open checkpoint; tensors are read when they are asked for.

    state: the plain numbers saved with it. files: of tensors, with their checksums.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if it is absent, incomplete or not ours."""
        self.folder = folder
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            if manifest["version"] != 2:
                raise CheckpointError(f"{folder} is of version {manifest['version']}, not 2")
            self.files: dict[str, str] = dict(manifest["sha256"])
            self._check(STATE, self.files.pop(STATE))
            self.state: dict[str, Any] = json.loads((folder / STATE).read_text())
        except CheckpointError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder} is not a complete checkpoint: {error}") from error
        self._pieces: dict[str, list[_Stored]] | None = None

    def _check(self, name: str, checksum: str) -> None:
        try:
            found = _checksum(self.folder / name)
        except OSError as error:
            raise CheckpointError(f"{self.folder} is not a complete checkpoint: {error}") from error
        if found != checksum:
            raise CheckpointError(f"{self.folder / name} is damaged: its checksum differs")

    def check(self, share: int = 0, shares: int = 1) -> None:
        """Read every byte of every `shares`-th file; CheckpointError names a damaged one."""
        for name in sorted(self.files)[share::shares]:
            self._check(name, self.files[name])

    def _stored(self) -> dict[str, list[_Stored]]:
        if self._pieces is None:
            self._pieces = defaultdict(list)
            for name in self.files:
                file = safe_open(self.folder / name, framework="pt")
                for key in file.keys():  # noqa: SIM118 not a mapping
                    tensor, _, start = key.rpartition("@")
                    (size,) = file.get_slice(key).get_shape()
                    self._pieces[tensor].append(_Stored(int(start), int(size), key, file))
        return self._pieces

    def read(self, key: str, name: str, start: int, size: int) -> Tensor:
        """Elements start : start + size of what was saved as KEY/NAME, fp32.

        Raises:
            CheckpointError: it holds fewer.
        """
        out, filled = torch.empty(size), 0
        for piece in self._stored().get(f"{key}/{name}", ()):
            low, high = max(start, piece.start), min(start + size, piece.start + piece.size)
            if low < high:
                values = piece.file.get_slice(piece.key)[low - piece.start : high - piece.start]
                out[low - start : high - start] = values
                filled += high - low
        if filled != size:
            raise CheckpointError(
                f"{self.folder} is of another network: it holds {filled} of the {size} elements "
                f"of {key} of {name}"
            )
        return out


class _Stored(NamedTuple):
    start: int
    size: int
    key: str
    file: Any


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors, by the names of the files, and the state of a checkpoint; every byte is checked.

    Raises:
        CheckpointError: a file is absent, damaged or not ours.
    """
    reader = CheckpointReader(folder)
    reader.check()
    tensors: dict[str, Tensor] = {}
    for name in reader.files:
        tensors |= load_file(folder / name)
    return tensors, reader.state


def saved_in(folder: Path) -> list[tuple[int, Path]]:
    """(images, folder) of the checkpoints in `folder`, oldest first, whole or not."""
    return _numbered(folder)


def open_newest(
    folder: Path,
    share: int = 0,
    shares: int = 1,
    agree: Callable[[bool], bool] = bool,
    fits: Callable[[Mapping[str, Any]], None] = lambda state: None,
) -> CheckpointReader | None:
    """The newest checkpoint in `folder` that is whole and fits, or None; the others are named.

    Each of `shares` ranks reads its share of the files, and `agree` says whether all found theirs
    whole, so that every one of them takes the same. `fits` is given a checkpoint's state and raises
    ValueError where it is of something else.
    """
    for _, path in reversed(_numbered(folder)):
        reader = error = None
        try:
            reader = CheckpointReader(path)
            reader.check(share, shares)
            fits(reader.state)
        except CheckpointError as damaged:
            error = damaged
        except ValueError as foreign:
            error = CheckpointError(f"{path}: {foreign}")
        if agree(error is None):
            return reader
        log.warning("%s; trying the one before", error or f"another rank found {path} damaged")
    return None


def keep(folder: Path, images: int, *, last: int, every: int | None) -> None:
    """Delete all checkpoints up to `images` but the last few and those at multiples of `every`.

    One beyond `images` was damaged, and will be written again. What a stopped save left goes too.
    """
    written = [(number, path) for number, path in _numbered(folder) if number <= images]
    for number, path in written[:-last]:
        if every is None or number % every:
            shutil.rmtree(path)
    clear_unfinished(folder)


def clear_unfinished(folder: Path) -> None:
    """Remove what saves that were stopped have left."""
    for path in folder.glob(".*.writing"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
