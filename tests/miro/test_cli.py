"""The command line: every stage on a user's own folder, and its error messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from miro.cli.main import COMMANDS, main
from miro.sampling.command import sample_images

TINY = [
    "model.channels=32", "model.depth=1", "model.heads=1", "model.hidden=32", "images=128",
    "batch=32", "report_every=64", "checkpoint_every=64", "optimizer.warmup_images=32",
    "compile=False",
]  # fmt: skip


def run(*words: object) -> None:
    main([str(word) for word in words])


def run_failing(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Run a command that must fail; return its exit status and output."""
    with pytest.raises(SystemExit) as exit_:
        run(*words)
    assert exit_.value.code, "the command did not fail"
    printed = capsys.readouterr()
    return int(exit_.value.code), " ".join((printed.out + printed.err).split())


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder of captioned images after all stages, with a trained run."""
    folder = tmp_path_factory.mktemp("user")
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for number in range(40):
        pixels = rng.integers(0, 256, (40 + number, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.jpg")
        (folder / "photos" / f"{number}.txt").write_text(f"photo number {number}")
    (folder / "photos" / "broken.jpg").write_bytes(b"<html>")
    (folder / "photos" / "broken.txt").write_text("not an image")
    run("annotate", folder / "photos", folder / "scored", "--rewards", "colourfulness", "sharpness")
    run("encode", folder / "scored", folder / "encoded", "--size", 32)
    run("train", "demo", "--run", folder / "run", "--data", folder / "encoded", *TINY)
    return folder


def test_a_folder_of_photos_passes_all_stages(user_folder: Path):
    assert (user_folder / "run" / "weights" / "000000000128" / "manifest.json").exists()
    rejected = (user_folder / "scored" / "rejected.jsonl").read_text().splitlines()
    assert len(rejected) == 1 and "broken" in rejected[0]


def test_sampling_writes_images_and_the_best_of_several(user_folder: Path, tmp_path: Path):
    targets = ["--reward", "colourfulness=0.6", "--negative", "sharpness=0.2", "--reward-scale", 1]
    options = ["--steps", 2, "--count", 2, "--best-of", 2, "--best-by", "sharpness"]
    prompts = ["photo number 3", "photo number 5"]
    run("sample", user_folder / "run", "--prompt", *prompts, *targets, *options, "--out", tmp_path)
    images = sorted(tmp_path.glob("*.png"))
    assert len(images) == 4
    assert Image.open(images[0]).size == (32, 32)
    record = json.loads(images[0].with_suffix(".json").read_text())
    assert record["prompt"] == "photo number 3"


def test_the_record_in_an_image_samples_it_again_and_nothing_is_overwritten(
    user_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = user_folder / "run"
    targets = ["--reward", "colourfulness=0.6", "--negative", "sharpness=0.2", "--reward-scale", 1]
    options = ["--prompt", "photo number 3", "--steps", 3, "--out", tmp_path, "--seed", 5]
    run("sample", model, *targets, *options, "--count", 2)
    first = [tmp_path / "0000.png", tmp_path / "0001.png"]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in first]
    before = [path.read_bytes() for path in first]

    record = json.loads(Image.open(first[1]).info["miro"])  # type: ignore[attr-defined]
    assert record == json.loads(first[1].with_suffix(".json").read_text())
    (again,) = sample_images(
        model,
        [record["prompt"]],
        out=tmp_path,
        **{
            key: record[key]
            for key in (
                "seed", "noise", "positive", "negative", "reward_scale", "text_scale", "steps",
            )
        },
    )  # fmt: skip

    assert again.name == "0002.png" and [path.read_bytes() for path in first] == before
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(first[1])))


def test_evaluate_and_report_read_the_run(user_folder: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("photo number 1\n\nphoto number 2\n")
    run(
        "evaluate",
        user_folder / "run",
        "--prompts",
        prompts,
        "--rewards",
        "sharpness",
        "--steps",
        2,
    )
    record = json.loads((user_folder / "run" / "evaluation.json").read_text())
    assert record["prompts"] == 2 and np.isfinite(record["mean_scores"]["sharpness"])
    run("report", user_folder / "run")
    assert "sharpness" in (user_folder / "run" / "report.html").read_text()


def test_a_finished_run_is_not_trained_again(user_folder: Path):
    log = (user_folder / "run" / "metrics.jsonl").read_text()
    run("train", "demo", "--run", user_folder / "run", "--data", user_folder / "encoded", *TINY)
    assert (user_folder / "run" / "metrics.jsonl").read_text() == log


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "dmeo", "--run", "x"], "did you mean 'demo'"),
        (["train", "demo", "--run", "x", "--data", "nowhere"], "manifest.json"),
        (["train", "demo", "--run", "x", "--data", "x", "imagess=5"], "--images"),
        (["train", "demo", "--run", "x", "--data", "x", "images=100"], "multiple of batch=64"),
        (["annotate", "nowhere", "x"], "nowhere: no such file or folder"),
        (["annotate", ".", "x", "--rewards", "sharpnes"], "did you mean 'sharpness'"),
        (["encode", "nowhere", "x"], "`miro annotate` makes one of images"),
        (["sample", "nowhere", "--prompt", "a frog"], "neither a weights folder nor a run"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_an_error_is_one_message_with_a_remedy(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    _, printed = run_failing(capsys, *words)
    assert message in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reward", "sharpnes=1"], "did you mean 'sharpness'"),
        (["--reward", "sharpness=1.5"], "from 0 (worst of the data) to 1 (best), got 1.5"),
        (["--reward", "sharpness"], "must be NAME=LEVEL"),
        (["--best-of", "3"], "--best-by NAME"),
        (["--steps", "0"], "at least 1 step"),
    ],
)
def test_invalid_sampling_options_are_refused(
    user_folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    _, printed = run_failing(capsys, "sample", user_folder / "run", "--prompt", "a frog", *options)
    assert message in printed


def test_an_empty_prompt_is_refused(user_folder: Path, capsys: pytest.CaptureFixture[str]):
    _, printed = run_failing(capsys, "sample", user_folder / "run", "--prompt", " ")
    assert "a prompt is empty" in printed


def test_another_configuration_in_the_folder_of_a_run_is_refused(
    user_folder: Path, capsys: pytest.CaptureFixture[str]
):
    words = [
        "train",
        "demo",
        "--run",
        user_folder / "run",
        "--data",
        user_folder / "encoded",
        *TINY,
        "seed=5",
    ]
    _, printed = run_failing(capsys, *words)
    assert "seed: 5 here, 0 there" in printed


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr()
    assert all(name in printed.out + printed.err for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_summary_of_a_command_is_the_first_line_of_its_docstring(name: str):
    docstring = COMMANDS[name].load().__doc__ or ""

    assert docstring.splitlines()[0] == COMMANDS[name].summary


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys\n"
        "from miro.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'tyro', 'rich'} & sys.modules.keys()))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "[]"


def test_without_a_command_the_usage_is_shown_and_the_status_is_2(
    capsys: pytest.CaptureFixture[str],
):
    status, printed = run_failing(capsys)
    assert status == 2 and "usage: miro" in printed
