"""`caption`: new captions from a model or a table, and resume after an interruption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.corrupt import NOISE_PNG, encoded
from helpers.image_folders import file_contents, rejected_lines
from helpers.tiny_models import save_llava
from PIL import Image

from miro.cli.main import main
from miro.data.reader import EncodedDataset
from miro.data.shards import Manifest, read_scores, shard_path, verify, write_shard
from miro.prepare.annotate import AnnotateConfig, annotate
from miro.prepare.caption import CaptionConfig, caption
from miro.prepare.encode import EncodeConfig, encode
from miro.sources.tar import iterate_shard

KEYS = [f"{i:02d}" for i in range(7)]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven samples in three shards, scored. Do not write."""
    folder = tmp_path_factory.mktemp("source")
    photos = folder / "photos"
    photos.mkdir()
    for number, key in enumerate(KEYS):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{key}.png")
        (photos / f"{key}.txt").write_text(f"photo {number} of <PERSON>")
    config = AnnotateConfig(samples_per_shard=3, workers=1)
    annotate(photos, folder / "scored", rewards=["sharpness"], config=config)
    return folder / "scored"


def small(model: str, **changes: Any) -> CaptionConfig:
    settings = {"long_tokens": 8, "short_tokens": 4, "batch_size": 2, "workers": 1}
    return CaptionConfig(model, **{**settings, "precision": "fp32", **changes})


def captions_of(folder: Path) -> dict[str, dict[str, str]]:
    return {
        key: json.loads(members["json"])["captions"]
        for shard in Manifest.read(folder).shards
        for key, members in iterate_shard(shard_path(folder, shard))
    }


def rejected_of(folder: Path) -> list[tuple[str, str, str]]:
    return [(line["source"], line["field"], line["reason"]) for line in rejected_lines(folder)]


def write_table(path: Path, rows: Sequence[tuple[str, str, str | None]]) -> Path:
    columns = dict(zip(("key", "kind", "caption"), zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
    return path


def test_a_model_writes_a_long_and_a_short_caption_for_every_image(
    source: Path, llava: str, tmp_path: Path
) -> None:
    reports: list[tuple[int, int | None]] = []

    summary = caption(
        source,
        tmp_path / "out",
        config=small(llava),
        progress=lambda done, total: reports.append((done, total)),
    )

    verify(tmp_path / "out")
    before, after = Manifest.read(source), Manifest.read(tmp_path / "out")
    assert after.captions == ("original", "long", "short")
    assert after.rewards == () and not (tmp_path / "out" / "scores").exists()
    assert [s.name for s in after.shards] == [s.name for s in before.shards]
    assert (summary.samples, summary.captioned, summary.rejected) == (7, 7, 0)
    assert reports[-1] == (7, 7) and reports == sorted(reports)
    captions = captions_of(tmp_path / "out")
    assert list(captions) == KEYS
    for number, (key, found) in enumerate(captions.items()):
        assert list(found) == ["original", "long", "short"]
        assert found["original"] == f"photo {number} of"
        assert found["long"] and found["short"], key
    assert len({found["long"] for found in captions.values()}) > 1
    for shard in before.shards:
        pairs = zip(
            iterate_shard(shard_path(source, shard)),
            iterate_shard(shard_path(tmp_path / "out", shard)),
            strict=True,
        )
        assert all(old[1]["png"] == new[1]["png"] for old, new in pairs)


def test_only_the_prompt_of_a_long_caption_has_the_alt_text(
    source: Path, llava: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from miro.rewards.vlm import VisionLanguage

    prompts: list[str] = []

    def answer(self: Any, images: Any, questions: list[str], *rest: Any) -> list[str]:
        prompts.extend(questions)
        return ["two\n words "] * len(questions)

    monkeypatch.setattr(VisionLanguage, "answer", answer)

    caption(source, tmp_path / "out", config=small(llava, batch_size=7))

    with_alt = [prompt for prompt in prompts if 'says of it "photo 0 of"' in prompt]
    assert len(prompts) == 14 and len(with_alt) == 1 and "paragraph" in with_alt[0]
    assert not any("<PERSON>" in prompt or "{alt}" in prompt for prompt in prompts)
    assert captions_of(tmp_path / "out")["03"]["short"] == "two words"


def test_sampled_captions_do_not_depend_on_the_batch_size(
    source: Path, llava: str, tmp_path: Path
) -> None:
    runs = {
        (name, seed): caption_once(source, tmp_path / f"{name}-{seed}", llava, size, seed)
        for name, size, seed in [("a", 1, 0), ("b", 3, 0), ("a", 1, 1)]
    }

    assert runs["a", 0] == runs["b", 0]
    assert runs["a", 0] != runs["a", 1]


def caption_once(source: Path, dest: Path, model: str, batch_size: int, seed: int) -> Any:
    config = small(model, temperature=0.7, batch_size=batch_size, seed=seed, types=("long",))
    caption(source, dest, config=config)
    return captions_of(dest)


def test_an_interrupted_run_resumes_to_the_same_bytes(
    source: Path, llava: str, tmp_path: Path
) -> None:
    caption(source, tmp_path / "whole", config=small(llava))

    def stop(done: int, total: int | None) -> None:
        if done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caption(source, tmp_path / "stopped", config=small(llava), progress=stop)
    assert [s.samples for s in Manifest.read(tmp_path / "stopped").shards] == [3]

    summary = caption(source, tmp_path / "stopped", config=small(llava))

    assert (summary.samples, summary.captioned) == (7, 4)
    assert file_contents(tmp_path / "stopped") == file_contents(tmp_path / "whole")


def test_a_completed_folder_does_not_load_the_model(
    source: Path, llava: str, tmp_path: Path
) -> None:
    caption(source, tmp_path / "out", config=small(llava, types=("short",)))
    before = file_contents(tmp_path / "out")
    moved = Path(llava).rename(tmp_path / "elsewhere")

    try:
        summary = caption(source, tmp_path / "out", config=small(llava, types=("short",)))
    finally:
        moved.rename(llava)

    assert (summary.samples, summary.captioned) == (7, 0)
    assert file_contents(tmp_path / "out") == before


def test_an_empty_caption_is_rejected_without_its_sample(
    source: Path, llava: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from miro.rewards.vlm import VisionLanguage

    def answer(self: Any, images: Any, questions: list[str], *rest: Any) -> list[str]:
        return ["" if "photo 4" in question else "said" for question in questions]

    monkeypatch.setattr(VisionLanguage, "answer", answer)

    summary = caption(source, tmp_path / "out", config=small(llava))

    assert summary.samples == 7
    captions = captions_of(tmp_path / "out")
    assert captions.pop("04") == {"original": "photo 4 of", "short": "said"}
    assert all(set(found) == {"original", "long", "short"} for found in captions.values())
    ((where, field, reason),) = rejected_of(tmp_path / "out")
    assert (where, field) == ("00001.tar:04", "captions.long") and "nothing" in reason


def test_pictures_that_rotted_and_originals_that_were_only_a_name(
    llava: str, tmp_path: Path
) -> None:
    def sample(image: bytes, text: str, **more: Any) -> dict[str, bytes]:
        return {"png": image, "json": json.dumps({"captions": {"original": text}, **more}).encode()}

    rgb = encoded(Image.new("RGB", (20, 20), "red"))
    samples = [
        ("a", sample(NOISE_PNG[:60], "a caption")),
        ("b", sample(rgb, " <PERSON> and a dog", width=3)),
        ("c", sample(NOISE_PNG[:60], "<person>")),
    ]
    shard = write_shard(tmp_path / "in" / "shards" / "00000.tar", samples)
    Manifest("images", ("original",), (shard,)).write(tmp_path / "in")

    summary = caption(tmp_path / "in", tmp_path / "out", config=small(llava, types=("short",)))

    captions = captions_of(tmp_path / "out")
    assert summary.samples == 2 and captions["a"] == {"original": "a caption"}
    assert list(captions["b"]) == ["original", "short"]
    assert captions["b"]["original"] == "and a dog"
    made = dict(iterate_shard(tmp_path / "out" / "shards" / "00000.tar"))
    assert json.loads(made["b"]["json"])["width"] == 3
    fields = [(where[-1], field) for where, field, _ in rejected_of(tmp_path / "out")]
    assert ("a", "image") in fields and ("c", "caption") in fields


@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv", "jsonl"])
def test_captions_are_taken_from_a_table(source: Path, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"captions.{ending}"
    text = 'a "quoted", long one\nof two lines'
    rows = [(key, name, f"{text} {key}") for key in KEYS for name in ("short", "dense-2")]
    if ending == "parquet":
        write_table(path, rows)
    elif ending == "jsonl":
        lines = [
            json.dumps(dict(zip(("key", "kind", "caption"), row, strict=True))) for row in rows
        ]
        path.write_text("\n".join(lines))
    else:
        mark = "," if ending == "csv" else "\t"
        quoted = [
            (key, name, '"' + caption.replace('"', '""') + '"') for key, name, caption in rows
        ]
        path.write_text("\n".join(mark.join(r) for r in [("key", "kind", "caption"), *quoted]))

    summary = caption(source, tmp_path / "out", config=CaptionConfig(table=path))

    assert (summary.samples, summary.rejected) == (7, 0)
    assert Manifest.read(tmp_path / "out").captions == ("original", "short", "dense-2")
    assert captions_of(tmp_path / "out")["02"] == {
        "original": "photo 2 of",
        "short": f"{text} 02",
        "dense-2": f"{text} 02",
    }


def test_captions_missing_in_a_table_are_rejected(source: Path, tmp_path: Path) -> None:
    rows: list[tuple[str, str, str | None]] = [(key, "long", "said") for key in KEYS[:-1]]
    rows[2] = (KEYS[2], "long", None)
    rows[3] = (KEYS[3], "long", "  ")
    table = write_table(tmp_path / "captions.parquet", rows)

    summary = caption(source, tmp_path / "out", config=CaptionConfig(table=table))

    assert (summary.samples, summary.rejected) == (7, 3)
    lines = rejected_of(tmp_path / "out")
    assert [where.split(":")[1] for where, _, _ in lines] == ["02", "03", "06"]
    assert {field for _, field, _ in lines} == {"captions.long"}
    assert lines[0][2] == lines[2][2] == "the table has none"
    assert "long" not in captions_of(tmp_path / "out")["06"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("00", "long", "a"), ("99", "long", "b")], "1 of its 2 rows.*'99'"),
        ([("00", "long", "a"), ("00", "long", "b")], "rows 1 and 2.*'00'.*'long'"),
        ([("00", "a/b", "a")], "'a/b' is not a caption type"),
        ([("00", "original", "a")], "type 'original' already"),
    ],
)
def test_a_table_that_does_not_match_is_an_error_before_any_work(
    source: Path, tmp_path: Path, rows: list[Any], message: str
) -> None:
    table = write_table(tmp_path / "captions.parquet", rows)

    with pytest.raises(ValueError, match=message):
        caption(source, tmp_path / "out", config=CaptionConfig(table=table))

    assert not (tmp_path / "out").exists()


def test_a_table_that_cannot_be_read_is_named(source: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["00"], "text": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    (tmp_path / "c.xlsx").write_bytes(b"")
    for name, message in [
        ("a.parquet", "no column 'kind'"),
        ("b.parquet", "cannot be read as parquet"),
        ("c.xlsx", "ends in .parquet"),
        ("d.csv", "no such file"),
    ]:
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            caption(source, tmp_path / "out", config=CaptionConfig(table=tmp_path / name))


def test_a_folder_of_other_settings_is_unchanged(source: Path, tmp_path: Path) -> None:
    rows = [(key, "long", "said") for key in KEYS]
    table = write_table(tmp_path / "captions.parquet", rows)
    dest = tmp_path / "out"
    caption(source, dest, config=CaptionConfig(table=table))
    before = file_contents(dest)

    write_table(table, [(key, "long", "changed") for key in KEYS])
    with pytest.raises(ValueError, match="captioned with other settings"):
        caption(source, dest, config=CaptionConfig(table=table))
    with pytest.raises(ValueError, match="was not made by `miro caption`"):
        caption(dest, source, config=CaptionConfig(table=write_table(table, [("00", "x", "y")])))
    with pytest.raises(ValueError, match="must not be SOURCE"):
        caption(source, source, config=CaptionConfig(table=table))
    with pytest.raises(ValueError, match="has captions of type 'long' already"):
        caption(dest, tmp_path / "new", config=CaptionConfig(table=write_table(table, rows)))

    assert file_contents(dest) == before


def test_each_caption_is_scored_and_encoded_by_itself(
    source: Path, llava: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = tmp_path / "captioned"
    words = ["--long-tokens", "8", "--short-tokens", "4", "--workers", "1", "--batch-size", "3"]
    main(["caption", str(source), str(dest), "--model", llava, *words])
    assert "7 samples" in " ".join(capsys.readouterr().err.split())

    annotate(dest, dest, rewards=[f"vqa={llava}", "sharpness"], config=AnnotateConfig(workers=1))
    encode(dest, tmp_path / "encoded", config=EncodeConfig(size=16, workers=1))

    table = read_scores(dest)
    assert table.rewards == ("vqa", "sharpness")
    assert table.captions == ["original", "long", "short"] * 7
    assert np.isfinite(table.values).all()
    vqa, sharpness = table.values.reshape(7, 3, 2).transpose(2, 0, 1)
    assert all(len(set(row)) == 3 for row in vqa.tolist())
    assert all(len(set(row)) == 1 for row in sharpness.tolist())
    dataset = EncodedDataset(tmp_path / "encoded")
    assert dataset.caption_types == ("original", "long", "short")
    np.testing.assert_array_equal(dataset.scores[..., 0], vqa)
    lengths = [len(dataset.text(0, number)) for number in range(3)]
    assert min(lengths) > 0
