"""The rewards that are two towers: what they score, with what, and what they refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch
from helpers.toy_clips import (
    TOY,
    aesthetic_head,
    as_pil,
    clip_tokenizer,
    coded_toy,
    fixture,
    open_clip_toy,
    pictures,
    rule,
    transformers_toy,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from miro.images.transforms import CLIP_MEAN, CLIP_STD, ImageTransform
from miro.rewards import clip_family
from miro.rewards.base import RewardOptions
from miro.rewards.network import DualEncoderReward
from miro.rewards.registry import build_reward

SIZES = ((32, 32), (48, 80), (101, 33), (32, 35), (225, 452))
CAPTIONS = ["a red frog", "two cats left of a dog", "", "a very long caption " * 20, "a photo"]
WHERE_BYTES_ARE_RESIZED = 3e-3
"""Of a toy's score, where one side resizes floats, or PIL images: a grey level in a few pixels."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toys of every kind. Do not write."""
    root = tmp_path_factory.mktemp("clips")
    open_clip_toy(root / "hps")
    transformers_toy(root / "pick")
    coded_toy(root / "coded")
    aesthetic_head(root)
    return root


@pytest.fixture
def hpsv2(folder: Path, monkeypatch: pytest.MonkeyPatch) -> DualEncoderReward:
    return toy_hpsv2(folder / "hps", monkeypatch)


def toy_hpsv2(weights: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    monkeypatch.setattr(clip_family, "HPS_ARCHITECTURE", TOY)
    return build_reward(f"hpsv2={weights}", options=RewardOptions(**options))


def cosines(image: Tensor, text: Tensor) -> Tensor:
    return F.cosine_similarity(image, text, dim=-1)


def expanded(shapes: dict[str, list[int]], layers: dict[str, int]) -> dict[str, list[int]]:
    """Every name of a published file, where a * stands for the numbers of a tower's layers."""
    full: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        count = next((n for tower, n in layers.items() if name.startswith(tower)), 1)
        full |= {name.replace("*", str(i)): shape for i in range(count if "*" in name else 1)}
    return full


def test_hpsv2_scores_as_its_package(hpsv2: DualEncoderReward) -> None:
    record = fixture("hpsv2_scores.json")
    expected = torch.tensor(record["scores"])

    found = torch.stack(
        [
            hpsv2.score([image] * len(record["prompts"]), record["prompts"])
            for image in pictures(*record["sizes"])
        ]
    )

    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)
    assert (found - expected).abs().max() < WHERE_BYTES_ARE_RESIZED
    assert expected.std() > 20 * WHERE_BYTES_ARE_RESIZED


def test_pick_score_scores_as_on_the_transformers_it_was_published_for(folder: Path) -> None:
    record = fixture("pick_scores.json")
    expected = torch.tensor(record["scores"])
    reward = build_reward(f"pick_score={folder / 'pick'}")

    found = torch.stack(
        [
            reward.score([image] * len(record["prompts"]), record["prompts"])
            for image in pictures(*record["sizes"])
        ]
    )

    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-8)
    scale = float(rule.weight("logit_scale", ()).exp()) / 100
    assert (found - expected).abs().max() < scale * WHERE_BYTES_ARE_RESIZED


def test_hpsv2_s_published_file_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    record = fixture("hpsv2_scores.json")["published"]
    shapes = expanded(record["shapes"], {"visual": 32, "transformer": 24})

    with torch.device("meta"):
        network = open_clip.create_model("ViT-H-14", pretrained=None, device="meta")

    assert len(shapes) == record["tensors"]
    assert {name: list(t.shape) for name, t in network.state_dict().items()} == shapes


def test_pick_score_s_published_file_fits() -> None:
    record = fixture("pick_scores.json")["published"]
    shapes = expanded(record["shapes"], {"vision": 32, "text": 24})

    with torch.device("meta"):
        network = CLIPModel(CLIPConfig(**record["config"]))

    assert len(shapes) == record["tensors"]
    assert {name: list(t.shape) for name, t in network.state_dict().items()} == shapes


def test_pick_score_is_transformers_own_logits(folder: Path) -> None:
    network = CLIPModel.from_pretrained(folder / "pick").eval()
    words = CLIPTokenizer.from_pretrained(folder / "pick")
    process = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images = pictures(*SIZES)
    with torch.inference_mode():
        given = words(CAPTIONS, padding=True, truncation=True, max_length=77, return_tensors="pt")
        pixels = process(images=[as_pil(image) for image in images], return_tensors="pt")
        expected = network(**given, **pixels).logits_per_image.diagonal() / 100

    reward = build_reward(f"sci_score={folder / 'pick'}")

    assert reward.name == "sci_score" and reward.reads_caption
    # Both resize bytes with torch, so nothing differs.
    torch.testing.assert_close(reward.score(images, CAPTIONS), expected, rtol=1e-4, atol=1e-8)


def test_a_clip_of_open_clip_is_its_own_logits(folder: Path) -> None:
    file = folder / "hps" / "HPS_v2.1_compressed.pt"
    network, _, process = open_clip.create_model_and_transforms(TOY, pretrained=str(file))
    images = pictures(*SIZES)
    with torch.inference_mode():
        pixels = torch.stack([process(as_pil(image)) for image in images])
        text = network.encode_text(open_clip.get_tokenizer(TOY)(CAPTIONS))
        scale = network.logit_scale.exp() / 100
        expected = scale * cosines(network.eval().encode_image(pixels), text)
        squares = torch.stack([ImageTransform(32).of(image) for image in images])
        pixels = torch.stack([process(as_pil(square)) for square in squares])
        exactly = scale * cosines(network.encode_image(pixels), text)

    reward = build_reward(f"clip=open_clip:{TOY}/{file}")
    found = reward.score(images, CAPTIONS)

    torch.testing.assert_close(found, exactly, rtol=1e-4, atol=1e-8)
    assert (found - expected).abs().max() < scale * WHERE_BYTES_ARE_RESIZED
    assert TOY in reward.model and file.name in reward.model


def test_a_clip_that_open_clip_wrote_into_a_folder(folder: Path, tmp_path: Path) -> None:
    file = folder / "hps" / "HPS_v2.1_compressed.pt"
    state = torch.load(file, weights_only=True)["state_dict"]
    save_file(state, tmp_path / "open_clip_model.safetensors")
    config = {
        "model_cfg": fixture("hpsv2_scores.json")["config"],
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    images = pictures((32, 32))
    reward = build_reward(f"clip={tmp_path}")

    found = reward.score(images, CAPTIONS[:1])

    network = open_clip.create_model(TOY, pretrained=str(file)).eval()
    with torch.inference_mode():
        image = network.encode_image(images[0][None].float() / 127.5 - 1)
        text = network.encode_text(open_clip.tokenize(CAPTIONS[:1]))
        expected = network.logit_scale.exp() / 100 * cosines(image, text)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
    assert getattr(reward, "view").fit == "stretch"  # noqa: B009


def test_the_aesthetic_score_is_the_published_head_s(folder: Path, tmp_path: Path) -> None:
    path, head = aesthetic_head(tmp_path)
    network = CLIPModel.from_pretrained(folder / "pick").eval()
    images = pictures((32, 32), (40, 32))
    squares = torch.stack([ImageTransform(32, crop_rounding="down").of(image) for image in images])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    with torch.inference_mode():
        pixels = (squares / 255 - mean) / std
        embedded = network.get_image_features(pixel_values=pixels).pooler_output
        expected = head(F.normalize(embedded, dim=-1))[:, 0]

    reward = build_reward(f"aesthetic={path},{folder / 'pick'}")

    assert not reward.reads_caption and reward.range == (1.0, 10.0)
    torch.testing.assert_close(reward.score(images, ["", "a"]), expected, rtol=1e-4, atol=1e-5)
    assert reward.score([], []).shape == (0,)


def test_a_head_and_its_clip_may_lie_in_one_folder(tmp_path: Path) -> None:
    both = transformers_toy(tmp_path / "both", tokenizer=False)
    aesthetic_head(both)

    reward = build_reward(f"aesthetic={both}")

    assert "CLIPModel both" in reward.model and "linearMSE" in reward.model
    # The tower for captions was left away.
    assert "text_model" not in dict(getattr(reward, "network").named_children())  # noqa: B009


def test_a_network_s_own_code_runs_where_it_is_allowed(folder: Path) -> None:
    options = RewardOptions(allow_code=True)
    reward = build_reward(f"clip={folder / 'coded'}", options=options)
    images = pictures((20, 20), (31, 44))
    captions = ["a cat", "a photo of a red frog"]

    found = reward.score(images, captions)

    state = load_file(folder / "coded" / "model.safetensors")
    said = [[0, 4, 5, 2], [0, 4, 9, 10, 4, 7, 8, 2]]
    text = torch.stack([state["words.weight"][ids].mean(0) for ids in said])
    pixels = torch.stack([ImageTransform(20).of(image) for image in images]) / 127.5 - 1
    seen = F.conv2d(pixels, state["patches.weight"], state["patches.bias"], 4)
    image = seen.relu().mean((2, 3))
    expected = torch.tensor(2.5).exp() / 100 * cosines(image, text)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert reward.model.endswith("by its own code")


@pytest.mark.parametrize("weights", ["coded", "jinaai/jina-clip-v2"])
def test_code_of_a_network_s_own_is_refused_unless_it_is_allowed(
    folder: Path, weights: str
) -> None:
    asked = folder / weights if weights == "coded" else weights

    with pytest.raises(ValueError, match="code of its own.*allow_code.*open_clip:ViT-L-14"):
        build_reward(f"clip={asked}")


def test_each_picture_and_each_caption_goes_through_its_tower_once(
    hpsv2: DualEncoderReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    read: list[int] = []
    see, words = hpsv2.embed_pictures, hpsv2.embed_captions
    monkeypatch.setattr(hpsv2, "embed_pictures", lambda x: (seen.append(len(x)), see(x))[1])
    monkeypatch.setattr(hpsv2, "embed_captions", lambda x: (read.append(len(x)), words(x))[1])
    one, other = pictures((32, 32), (40, 50))

    first = hpsv2.score([one, one, other], ["a cat", "a dog", "a cat"])
    again = hpsv2.score([other], ["a dog"])

    assert seen == [2, 1] and read == [2]
    assert len({*first.tolist(), *again.tolist()}) == 4


@pytest.mark.parametrize("name", ["hpsv2", "pick_score"])
def test_a_score_does_not_depend_on_the_batch(
    folder: Path, hpsv2: DualEncoderReward, name: str
) -> None:
    reward = hpsv2 if name == "hpsv2" else build_reward(f"pick_score={folder / 'pick'}")
    images = pictures(*SIZES)

    together = reward.score(images, CAPTIONS)

    alone = [reward.score([i], [c]).item() for i, c in zip(images, CAPTIONS, strict=True)]
    torch.testing.assert_close(together, torch.tensor(alone), rtol=0, atol=1e-6)
    assert together.isfinite().all()  # that of the empty caption too


def test_batches_shrink_until_they_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = toy_hpsv2(folder / "hps", monkeypatch).score(pictures(*SIZES), CAPTIONS)
    reward = toy_hpsv2(folder / "hps", monkeypatch, batch_size=16)
    see = reward._see

    def within_memory(pixels: Tensor) -> Tensor:
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("two pictures at most")
        return see(pixels)

    monkeypatch.setattr(reward, "_see", within_memory)

    found = reward.score(pictures(*SIZES), CAPTIONS)

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert "batches of 2 now" in caplog.text


def test_bf16_agrees_with_fp32(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = toy_hpsv2(folder / "hps", monkeypatch)
    half = toy_hpsv2(folder / "hps", monkeypatch, precision="bf16")
    images = pictures(*SIZES)

    difference = (half.score(images, CAPTIONS) - full.score(images, CAPTIONS)).abs().max()

    assert 0 < difference < 0.03
    assert half.bytes < 0.51 * full.bytes


def test_a_compiled_tower_scores_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function: calls.append(function) or function)

    reward = toy_hpsv2(folder / "hps", monkeypatch, compile=True)

    assert calls == [reward._towers.see]


def test_of_two_versions_of_hpsv2_the_newer_is_taken_and_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = open_clip_toy(tmp_path, "HPS_v2_compressed.pt")
    assert toy_hpsv2(tmp_path, monkeypatch).model == f"open_clip {TOY}, HPS_v2_compressed.pt"
    assert toy_hpsv2(old, monkeypatch).model.endswith("HPS_v2_compressed.pt")
    open_clip_toy(tmp_path)

    assert toy_hpsv2(tmp_path, monkeypatch).model.endswith("HPS_v2.1_compressed.pt")


@pytest.mark.parametrize(
    ("spec", "remedy"),
    [
        ("hpsv2", "hf download xswu/HPSv2"),
        ("pick_score", "hf download yuvalkirstain/PickScore_v1"),
        ("sci_score", "hf download Jialuo21/SciScore"),
        ("aesthetic", "curl -L .*linearMSE.pth"),
        ("aesthetic=/no/such/head.pth", "neither a file nor a folder; curl"),
        ("clip=/no/such/folder", "no folder, and no hub id"),
        ("clip=someone/clip", "hf download someone/clip"),
        ("clip=open_clip:ViT-X-99/openai", "knows no model 'ViT-X-99'"),
        ("clip=open_clip:ViT-L-14", "names no weights.*openai"),
        ("clip=open_clip:ViT-L-14/nothing", "could not be loaded by open_clip.*open_clip:MODEL/"),
        ("clip=a,b", "name 2 things where 1 are taken"),
        ("pick_score=,b", "names a tokenizer and no network"),
    ],
)
def test_what_is_not_there_is_named_with_how_to_get_it(spec: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=re.compile(remedy, re.DOTALL)):
        build_reward(spec)


def test_a_tokenizer_that_is_not_there_is_not_made_up(tmp_path: Path) -> None:
    """transformers makes one of two tokens where it finds no files."""
    without = transformers_toy(tmp_path / "without", tokenizer=False)
    clip_tokenizer(tmp_path / "apart")
    with pytest.raises(ValueError, match="hf download laion/CLIP-ViT-H-14"):
        build_reward(f"pick_score={without}")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        build_reward(f"pick_score={without},{tmp_path}")

    reward = build_reward(f"pick_score={without},{tmp_path / 'apart'}")

    assert reward.model.endswith("tokenizer apart")


def test_another_s_tokenizer_and_half_a_network_are_refused(folder: Path, tmp_path: Path) -> None:
    toy = transformers_toy(tmp_path / "toy")
    with pytest.raises(ValueError, match="has 11 tokens.*reads 49408"):
        build_reward(f"pick_score={toy},{folder / 'coded'}")
    tensors = load_file(toy / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, toy / "model.safetensors")

    with pytest.raises(ValueError, match="lacks 1 of .*visual_projection"):
        build_reward(f"pick_score={toy}")


def test_files_of_something_else_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "head.pth").write_bytes(b"<!DOCTYPE html>")
    torch.save({"rows.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="damaged, or holds more than tensors"):
        build_reward(f"aesthetic={tmp_path / 'head.pth'},{folder / 'pick'}")
    with pytest.raises(ValueError, match="rows.weight.*not those of"):
        build_reward(f"aesthetic={tmp_path / 'other.pth'},{folder / 'pick'}")
    with pytest.raises(ValueError, match="could not be loaded by open_clip"):
        toy_hpsv2(tmp_path / "other.pth", monkeypatch)
    with pytest.raises(ValueError, match="damaged, or holds more than tensors"):
        toy_hpsv2(tmp_path / "head.pth", monkeypatch)
    wide, _ = aesthetic_head(tmp_path, width=48)
    reward = build_reward(f"aesthetic={wide},{folder / 'pick'}")
    with pytest.raises(ValueError, match="embeddings of 48"):
        reward.score(pictures((32, 32)), [""])
