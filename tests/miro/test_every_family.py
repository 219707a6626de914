"""A few hundred images through every command, with a model of every family."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.corrupt import encoded
from helpers.images import ODD_SAMPLES, photograph
from helpers.tiny_models import save_autoencoder, save_clip_flan_t5, save_llava
from helpers.toy_clips import (
    TOY,
    aesthetic_head,
    fixture,
    image_reward_state,
    open_clip_toy,
    transformers_toy,
)

from miro.cli.main import main
from miro.data.reader import EncodedDataset
from miro.data.shards import Manifest, read_scores
from miro.rewards import clip_family
from miro.utils.reward_names import REWARD_ORDER

SEVEN = REWARD_ORDER[:7]
COUNT = 240
SMALL = (
    "images=64 batch=16 precision=fp32 compile=False report_every=16 checkpoint_every=64 "
    "model.channels=32 model.depth=1 model.heads=2 model.hidden=32 model.patch=2"
)


def write_photographs(folder: Path) -> None:
    """Write images of several shapes and formats with captions; every 20th is an odd one."""
    folder.mkdir()
    odd_samples = list(ODD_SAMPLES.values())
    for number in range(COUNT):
        image = photograph(number).resize(((64, 48), (48, 64), (80, 40))[number % 3])
        extension, caption, data = "jpg", f"photo {number} of a thing".encode(), b""
        if number % 20 == 19:
            extension, make, caption, _ = odd_samples[number // 20 % len(odd_samples)]
            data = make(number)
        else:
            extension = ("jpg", "png", "webp")[number % 3]
            data = encoded(image, {"jpg": "JPEG"}.get(extension, extension.upper()))
        (folder / f"{number:04d}.{extension}").write_bytes(data)
        (folder / f"{number:04d}.txt").write_bytes(caption)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small random model for each of the seven. Do not write."""
    root = tmp_path_factory.mktemp("weights")
    clip = transformers_toy(root / "clip")
    hps = open_clip_toy(root / "hps")
    aesthetic_head(root)
    (root / "blip").mkdir()
    shapes = fixture("image_reward_scores.json")["small"]["shapes"]
    torch.save(image_reward_state(shapes), root / "blip" / "ImageReward.pt")
    (root / "flan").mkdir()
    return {
        "clip": f"open_clip:{TOY}/{hps}",
        "aesthetic": f"{root},{clip}",
        "image_reward": f"{root / 'blip'}",
        "pick_score": f"{clip}",
        "hpsv2": f"{hps}",
        "vqa": f"{save_clip_flan_t5(root / 'flan')}",
        "sci_score": f"{clip}",
    }


def test_images_go_through_every_command(
    weights: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_family, "HPS_ARCHITECTURE", TOY)
    write_photographs(tmp_path / "photos")
    llava, vae = save_llava(tmp_path / "llava"), tmp_path / "vae"
    save_autoencoder(vae)
    scored, captioned, latents, run = (
        tmp_path / name for name in ("scored", "captioned", "encoded", "run")
    )
    rewards = [f"{name}={weights[name]}" for name in SEVEN]

    def miro(*words: object) -> None:
        main([str(word) for word in words])

    miro("annotate", tmp_path / "photos", scored, "--samples-per-shard", 100)
    miro("caption", scored, captioned, "--model", llava, "--precision", "fp32",
         "--long-tokens", 6, "--short-tokens", 3)  # fmt: skip
    miro("annotate", captioned, captioned, "--rewards", *rewards, "--offload", "always")
    miro("inspect", captioned)
    miro("encode", captioned, latents, "--size", 32, "--latents", vae)
    miro("train", "demo", "--run", run, "--data", latents, *SMALL.split())
    miro("sample", run, "--prompt", "a thing", "--reward", "hpsv2=1", "aesthetic=0.6",
         "--steps", 2)  # fmt: skip

    bad = sum(reason is not None for _, _, _, reason in ODD_SAMPLES.values())
    manifest = Manifest.read(captioned)
    assert manifest.samples == COUNT - bad and manifest.rewards == SEVEN
    assert manifest.captions == ("original", "long", "short")
    table = read_scores(captioned)
    assert Counter(table.captions).keys() == {"original", "long", "short"}
    assert np.isfinite(table.values).all()
    assert (table.values.std(0) > 0).all(), "every reward varies over images"
    # Scores depend on the caption, except for the reward that does not read it.
    rows = {(k, c): v for k, c, v in zip(table.keys, table.captions, table.values, strict=True)}
    key = table.keys[0]
    same = rows[key, "original"] == rows[key, "long"]
    assert same.tolist() == [name == "aesthetic" for name in SEVEN]
    models = manifest.source["models"]
    assert list(models) == list(SEVEN) and str(tmp_path.parent) not in str(models)
    numbers = json.loads((captioned / "inspect.json").read_text())
    page = (captioned / "inspect.html").read_text()
    assert all(re.search(name.replace("_", " "), page, re.IGNORECASE) for name in SEVEN)
    assert numbers
    assert EncodedDataset(latents).rewards == SEVEN
    assert list((run / "samples").glob("*.png"))
