"""The page of `inspect`: contact sheets, text, and errors for damaged datasets."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.inspect_pages import make_dataset, page_of, png, shade, text_of
from PIL import Image

from miro.cli.main import main
from miro.data.shards import MODELS, Manifest, read_scores
from miro.inspect import contact_sheets
from miro.inspect.contact_sheets import CELL
from miro.inspect.inspect_dataset import InspectConfig, inspect, summarize_dataset
from miro.prepare.annotate import AnnotateConfig, annotate

NAN = float("nan")
HOSTILE = "<script>alert('$1$')</script>\"'"


def keys_of(record: dict[str, Any], reward: str, end: str) -> list[str]:
    (sheet,) = [s for s in record["sheets"] if (s["reward"], s["end"]) == (reward, end)]
    return [sample["key"] for sample in sheet["samples"]]


def sheets_of(html: str) -> dict[str, np.ndarray]:
    """The contact sheets of a page, as pixels, by title."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/jpeg;base64,([^"]*)">', html)
    return {
        title: np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for title, data in found
    }


def test_contact_sheets_show_the_best_and_worst_samples_in_order(tmp_path: Path) -> None:
    scores = [3, 9, 4, 1, 5, 2, 6, NAN, 8, 7]
    folder = make_dataset(tmp_path, {"clip": scores, "vqa": list(range(10))})

    html, record = page_of(folder, images=4)

    assert keys_of(record, "clip", "best") == ["key1", "key8", "key9", "key6"]
    assert keys_of(record, "clip", "worst") == ["key3", "key5", "key0", "key2"]
    sheets = sheets_of(html)
    assert list(sheets) == ["Clip, best", "Clip, worst", "Vqa, best", "Vqa, worst"]
    for title, numbers in (("Clip, best", [1, 8, 9, 6]), ("Clip, worst", [3, 5, 0, 2])):
        assert sheets[title].shape == (CELL, 4 * CELL, 3)
        centers = sheets[title][CELL // 2, CELL // 2 :: CELL, 0].astype(int)
        assert np.abs(centers - 20 * np.array(numbers)).max() <= 3
    assert 'title="9.00: image 1 (key1, original)"' in html


def test_a_sample_is_shown_once_with_its_most_extreme_caption(tmp_path: Path) -> None:
    captions = [{"original": f"short {i}", "long": f"long {i}"} for i in range(3)]

    _, record = page_of(make_dataset(tmp_path, {"clip": [1, 6, 5, 2, 4, 3]}, captions=captions))

    best, worst = record["sheets"]
    assert [(s["key"], s["caption"]) for s in best["samples"]] == [
        ("key0", "long 0"), ("key1", "short 1"), ("key2", "short 2")
    ]  # fmt: skip
    assert [(s["key"], s["caption"]) for s in worst["samples"]] == [
        ("key0", "short 0"), ("key1", "long 1"), ("key2", "long 2")
    ]  # fmt: skip


def test_a_sheet_is_full_if_several_pairs_of_a_sample_are_among_the_best(
    tmp_path: Path,
) -> None:
    captions = [{"original": f"short {i}", "long": f"long {i}"} for i in range(3)]
    folder = make_dataset(tmp_path, {"clip": [9, 8, 1, 7, 2, 3]}, captions=captions)

    _, record = page_of(folder, images=2)

    assert keys_of(record, "clip", "best") == ["key0", "key1"]


def test_an_image_that_cannot_be_decoded_is_left_out_and_named(tmp_path: Path) -> None:
    folder = make_dataset(
        tmp_path, {"clip": list(range(10))}, images={9: png(shade(9))[:60], 0: b"<html>"}
    )

    html, record = page_of(folder, images=3)

    assert keys_of(record, "clip", "best") == ["key8", "key7"]
    assert keys_of(record, "clip", "worst") == ["key1", "key2"]
    assert sheets_of(html)["Clip, best"].shape == (CELL, 2 * CELL, 3)
    assert "1 could not be decoded: key9: the image is" in text_of(html)
    assert "key0: this is an HTML page" in text_of(html)
    assert record["sample_stats"]["without_image"] == 1  # the header of the truncated one is valid


def test_a_sheet_of_damaged_images_only_names_them(tmp_path: Path) -> None:
    damaged = {i: b"no image" for i in range(10)}

    html, record = page_of(make_dataset(tmp_path, {"clip": list(range(10))}, images=damaged))

    assert sheets_of(html) == {}
    assert "10 could not be decoded" in text_of(html)
    assert record["sample_stats"]["without_image"] == 10


def test_text_of_the_dataset_is_escaped(tmp_path: Path) -> None:
    captions = [{"original": f"{HOSTILE} {i}"} for i in range(10)]
    folder = make_dataset(tmp_path, {HOSTILE: list(range(10))}, captions=captions)
    line = {"source": HOSTILE, "field": HOSTILE, "reason": HOSTILE}
    (folder / "rejected.jsonl").write_text(json.dumps(line) + "\n")
    manifest = Manifest.read(folder)
    replace(manifest, source={MODELS: {HOSTILE: HOSTILE}}).write(folder)

    html, _ = page_of(folder)

    assert "<script" not in html
    titles = re.findall(r'<li title="([^"]*)">', html)
    assert len(titles) == 20
    assert all("&lt;script&gt;" in title and "<" not in title for title in titles)
    assert html.count("&lt;script&gt;alert") > 25


def test_the_page_is_self_contained_and_deterministic(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path, {"clip": list(range(10)), "vqa": list(range(10, 0, -1))})

    html, _ = page_of(folder)

    assert page_of(folder)[0] == html
    urls = re.findall(r'(?:src|xlink:href)="([^"]*)"', html) + re.findall(r"url\(([^)]*)\)", html)
    assert urls and all(url.startswith(("data:", "#")) for url in urls)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_the_model_of_the_scores_is_named_if_the_manifest_records_it(
    tmp_path: Path,
) -> None:
    folder = make_dataset(tmp_path, {"clip": list(range(10)), "vqa": list(range(10))})
    source = {MODELS: {"clip": "ViT-B-32 laion2b"}}
    replace(Manifest.read(folder), source=source).write(folder)

    html, record = page_of(folder)

    assert text_of(html).count("Scored by") == 1 and "Scored by ViT-B-32 laion2b." in html
    assert [reward["model"] for reward in record["rewards"]] == ["ViT-B-32 laion2b", None]


def test_without_scores_the_page_explains_how_to_add_them(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path, {})
    for path in folder.glob("scores/*"):
        path.unlink()

    html, record = page_of(folder)

    assert "miro annotate DATA DATA --rewards" in text_of(html)
    assert "<svg" not in html and "no rejected.jsonl in the folder" in html
    assert (record["pairs"], record["rewards"], record["rejected"]) == (None, [], None)


def test_samples_that_annotate_rejected_are_counted(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / "in").mkdir(exist_ok=True)
        data = png(shade(i))
        (tmp_path / "in" / f"{i}.png").write_bytes(data[:50] if i < 3 else data)
        (tmp_path / "in" / f"{i}.txt").write_text(f"image {i}")
    config = AnnotateConfig(samples_per_shard=4)
    annotate(tmp_path / "in", tmp_path / "out", rewards=["colourfulness"], config=config)

    html, record = page_of(tmp_path / "out")

    assert record["rejected"]["lines"] == 3
    assert sum(count for *_, count in record["rejected"]["reasons"]) == 3
    assert "0.png" in text_of(html) and "Skipped 3 lines" in text_of(html)
    assert read_scores(tmp_path / "out").keys == ["3", "4", "5", "6", "7"]


def test_latents_that_are_pixels_are_shown_as_images(encoded: Path, tmp_path: Path) -> None:
    page = inspect(encoded, tmp_path / "page.html", config=InspectConfig(images=6))
    source = inspect(encoded.parent / "scored", tmp_path / "source.html")

    record, original = (
        json.loads(path.with_suffix(".json").read_text()) for path in (page, source)
    )
    assert record["encoding"]["latents"] == "pixels" and record["kind"] == "encoded"
    assert "minilm" in text_of(page.read_text())
    for reward in ("colourfulness", "sharpness"):
        assert keys_of(record, reward, "best") == keys_of(original, reward, "best")[:6]
    encoded_sheets, original_sheets = (sheets_of(p.read_text()) for p in (page, source))
    for title, sheet in encoded_sheets.items():
        difference = sheet.astype(int) - original_sheets[title][:CELL, : 6 * CELL]
        assert np.abs(difference).mean() < 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "page.html", "page.json", "source.html", "source.json"
    ]  # fmt: skip


def test_latents_of_an_autoencoder_are_not_shown(encoded: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").symlink_to(encoded / "shards")
    (tmp_path / "scores").symlink_to(encoded / "scores")
    manifest = Manifest.read(encoded)
    assert manifest.encoding is not None
    other = {**manifest.encoding, "latents": "stabilityai/sdxl-vae"}
    replace(manifest, encoding=other).write(tmp_path)

    html, record = page_of(tmp_path, images=5)

    assert "holds latents of stabilityai/sdxl-vae, not images" in text_of(html)
    assert sheets_of(html) == {}
    (best, *_) = record["sheets"]
    assert len(best["samples"]) == 5 and best["skipped"] == []
    assert all(sample["caption"] in text_of(html) for sample in best["samples"])


def test_invalid_folders_and_file_names_are_errors(tmp_path: Path) -> None:
    Manifest("images", (), ()).write(tmp_path / "empty")
    folder = make_dataset(tmp_path / "data", {"clip": list(range(10))})

    with pytest.raises(ValueError, match="not a dataset folder; `miro annotate` makes one"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no samples yet; let `miro annotate` complete"):
        inspect(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"page\.json: the page's name must end in \.html"):
        inspect(folder, tmp_path / "page.json")
    with pytest.raises(ValueError, match="bins must be at least 2, got 1"):
        InspectConfig(bins=1)
    assert list(tmp_path.rglob("*.html")) == []


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path, {"clip": list(range(10))})
    score_file, tar = folder / "scores" / "00001.parquet", folder / "shards" / "00001.tar"
    data = score_file.read_bytes()

    score_file.write_bytes(b"PAR1 or so")
    with pytest.raises(ValueError, match=r"00001\.parquet: not a score file"):
        inspect(folder)
    score_file.unlink()
    with pytest.raises(ValueError, match=r"00001\.parquet: no such file; run `miro annotate"):
        inspect(folder)
    score_file.write_bytes(data)
    tar.unlink()
    with pytest.raises(ValueError, match=r"00001\.tar: no such file, but the manifest lists it"):
        inspect(folder)


def test_only_the_shards_of_the_samples_shown_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_dataset(tmp_path, {"clip": [0, 1, 5, 5, 5, 5, 5, 5, 8, 9]}, shards=5)
    opened: list[str] = []

    class RecordingIndex(contact_sheets.ShardIndex):
        def __init__(self, folder: Path, manifest: Manifest):
            opened.extend(shard.name for shard in manifest.shards)
            super().__init__(folder, manifest)

    monkeypatch.setattr(contact_sheets, "ShardIndex", RecordingIndex)
    summarize_dataset(folder, InspectConfig(images=2), lambda done, total: None)

    assert opened == ["00000.tar", "00004.tar"]


def test_the_command_writes_the_page_and_prints_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_dataset(tmp_path / "data", {"clip": list(range(10))})

    main(["inspect", str(folder), "--images", "2", "--out", str(tmp_path / "p.html")])

    assert "<h1>data</h1>" in (tmp_path / "p.html").read_text()
    assert "p.json" in "".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(tmp_path / "nowhere")])
    assert stop.value.code == 1
    assert "not a dataset folder" in " ".join(capsys.readouterr().err.split())
