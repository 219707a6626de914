"""Hostile tables and tars: each is refused or set aside with its reason, and the rest goes on."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.corrupt import IMAGE, bomb
from helpers.sources import good, picture, pictures, refused, save_to_disk, write_csv, write_tar

from miro.data.shards import read_scores
from miro.prepare.annotate import annotate
from miro.sources.source import open_source


def test_of_a_bad_csv_the_bad_rows_are_set_aside(tmp_path: Path) -> None:
    pictures(tmp_path)
    lines = [
        b"path,caption,note",
        b"0.png,good,x",
        b"1.png,zero \0 byte,x",
        b"1.png,gr\xfcn,x",
        b"1.png,short",
        b"1.png,long,x,y",
        b'1.png,"stray" quotes,x',
        b"1.png," + b"x" * 10_000_000 + b",x",
        b"1.png,   ,x",
        b"1.png,,x",
        b"2.png,good,\xff \0",
        b"\xff.png,good,x",
        b"a\0b.png,good,x",
        b"https://host/a.png,good,x",
        b"absent.png,good,x",
        b"/dev/zero,good,x",
        b"a" * 300 + b"/" + b"b" * 300 + b".png,good,x",
        b",good,x",
        b"3.png,good,x",
        b'1.png,"never closed,x',
    ]

    source = open_source(write_csv(tmp_path / "a.csv", b"\n".join(lines)), 4)

    assert source.total == 19
    assert list(good(source)) == ["00000000", "00000009", "00000017"]
    assert good(source)["00000009"].extra == {}  # what is not UTF-8 cannot be kept
    reasons = refused(source)
    for row, field, says in [
        (1, "caption", "zero byte"),
        (2, "caption", "not UTF-8 (byte 0xfc at 2)"),
        (3, "row", "2 cells, the header 3"),
        (4, "row", "4 cells, the header 3"),
        (5, "row", "cannot be read"),
        (6, "row", "more than 1 MB"),
        (7, "caption", "empty"),
        (8, "caption", "no caption in caption"),
        (10, "image", "is missing"),
        (11, "image", "zero byte"),
        (12, "image", "is a URL; download"),
        (13, "image", "'absent.png' is missing"),
        (14, "image", "not a plain file"),
        (15, "image", "too long"),
        (16, "image", "empty"),
        (18, "row", "ends inside quotation marks"),
    ]:
        assert says in reasons[f"a.csv:{row:08d}", field]
    assert len(reasons) == 16


def test_a_quotation_mark_that_is_never_closed_costs_a_megabyte_of_rows(tmp_path: Path) -> None:
    pictures(tmp_path)
    filler = "0.png,good\n" * 300_000

    source = open_source(
        write_csv(tmp_path / "a.csv", f'path,caption\n1.png,"open\n{filler}'), 10**6
    )

    assert source.total is not None and 200_000 < source.total < 210_000
    first = next(iter(next(source.units(0))))
    assert "quotation mark is never closed" in getattr(first, "reason", "")


def test_of_a_bad_jsonl_the_bad_lines_are_set_aside(tmp_path: Path) -> None:
    pictures(tmp_path)
    lines = [
        b'{"file_name": "0.png", "caption": "good", "box": [1, {"a": null}]}',
        b'{"file_name": "1.png", "caption": ',
        b"[" * 100_000,
        b"[1]",
        b'{"file_name": "1.png", "caption": "' + b"x" * 10_000_000 + b'"}',
        b'{"file_name": "1.png", "caption": "' + b"x" * 20_000_000 + b'"}',
        b'{"file_name": "1.png", "caption": "gr\xfcn"}',
        b'{"file_name": "1.png", "caption": "\\ud800"}',
        b'{"file_name": "1.png", "caption": 5}',
        b'{"file_name": 5, "caption": "good"}',
        b'{"file_name": "\\ud800", "caption": "good"}',
        b'{"caption": "good"}',
        b"",
        b'{"file_name": "3.png", "caption": "good"}',
    ]

    source = open_source(write_csv(tmp_path / "a.jsonl", b"\n".join(lines)), 4)

    found, reasons = good(source), {int(o[-8:]): why for (o, _), why in refused(source).items()}
    assert list(found) == ["00000000", "00000012"]
    assert found["00000000"].extra == {"box": [1, {"a": None}]}
    for row, says in {
        1: "the line is not JSON",
        2: "nested too deeply",
        3: "no object but list",
        4: "the caption has 10,000,000 bytes",
        5: "the line has 16,777,217 bytes, more than",
        6: "not UTF-8",
        7: "surrogate",
        8: "not text but int",
        9: "neither a path nor bytes but int",
        10: "not the name of a file",
        11: "the cell is empty",
    }.items():
        assert says in reasons[row]


def test_text_that_is_not_utf8_spoils_its_own_row_alone(tmp_path: Path) -> None:
    pictures(tmp_path)
    texts = [b"good", b"gr\xfcn", b"x" * 10_000_000, b"", b"good"]
    paths = [b"0.png", b"1.png", b"2.png", b"3.png", b"\xff.png"]
    table = pa.table(
        {
            "path": pa.array(paths).view(pa.string()),
            "text": pa.array(texts).view(pa.string()).dictionary_encode(),
            "tags": [["a"]] * 5,
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    save_to_disk(tmp_path / "disk", table)
    pictures(tmp_path / "disk")

    for path in [tmp_path / "a.parquet", tmp_path / "disk"]:
        source = open_source(path, 3)
        assert list(good(source)) == ["00000000"]
        says = ["byte 0xfc at 2", "10,000,000 bytes", "the caption is empty", "is missing"]
        for reason, expected in zip(refused(source).values(), says, strict=True):
            assert expected in reason


def hub_rows(count: int) -> pa.Table:
    images = [{"bytes": picture(i), "path": None} for i in range(count)]
    texts = [f"picture {i} " + "of many " * i for i in range(count)]
    return pa.table({"image": images, "text": texts})


def test_a_parquet_or_arrow_file_cut_short_is_named_before_work_starts(tmp_path: Path) -> None:
    pq.write_table(hub_rows(20), tmp_path / "a.parquet")
    (disk,) = [save_to_disk(tmp_path / "disk", hub_rows(20))]
    files = [tmp_path / "a.parquet", disk / "data-00001-of-00002.arrow"]

    for file, source in zip(files, [files[0], disk], strict=True):
        whole = file.read_bytes()
        for length in [0, 3, 100, len(whole) // 2, len(whole) - 200]:
            file.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=rf"{file.name}: is not a whole .*copy it again"):
                open_source(source, 4)


def test_damage_inside_a_file_of_rows_costs_the_rows_it_touches(tmp_path: Path) -> None:
    table = hub_rows(12)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4, use_dictionary=False)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[8:40] = b"\xff" * 32  # where the first page of images begins
    (tmp_path / "a.parquet").write_bytes(data)
    file = save_to_disk(tmp_path / "disk", table) / "data-00000-of-00002.arrow"
    offsets = struct.pack("<3i", 0, 10, 28)  # of the first two texts
    stream = file.read_bytes()
    assert stream.count(offsets) == 1
    file.write_bytes(stream.replace(offsets, struct.pack("<3i", 0, 2**31 - 1, 28)))

    for path, lost in [(tmp_path / "a.parquet", 4), (tmp_path / "disk", 2)]:
        source = open_source(path, 4)
        reasons = refused(source)
        assert list(good(source)) == [f"{row:08d}" for row in range(lost, 12)]
        assert [int(origin[-8:]) for origin, _ in reasons] == list(range(lost))
        assert all("this part of the file is damaged" in reason for reason in reasons.values())


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"_data_files": [{"filename": "../a.arrow"}]}, "names no file of this folder"),
        ({"_data_files": [{"filename": "data.arrow"}]}, "no such file, but state.json lists it"),
        ({"_data_files": []}, "lists no files"),
        ({"_data_files": 5}, "lists no files"),
        ({"_data_files": [], "_indices_data_files": [1]}, "selection of rows"),
        ([], "no object but list"),
    ],
)
def test_a_state_that_makes_no_sense_is_refused(state: Any, says: str, tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "disk", hub_rows(4))
    (folder / "data-00000-of-00002.arrow").rename(tmp_path / "a.arrow")
    (folder / "state.json").write_text(json.dumps(state))

    with pytest.raises(ValueError, match=says):
        open_source(folder, 4)


def expanding_png() -> bytes:
    """A PNG of some kilobytes with a comment of 100 MB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    comment = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000)))
    return IMAGE[:33] + comment + IMAGE[33:]


def test_pictures_that_expand_are_set_aside_wherever_they_come_from(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "folder", 1)
    (folder / "bomb.png").write_bytes(bomb(100_000))
    (folder / "comment.png").write_bytes(expanding_png())
    for image in folder.glob("*.png"):
        image.with_suffix(".txt").write_text("good")
    names = sorted(image.name for image in folder.glob("*.png"))
    write_csv(folder / "a.csv", "\n".join(["path,caption", *(f"{name},good" for name in names)]))
    images = [{"bytes": (folder / name).read_bytes(), "path": name} for name in names]
    pq.write_table(pa.table({"image": images, "text": ["good"] * 3}), tmp_path / "a.parquet")

    for number, path in enumerate([folder, folder / "a.csv", tmp_path / "a.parquet"]):
        dest = tmp_path / f"out {number}"
        annotate(path, dest, rewards=["sharpness"])
        assert len(read_scores(dest).keys) == 1
        reasons = (dest / "rejected.jsonl").read_text().splitlines()
        assert "100000 x 100000 pixels" in reasons[0] or "more than 64,000,000" in reasons[0]
        assert len(reasons) == 2


def test_members_of_a_tar_that_are_no_plain_files_are_set_aside(tmp_path: Path) -> None:
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"{number}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ["../up", "/top", "in/../../up", "a/good"]:
            for extension, data in [("png", IMAGE), ("txt", b"good")]:
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    source = open_source(tmp_path / "a.tar", 100)

    assert list(good(source)) == ["a_good"]
    reasons = refused(source)
    assert [reasons[f"a.tar:{i}.png", "member"] for i in range(5)] == [
        "the member is a link, a device or a sparse file, not a plain file"
    ] * 5
    for name in ["../up.png", "/top.txt", "in/../../up.png"]:
        assert "leads outside" in reasons[f"a.tar:{name}", "member"]
    assert len(reasons) == 11


def test_a_member_too_large_for_memory_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miro.sources.webdataset.MAX_IMAGE_BYTES", 1000)
    samples = [
        ("a", {"png": IMAGE, "txt": b"x"}),
        ("b", {"png": IMAGE + bytes(999), "txt": b"x"}),
    ]

    source = open_source(write_tar(tmp_path / "a.tar", samples), 100)

    assert list(good(source)) == ["a"]
    assert "the .png is too large" in refused(source)["a.tar:b", "member"]
