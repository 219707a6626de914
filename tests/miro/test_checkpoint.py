"""Checkpoints are complete or absent, and damaged ones are refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.full_disk import fill, mounted
from torch import Tensor

from miro.training import checkpoint
from miro.training.checkpoint import MANIFEST, STATE, TENSORS, CheckpointError, RunFolder
from miro.utils import atomic_io

NUMBERS = {"images": 640, "name": "é", "nested": {"a": [1, 2.5, None]}}


def tensors(number: int = 0, size: int = 50) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "plain": torch.randn(size, generator=generator),
        "strided": torch.randn(4, 6, generator=generator).T,
        "half": torch.randn(3, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
    }


def test_tensors_and_state_are_loaded_exactly(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a" / "000640", tensors(), NUMBERS)

    loaded, state = checkpoint.load(tmp_path / "a" / "000640")

    assert state == NUMBERS and loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def test_a_save_removes_the_staging_folder_of_an_interrupted_one(tmp_path: Path) -> None:
    (tmp_path / ".000640.writing").mkdir()  # left by a kill during an earlier save
    (tmp_path / ".000640.writing" / TENSORS).write_bytes(b"half")

    checkpoint.save(tmp_path / "000640", tensors(), NUMBERS)

    assert [path.name for path in tmp_path.iterdir()] == ["000640"]
    checkpoint.load(tmp_path / "000640")


def flip(path: Path, fraction: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(fraction * (len(data) - 1))] ^= 0x01
    path.write_bytes(bytes(data))


def truncate(path: Path, _: float) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def delete(path: Path, _: float) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, delete], ids=lambda f: f.__name__)
@pytest.mark.parametrize("file", [TENSORS, STATE, MANIFEST])
@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_a_damaged_checkpoint_is_refused_by_name(
    tmp_path: Path, damage: Callable[[Path, float], None], file: str, fraction: float
) -> None:
    folder = tmp_path / "000640"
    checkpoint.save(folder, tensors(), NUMBERS)
    damage(folder / file, fraction)

    with pytest.raises(CheckpointError, match=str(folder)):
        checkpoint.load(folder)


def test_a_checkpoint_of_a_newer_version_says_so(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "1", tensors(), NUMBERS)
    manifest = json.loads((tmp_path / "1" / MANIFEST).read_text())
    (tmp_path / "1" / MANIFEST).write_text(json.dumps(manifest | {"version": 3}))

    with pytest.raises(CheckpointError, match="version 3, not 2"):
        checkpoint.load(tmp_path / "1")


def test_a_manifest_without_checksums_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "1", tensors(), NUMBERS)
    (tmp_path / "1" / MANIFEST).write_text('{"version": 2, "sha256": {}}')

    with pytest.raises(CheckpointError, match=str(tmp_path / "1")):
        checkpoint.load(tmp_path / "1")


def test_an_absent_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing"):
        checkpoint.load(tmp_path / "nothing")
    assert checkpoint.open_newest(tmp_path / "nothing") is None


def test_the_newest_complete_checkpoint_is_opened_and_damaged_ones_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (90, 100, 110, 1000):
        checkpoint.save(tmp_path / f"{number}", tensors(number), {"images": number})
    flip(tmp_path / "1000" / TENSORS, 0.9)
    (tmp_path / "110" / MANIFEST).unlink()
    (tmp_path / ".2000.writing").mkdir()

    found = checkpoint.open_newest(tmp_path)

    assert found is not None and found.state == {"images": 100}
    assert torch.equal(checkpoint.load(found.folder)[0]["plain"], tensors(100)["plain"])
    assert str(tmp_path / "1000" / TENSORS) in caplog.text and str(tmp_path / "110") in caplog.text


def test_a_damaged_checkpoint_is_replaced_by_a_new_one_of_its_number(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "640", tensors(), NUMBERS)
    flip(tmp_path / "640" / TENSORS, 0.9)

    checkpoint.save(tmp_path / "640", tensors(1), NUMBERS)

    assert torch.equal(checkpoint.load(tmp_path / "640")[0]["plain"], tensors(1)["plain"])


@pytest.mark.parametrize(("every", "for_good"), [(None, []), (50, ["000000000050"]), (70, [])])
def test_old_checkpoints_are_deleted_except_the_last_and_multiples(
    tmp_path: Path, every: int | None, for_good: list[str]
) -> None:
    for number in (50, 90, 100, 1000, 3000):
        checkpoint.save(tmp_path / f"{number:012d}", tensors(), {})
    (tmp_path / ".000000002000.writing").mkdir()
    (tmp_path / "notes.txt").touch()

    # The run is at 1000 images: the checkpoint at 3000 was damaged and is ignored.
    checkpoint.delete_old(tmp_path, images=1000, keep_last=2, keep_every=every)

    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*for_good, "000000000100", "000000001000", "000000003000", "notes.txt"]


def test_write_text_replaces_a_file_atomically(tmp_path: Path) -> None:
    path = tmp_path / "run" / "config.json"

    atomic_io.write_text(path, "old")
    atomic_io.write_text(path, "neé")

    assert path.read_text(encoding="utf-8") == "neé" and list(path.parent.iterdir()) == [path]


def test_weights_are_listed_by_images(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.weights_written() == []
    for images in (1_000_000, 64):
        checkpoint.save(run.weights_at(images), {"w": torch.ones(1)}, {})

    assert run.weights_written() == [
        (64, run.weights_at(64)),
        (1_000_000, run.weights_at(1_000_000)),
    ]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    with mounted(tmp_path / "disk", "1m") as disk:
        yield disk


@pytest.mark.parametrize("left", [0, 4096, 400_000])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_so(small_disk: Path, left: int) -> None:
    checkpoint.save(small_disk / "1", tensors(1, size=100_000), {"images": 1})
    filler = fill(small_disk, left)

    with pytest.raises(OSError) as error:
        checkpoint.save(small_disk / "2", tensors(2, size=150_000), {"images": 2})

    for part in (str(small_disk / "2"), "MiB free", "earlier checkpoints are untouched"):
        assert part in str(error.value)
    assert sorted(path.name for path in small_disk.iterdir()) == ["1", "filler"]
    found = checkpoint.open_newest(small_disk)
    assert found is not None and found.state == {"images": 1}

    filler.unlink()
    checkpoint.save(small_disk / "2", tensors(2, size=150_000), {"images": 2})
    assert checkpoint.load(small_disk / "2")[1] == {"images": 2}
