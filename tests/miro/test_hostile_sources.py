"""Malformed and hostile tables and tars: rejected with a reason, without losing the rest."""

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
from helpers.corrupt import NOISE_PNG, bomb
from helpers.sources import png, rejected, save_to_disk, usable, write_csv, write_pngs, write_tar

from miro.data.shards import read_scores
from miro.prepare.annotate import annotate
from miro.sources.source import open_source


def test_bad_rows_of_a_csv_are_rejected(tmp_path: Path) -> None:
    write_pngs(tmp_path)
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
    assert list(usable(source)) == ["00000000", "00000009", "00000017"]
    assert usable(source)["00000009"].extra == {}  # a cell of invalid UTF-8 is dropped
    reasons = rejected(source)
    for row, field, message in [
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
        (14, "image", "not a regular file"),
        (15, "image", "too long"),
        (16, "image", "empty"),
        (18, "row", "ends inside quotation marks"),
    ]:
        assert message in reasons[f"a.csv:{row:08d}", field]
    assert len(reasons) == 16


def test_an_unclosed_quotation_mark_costs_a_megabyte_of_rows(tmp_path: Path) -> None:
    write_pngs(tmp_path)
    filler = "0.png,good\n" * 300_000

    source = open_source(
        write_csv(tmp_path / "a.csv", f'path,caption\n1.png,"open\n{filler}'), 10**6
    )

    assert source.total is not None and 200_000 < source.total < 210_000
    first = next(iter(next(source.partitions(0))))
    assert "quotation mark is never closed" in getattr(first, "reason", "")


def test_bad_lines_of_a_jsonl_are_rejected(tmp_path: Path) -> None:
    write_pngs(tmp_path)
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

    found, reasons = usable(source), {int(o[-8:]): why for (o, _), why in rejected(source).items()}
    assert list(found) == ["00000000", "00000012"]
    assert found["00000000"].extra == {"box": [1, {"a": None}]}
    for row, message in {
        1: "the line is not JSON",
        2: "nested too deeply",
        3: "must be a JSON object, got list",
        4: "the caption has 10,000,000 bytes",
        5: "the line has 16,777,217 bytes, more than",
        6: "not UTF-8",
        7: "surrogate",
        8: "must be text, got int",
        9: "must be a path or bytes, got int",
        10: "not the name of a file",
        11: "the cell is empty",
    }.items():
        assert message in reasons[row]


def test_invalid_utf8_rejects_its_own_row_only(tmp_path: Path) -> None:
    write_pngs(tmp_path)
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
    write_pngs(tmp_path / "disk")

    for path in [tmp_path / "a.parquet", tmp_path / "disk"]:
        source = open_source(path, 3)
        assert list(usable(source)) == ["00000000"]
        message = ["byte 0xfc at 2", "10,000,000 bytes", "the caption is empty", "is missing"]
        for reason, expected in zip(rejected(source).values(), message, strict=True):
            assert expected in reason


def hub_rows(count: int) -> pa.Table:
    images = [{"bytes": png(i), "path": None} for i in range(count)]
    texts = [f"image {i} " + "of many " * i for i in range(count)]
    return pa.table({"image": images, "text": texts})


def test_a_truncated_parquet_or_arrow_file_raises_when_opened(tmp_path: Path) -> None:
    pq.write_table(hub_rows(20), tmp_path / "a.parquet")
    (disk,) = [save_to_disk(tmp_path / "disk", hub_rows(20))]
    files = [tmp_path / "a.parquet", disk / "data-00001-of-00002.arrow"]

    for file, source in zip(files, [files[0], disk], strict=True):
        data = file.read_bytes()
        for length in [0, 3, 100, len(data) // 2, len(data) - 200]:
            file.write_bytes(data[:length])
            with pytest.raises(ValueError, match=rf"{file.name}: is not a complete .*copy it"):
                open_source(source, 4)


def test_damage_inside_a_table_rejects_the_affected_rows_only(tmp_path: Path) -> None:
    table = hub_rows(12)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4, use_dictionary=False)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[8:40] = b"\xff" * 32  # where the first page of images begins
    (tmp_path / "a.parquet").write_bytes(data)
    file = save_to_disk(tmp_path / "disk", table) / "data-00000-of-00002.arrow"
    offsets = struct.pack("<3i", 0, 8, 24)  # of the first two texts
    stream = file.read_bytes()
    assert stream.count(offsets) == 1
    file.write_bytes(stream.replace(offsets, struct.pack("<3i", 0, 2**31 - 1, 24)))

    for path, lost in [(tmp_path / "a.parquet", 4), (tmp_path / "disk", 2)]:
        source = open_source(path, 4)
        reasons = rejected(source)
        assert list(usable(source)) == [f"{row:08d}" for row in range(lost, 12)]
        assert [int(origin[-8:]) for origin, _ in reasons] == list(range(lost))
        assert all("this part of the file is damaged" in reason for reason in reasons.values())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_data_files": [{"filename": "../a.arrow"}]}, "names no file of this folder"),
        ({"_data_files": [{"filename": "data.arrow"}]}, "no such file, but state.json lists it"),
        ({"_data_files": []}, "lists no files"),
        ({"_data_files": 5}, "lists no files"),
        ({"_data_files": [], "_indices_data_files": [1]}, "selection of rows"),
        ([], "must be a JSON object, got list"),
    ],
)
def test_an_invalid_state_json_raises(state: Any, message: str, tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "disk", hub_rows(4))
    (folder / "data-00000-of-00002.arrow").rename(tmp_path / "a.arrow")
    (folder / "state.json").write_text(json.dumps(state))

    with pytest.raises(ValueError, match=message):
        open_source(folder, 4)


def expanding_png() -> bytes:
    """A PNG of some kilobytes with a comment of 100 MB."""

    def chunk(chunk_type: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data))
            + chunk_type
            + data
            + struct.pack(">I", zlib.crc32(chunk_type + data))
        )

    comment = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000)))
    return NOISE_PNG[:33] + comment + NOISE_PNG[33:]


def test_decompression_bombs_are_rejected_from_every_source(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "folder", 1)
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


def test_tar_members_that_are_not_regular_files_are_rejected(tmp_path: Path) -> None:
    flags = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, flag in enumerate(flags):
            info = tarfile.TarInfo(f"{number}.png")
            info.type, info.linkname = flag, "/etc/passwd"
            tar.addfile(info)
        for name in ["../up", "/top", "in/../../up", "a/good"]:
            for extension, data in [("png", NOISE_PNG), ("txt", b"good")]:
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    source = open_source(tmp_path / "a.tar", 100)

    assert list(usable(source)) == ["a_good"]
    reasons = rejected(source)
    assert [reasons[f"a.tar:{i}.png", "member"] for i in range(5)] == [
        "the member is a link, a device or a sparse file, not a regular file"
    ] * 5
    for name in ["../up.png", "/top.txt", "in/../../up.png"]:
        assert "leads outside" in reasons[f"a.tar:{name}", "member"]
    assert len(reasons) == 11


def test_a_tar_member_that_is_too_large_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miro.sources.webdataset.MAX_IMAGE_BYTES", 1000)
    samples = [
        ("a", {"png": NOISE_PNG, "txt": b"x"}),
        ("b", {"png": NOISE_PNG + bytes(999), "txt": b"x"}),
    ]

    source = open_source(write_tar(tmp_path / "a.tar", samples), 100)

    assert list(usable(source)) == ["a"]
    assert "the .png is too large" in rejected(source)["a.tar:b", "member"]
