"""Shards, manifest and scores: reading, atomic writing, and errors for damage."""

from __future__ import annotations

import errno
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.full_disk import mounted

from miro.data.shards import (
    Manifest,
    ShardIndex,
    ShardInfo,
    read_scores,
    read_shard_scores,
    score_columns,
    scores_path,
    verify,
    write_scores,
    write_shard,
)
from miro.sources.tar import ShardError, header, iterate_shard
from miro.utils.atomic_io import atomic_write, link_or_copy

Samples = list[tuple[str, dict[str, bytes]]]


def some_samples(count: int, first: int = 0) -> Samples:
    """Samples with members of 0 bytes and of sizes around the tar block."""
    sizes = [0, 1, 511, 512, 513, 1500]
    return [
        (f"{i:06d}", {"png": bytes([i % 256]) * sizes[i % 6], "json": b'{"i": %d}' % i})
        for i in range(first, first + count)
    ]


def make_dataset(folder: Path, counts: tuple[int, ...] = (3, 2)) -> tuple[Manifest, Samples]:
    samples = some_samples(sum(counts))
    infos, at = [], 0
    for number, count in enumerate(counts):
        path = folder / "shards" / f"{number:05d}.tar"
        infos.append(write_shard(path, samples[at : at + count]))
        at += count
    manifest = Manifest("images", ("original",), tuple(infos))
    manifest.write(folder)
    return manifest, samples


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB."""
    with mounted(tmp_path / "disk", "64k") as disk:
        yield disk


def test_a_written_shard_is_read_back_here_and_by_tarfile(tmp_path: Path) -> None:
    samples = some_samples(7)
    info = write_shard(tmp_path / "00000.tar", samples)
    assert list(iterate_shard(tmp_path / "00000.tar")) == samples
    assert (info.name, info.samples) == ("00000.tar", 7)
    assert info.bytes == (tmp_path / "00000.tar").stat().st_size
    with tarfile.open(tmp_path / "00000.tar") as tar:
        read = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar.getmembers()} == {(0, 0, 0, "")}
    assert read == {f"{key}.{name}": data for key, all_ in samples for name, data in all_.items()}


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    first = write_shard(tmp_path / "a" / "0.tar", some_samples(5))
    second = write_shard(tmp_path / "b" / "0.tar", iter(some_samples(5)))
    assert first == second
    assert (tmp_path / "a/0.tar").read_bytes() == (tmp_path / "b/0.tar").read_bytes()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("a.png", 0),
        ("k" * 96 + ".png", 12345678),
        ("k" * 97 + ".png", 1),
        ("é.png", 5),
        ("x", 8**11),
    ],
)
def test_headers_equal_those_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert header(name, size) == info.tobuf(tarfile.PAX_FORMAT)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_non_ascii_names_of_every_tar_format_are_read(tmp_path: Path, form: int) -> None:
    names = ["./plain.jpg", "d" * 90 + "/" + "f" * 60 + ".jpg", "dir.with.dots/a.seg.PNG"]
    if form != tarfile.USTAR_FORMAT:
        names += ["größe/" + "x" * 200 + ".jpg", "y" * 300 + ".jpg"]
    with tarfile.open(tmp_path / "0.tar", "w", format=form) as tar:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(b"." * len(name)))
    found = list(iterate_shard(tmp_path / "0.tar"))
    assert [key for key, _ in found] == [
        name.removeprefix("./").removesuffix(".jpg").removesuffix(".seg.PNG") for name in names
    ]
    assert [len(data) for _, members in found for data in members.values()] == [*map(len, names)]
    assert list(found[2][1]) == ["seg.png"]


def test_concatenated_tars_are_read_past_the_end_of_archive_mark(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", some_samples(2))
    write_shard(tmp_path / "1.tar", some_samples(2, first=2))
    joined = (tmp_path / "0.tar").read_bytes() + (tmp_path / "1.tar").read_bytes()
    (tmp_path / "joined.tar").write_bytes(joined)
    assert list(iterate_shard(tmp_path / "joined.tar")) == some_samples(4)


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "000001"])
def test_an_invalid_or_repeated_key_raises_and_leaves_no_file(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        write_shard(tmp_path / "0.tar", [*some_samples(3), (key, {"png": b""})])
    assert names_in(tmp_path) == set()


def test_an_exception_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", some_samples(2))
    before = (tmp_path / "0.tar").read_bytes()

    def failing() -> Iterator[tuple[str, dict[str, bytes]]]:
        yield from some_samples(1)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_shard(tmp_path / "0.tar", failing())
    assert (tmp_path / "0.tar").read_bytes() == before
    assert names_in(tmp_path) == {"0.tar"}


def test_a_truncated_tar_yields_its_complete_samples_and_names_the_last(tmp_path: Path) -> None:
    samples = some_samples(5)
    write_shard(tmp_path / "0.tar", samples)
    data = (tmp_path / "0.tar").read_bytes()
    found: Samples = []
    for length in range(1, len(data) - 1024, 200):
        (tmp_path / "cut.tar").write_bytes(data[:length])
        found = []
        with pytest.raises(ShardError, match=r"cut.tar") as error:
            for sample in iterate_shard(tmp_path / "cut.tar"):
                found.append(sample)
        assert found == samples[: len(found)]
        last = f"the last complete sample is '{found[-1][0]}'" if found else "no sample is complete"
        assert last in str(error.value)
    assert len(found) == 4  # a sample is complete when the next begins; the last is unknown


@pytest.mark.parametrize("offset", [0, 3, 124, 130, 150, 156])
def test_reading_ends_at_a_damaged_header(tmp_path: Path, offset: int) -> None:
    samples = some_samples(3)
    write_shard(tmp_path / "0.tar", samples)
    data = bytearray((tmp_path / "0.tar").read_bytes())
    data[data.index(b"000002.png") + offset] ^= 0x15
    (tmp_path / "0.tar").write_bytes(data)
    found = []
    with pytest.raises(ShardError, match=r"damaged.*'000000'"):
        for sample in iterate_shard(tmp_path / "0.tar"):
            found.append(sample)
    assert found == samples[:1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"hello", "truncated"),
        (b"<html>" * 200, "not a tar"),
        (b"\x1f\x8b\x08\0" * 200, "gunzip"),
    ],
)
def test_a_file_that_is_not_a_tar_raises(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(ShardError, match=says):
        list(iterate_shard(tmp_path / "0.tar"))


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("b.jpg", tarfile.SYMTYPE),
        ("b.jpg", tarfile.LNKTYPE),
        ("b.jpg", tarfile.FIFOTYPE),
        ("b.jpg", tarfile.CHRTYPE),
        ("b.jpg", tarfile.BLKTYPE),
        ("../b.jpg", tarfile.REGTYPE),
        ("a/../../b.jpg", tarfile.REGTYPE),
        ("/etc/b.jpg", tarfile.REGTYPE),
    ],
)
def test_unsafe_members_raise_or_are_skipped(tmp_path: Path, name: str, flag: bytes) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for member, member_flag in [
            ("a.jpg", tarfile.REGTYPE),
            (name, flag),
            ("c.jpg", tarfile.REGTYPE),
        ]:
            info = tarfile.TarInfo(member)
            info.type, info.linkname = member_flag, "/etc/passwd"
            tar.addfile(info)
    with pytest.raises(ShardError, match=r"regular file|outside"):
        list(iterate_shard(tmp_path / "0.tar"))
    skipped = []
    found = list(iterate_shard(tmp_path / "0.tar", lambda member, _: skipped.append(member)))
    assert [key for key, _ in found] == ["a", "c"]
    assert skipped == [name]


def test_the_index_reads_every_member_of_every_shard(tmp_path: Path) -> None:
    manifest, samples = make_dataset(tmp_path, (3, 2, 4))
    index = ShardIndex(tmp_path, manifest)
    assert len(index) == 9
    assert index.keys == [key for key, _ in samples]
    for i in reversed(range(9)):
        for extension, data in samples[i][1].items():
            assert bytes(index.member(i, extension)) == data
    with pytest.raises(KeyError, match=r"json.*png.*not 'jpg'"):
        index.member(4, "jpg")


def test_the_index_reads_samples_with_different_members(tmp_path: Path) -> None:
    shards = [[("a", {"png": b"1"}), ("b", {"jpg": b"2"})], [("c", {"txt": b"3"})]]
    infos = [write_shard(tmp_path / "shards" / f"{i}.tar", s) for i, s in enumerate(shards)]
    Manifest("images", (), tuple(infos)).write(tmp_path)
    index = ShardIndex(tmp_path)
    assert [index.extensions(i) for i in range(3)] == [["png"], ["jpg"], ["txt"]]
    assert bytes(index.member(2, "txt")) == b"3"


def test_a_missing_truncated_or_mismatched_shard_raises(tmp_path: Path) -> None:
    manifest, _ = make_dataset(tmp_path)
    listed = manifest.shards[0]
    mismatched = ShardInfo(listed.name, listed.samples + 1, listed.bytes, listed.sha256)
    with pytest.raises(ValueError, match=r"00000.tar: 3 samples, the manifest says 4"):
        ShardIndex(tmp_path, Manifest("images", (), (mismatched,)))
    path = tmp_path / "shards" / "00001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"00001.tar.*the manifest says"):
        ShardIndex(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"00001.tar: no such file"):
        ShardIndex(tmp_path)


def test_a_manifest_is_read_back_as_written(tmp_path: Path) -> None:
    shards = (ShardInfo("00000.tar", 3, 4096, "ab"), ShardInfo("00001.tar", 2, 2048, "cd"))
    manifest = Manifest(
        "encoded", ("original", "long"), shards, ("sharpness",), {"latents": "pixels"}, {"a": [1]}
    )
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert manifest.samples == 5
    assert json.loads((tmp_path / "manifest.json").read_text())["version"] == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "miro annotate"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"version": 2}', "update miro-trainer"),
        ('{"version": 1, "kind": "images"}', "shards"),
        ('{"version": 1, "kind": "images", "captions": [], "shards": [], "x": 1}', "'x'"),
        ('{"version": 1, "kind": "i", "captions": [], "shards": []}', "kind is 'i'"),
        (
            '{"version": 1, "kind": "images", "captions": [], "shards":'
            ' [{"name": "../a.tar", "samples": 1, "bytes": 1, "sha256": ""}]}',
            "not the name of a shard",
        ),
    ],
)
def test_an_invalid_manifest_raises_with_its_path(
    tmp_path: Path, content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=says) as error:
        Manifest.read(tmp_path)
    assert "manifest.json" in str(error.value)


def test_scores_are_read_in_shard_order_and_nan_is_not_null(tmp_path: Path) -> None:
    manifest, _ = make_dataset(tmp_path, (2, 1))
    captions = ["original", "long"] * 2
    values = {"sharpness": [1, 2, 3, np.nan], "clip": np.array([0.5, 0.25, 0, 1])}
    first, second = (scores_path(tmp_path, shard) for shard in manifest.shards)
    write_scores(first, ["a", "a", "b", "b"], captions, values)
    write_scores(second, ["c"], ["original"], {"sharpness": [7], "clip": [8]})
    rewarded = Manifest("images", ("original", "long"), manifest.shards, ("clip", "sharpness"))
    table = read_scores(tmp_path, rewarded)
    assert table.keys == ["a", "a", "b", "b", "c"]
    assert table.captions == [*captions, "original"]
    assert table.rewards == ("clip", "sharpness")
    assert table.values.dtype == np.float32
    np.testing.assert_array_equal(table.values[:, 1], np.array([1, 2, 3, np.nan, 7], np.float32))
    np.testing.assert_array_equal(table.values[:, 0], np.array([0.5, 0.25, 0, 1, 8], np.float32))
    assert pq.read_table(first)["sharpness"].null_count == 0
    assert str(pq.read_schema(first).field("clip").type) == "float"


def test_missing_or_truncated_scores_raise_with_their_path(tmp_path: Path) -> None:
    manifest, _ = make_dataset(tmp_path, (1,))
    path = scores_path(tmp_path, manifest.shards[0])
    with pytest.raises(ValueError, match=r"00000.parquet: no such file.*miro annotate"):
        read_scores(tmp_path)
    write_scores(path, ["a"], ["original"], {"sharpness": [1]})
    with_clip = Manifest("images", ("original",), manifest.shards, ("clip",))
    with pytest.raises(ValueError, match="no column 'clip'"):
        read_scores(tmp_path, with_clip)
    path.write_bytes(path.read_bytes()[:-20])
    for read in (read_shard_scores, score_columns):
        with pytest.raises(ValueError, match=r"00000.parquet: not a score file"):
            read(path)


def test_verify_finds_one_changed_byte(tmp_path: Path) -> None:
    manifest, _ = make_dataset(tmp_path)
    verify(tmp_path)
    path = tmp_path / "shards" / manifest.shards[1].name
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"00001.tar: its checksum"):
        verify(tmp_path)


def test_atomic_write_takes_bytes_or_a_function_of_the_path(tmp_path: Path) -> None:
    atomic_write(tmp_path / "new" / "a", b"one")
    atomic_write(tmp_path / "new" / "a", lambda path: path.write_bytes(b"two"))
    assert (tmp_path / "new" / "a").read_bytes() == b"two"
    assert names_in(tmp_path) == {"a"}


def test_link_or_copy_hard_links_and_may_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    for _ in range(2):
        link_or_copy(tmp_path / "a", tmp_path / "to" / "b")
    assert (tmp_path / "to" / "b").samefile(tmp_path / "a")
    assert names_in(tmp_path) == {"a", "b"}


def test_link_or_copy_copies_across_file_systems(tmp_path: Path, small_disk: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    link_or_copy(tmp_path / "a", small_disk / "b")
    assert (small_disk / "b").read_bytes() == b"one"
    assert names_in(small_disk) == {"b"}


def test_a_full_disk_raises_with_the_free_bytes_and_keeps_complete_files(small_disk: Path) -> None:
    write_shard(small_disk / "0.tar", some_samples(5))
    with pytest.raises(OSError, match=r"no space left.*bytes are needed, [\d,]+ are free") as error:
        write_shard(small_disk / "1.tar", some_samples(200))
    assert error.value.errno == errno.ENOSPC
    assert "1.tar" in str(error.value)
    with pytest.raises(OSError, match="100,000 bytes are needed"):
        atomic_write(small_disk / "2.bin", bytes(100_000))
    assert names_in(small_disk) == {"0.tar"}
    assert list(iterate_shard(small_disk / "0.tar")) == some_samples(5)
