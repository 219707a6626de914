"""The folder of a run, and checkpoints that are complete or absent.

    config.json  bins.json  versions.json     configuration, reward bins, package versions
    metrics.jsonl  tensorboard/               metrics
    deepspeed.json                            DeepSpeed's configuration
    checkpoints/<images>/, checkpoints/latest state to resume from; only recent ones are kept
    weights/<images>/                         EMA weights to sample from; all are kept

A checkpoint is written to a staging folder, fsynced and renamed, so a crash at any moment leaves
the previous one intact. Its manifest has a SHA-256 of every file; a damaged file is refused by
name. Tensors are safetensors; nothing is unpickled.

Each rank writes one file of tensors, RANK_FILE. A tensor is named KEY/NAME@START: the elements from
START on of KEY (master, ema, a moment) of the flattened parameter NAME. A checkpoint therefore
loads at any ZeRO stage and world size.
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
RANK_FILE = "rank-{:05d}.safetensors"
# An error of another kind, such as EACCES or EIO, does not show that a checkpoint is incomplete.
ABSENT = (FileNotFoundError, NotADirectoryError)


class CheckpointError(ValueError):
    """A checkpoint is absent, damaged or incompatible; the message names its folder."""


class RunFolder:
    """Paths of a run's files."""

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
        """Return the folder of the checkpoint after `images` images."""
        return self.checkpoints / f"{images:012d}"

    def weights_at(self, images: int) -> Path:
        """Return the folder of the EMA weights after `images` images."""
        return self.weights / f"{images:012d}"

    def weights_written(self) -> list[tuple[int, Path]]:
        """List (images, folder) of all saved EMA weights, oldest first."""
        return list_checkpoints(self.weights)


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """List (images, path) of the checkpoints in `folder`, damaged ones too, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((int(path.name), path) for path in folder.iterdir() if path.name.isdigit())


def newest_weights(folder: Path) -> Path:
    """Return a weights folder itself, or the newest weights of a run's folder.

    Raises:
        CheckpointError: there are none.
    """
    if (folder / MANIFEST).exists():
        return folder
    written = RunFolder(folder).weights_written()
    if not written:
        raise CheckpointError(
            f"{folder} is neither a weights folder nor a run that has written weights; give the "
            "folder `miro train` was given"
        )
    return written[-1][1]


def save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint with one file of tensors, complete or not at all.

    Raises:
        OSError: the disk is full or failed; the staging folder is removed and others are untouched.
    """
    begin(folder)
    try:
        commit(folder, {TENSORS: write_tensors(folder, TENSORS, tensors)}, state)
    except OSError as error:
        raise cleanup_error(folder, str(error)) from error


def staging_path(folder: Path) -> Path:
    """Return the folder in which a checkpoint is written before it is renamed."""
    return folder.with_name(f".{folder.name}.writing")


def begin(folder: Path) -> None:
    """Create an empty staging folder."""
    shutil.rmtree(staging_path(folder), ignore_errors=True)
    staging_path(folder).mkdir(parents=True)


def write_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> str:
    """Write and fsync one file of tensors in the staging folder; return its checksum.

    Raises:
        OSError: the disk is full or failed.
    """
    path = staging_path(folder) / name
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(
            {key: tensor.detach().contiguous() for key, tensor in tensors.items()},
            path, metadata={"format": "pt"},
        )  # fmt: skip
    except SafetensorError as error:
        # safetensors reports a full disk as an error of its own type.
        raise OSError(str(error)) from error
    path.chmod(mode)  # safetensors creates files that other users cannot read, whatever the umask.
    sync_file(path)
    return _checksum(path)


def commit(folder: Path, checksums: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Complete a checkpoint whose tensors are written: state, manifest, rename.

    `checksums` are those of the files of tensors; `state` is of plain JSON types.
    """
    staging = staging_path(folder)
    (staging / STATE).write_text(json.dumps(state))
    sync_file(staging / STATE)
    checksums = {**checksums, STATE: _checksum(staging / STATE)}
    (staging / MANIFEST).write_text(json.dumps({"version": 2, "sha256": checksums}))
    sync_file(staging / MANIFEST)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(staging, folder)
    sync_folder(folder.parent)


def cleanup_error(folder: Path, reason: str) -> OSError:
    """Remove the staging folder and return the error to raise."""
    shutil.rmtree(staging_path(folder), ignore_errors=True)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return OSError(
        f"could not write {folder}: {reason} ({free / 2**20:.0f} MiB free); earlier checkpoints "
        "are untouched: make room and resume"
    )


class CheckpointReader:
    """An open checkpoint, whose tensors are read on demand.

    Attributes:
        folder: the checkpoint.
        state: the plain numbers saved with it.
        files: SHA-256 by name of the files of tensors.

    Raises:
        CheckpointError: the checkpoint is absent, incomplete or of another version.
        OSError: it is there and cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            if manifest["version"] != 2:
                raise CheckpointError(f"{folder} is of version {manifest['version']}, not 2")
            self.files: dict[str, str] = dict(manifest["sha256"])
            self._check_file(STATE, self.files.pop(STATE))
            self.state: dict[str, Any] = json.loads((folder / STATE).read_text())
        except CheckpointError:
            raise
        except (*ABSENT, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder} is not a complete checkpoint: {error}") from error
        self._index: dict[str, list[_SavedSlice]] | None = None

    def _check_file(self, name: str, checksum: str) -> None:
        try:
            actual = _checksum(self.folder / name)
        except ABSENT as error:
            raise CheckpointError(f"{self.folder} is not a complete checkpoint: {error}") from error
        if actual != checksum:
            raise CheckpointError(f"{self.folder / name} is damaged: its checksum differs")

    def check(self, rank: int = 0, world: int = 1) -> None:
        """Verify the checksums of every `world`-th file.

        Raises:
            CheckpointError: a file is damaged or absent; names it.
            OSError: a file is there and cannot be read.
        """
        for name in sorted(self.files)[rank::world]:
            self._check_file(name, self.files[name])

    def _saved_slices(self) -> dict[str, list[_SavedSlice]]:
        if self._index is None:
            self._index = defaultdict(list)
            for name in self.files:
                file = safe_open(self.folder / name, framework="pt")
                for key in file.keys():  # noqa: SIM118 not a mapping
                    tensor, _, start = key.rpartition("@")
                    (size,) = file.get_slice(key).get_shape()
                    self._index[tensor].append(_SavedSlice(int(start), int(size), key, file))
        return self._index

    def read(self, key: str, name: str, start: int, size: int) -> Tensor:
        """Read elements start : start + size of KEY/NAME, however it was sharded, as fp32.

        Raises:
            CheckpointError: the checkpoint has fewer elements.
        """
        out, filled = torch.empty(size), 0
        for saved in self._saved_slices().get(f"{key}/{name}", ()):
            low, high = max(start, saved.start), min(start + size, saved.start + saved.size)
            if low < high:
                values = saved.file.get_slice(saved.key)[low - saved.start : high - saved.start]
                out[low - start : high - start] = values
                filled += high - low
        if filled != size:
            raise CheckpointError(
                f"{self.folder} is of another network: it has {filled} of the {size} elements "
                f"of {key} of {name}"
            )
        return out


class _SavedSlice(NamedTuple):
    start: int
    size: int
    key: str
    file: Any


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load all tensors, by the keys of their files, and the state; verifies all checksums.

    Raises:
        CheckpointError: a file is absent, damaged or of another version.
    """
    reader = CheckpointReader(folder)
    reader.check()
    tensors: dict[str, Tensor] = {}
    for name in reader.files:
        tensors |= load_file(folder / name)
    return tensors, reader.state


def open_newest(
    folder: Path,
    rank: int = 0,
    world: int = 1,
    all_true: Callable[[bool], bool] = bool,
    check_state: Callable[[Mapping[str, Any]], None] = lambda state: None,
) -> CheckpointReader | None:
    """Open the newest checkpoint that is complete and compatible, and log newer ones that are not.

    Args:
        folder: of the checkpoints.
        rank: verifies every `world`-th file.
        world: number of ranks.
        all_true: all-reduces whether the files are good, so that all ranks open the same one.
        check_state: raises ValueError for the state of another network.

    Returns:
        The checkpoint, or None if the folder has none at all.

    Raises:
        CheckpointError: there are checkpoints, and none is complete and compatible.
        OSError: a checkpoint is there and cannot be read.
    """
    rejected = []
    for _, path in reversed(list_checkpoints(folder)):
        reader = error = None
        try:
            reader = CheckpointReader(path)
            reader.check(rank, world)
            check_state(reader.state)
        except CheckpointError as damaged:
            error = damaged
        except ValueError as incompatible:
            error = CheckpointError(f"{path}: {incompatible}")
        except OSError as unreadable:
            error = unreadable
        if all_true(error is None):
            return reader
        error = error or CheckpointError(f"another rank found {path} damaged or unreadable")
        if not all_true(isinstance(error, CheckpointError)):
            raise error
        rejected.append(error)
        log.warning("%s", error)
    if not rejected:
        return None
    raise CheckpointError(
        f"{folder} has {len(rejected)} checkpoints and none can be resumed from; nothing was "
        "changed. Repair or restore one, or begin again in another folder. The newest: "
        f"{rejected[0]}"
    )


def delete_old(folder: Path, images: int, *, keep_last: int, keep_every: int | None) -> None:
    """Delete checkpoints up to `images`, except the last ones and multiples of `keep_every`.

    A checkpoint beyond `images` was damaged; it is ignored and will be written again.
    """
    written = [(number, path) for number, path in list_checkpoints(folder) if number <= images]
    for number, path in written[:-keep_last]:
        if keep_every is None or number % keep_every:
            shutil.rmtree(path)
    clear_unfinished(folder)


def clear_unfinished(folder: Path) -> None:
    """Delete the staging folders of interrupted saves."""
    for path in folder.glob(".*.writing"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
