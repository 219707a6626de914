"""The dual-encoder rewards against the published packages, and their error messages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import huggingface_hub.constants
import open_clip
import pytest
import torch
from helpers.toy_clips import (
    TOY,
    aesthetic_head,
    as_pil,
    clip_tokenizer,
    fixture,
    open_clip_model,
    open_clip_toy,
    oracle,
    random_images,
    remote_code_toy,
    transformers_toy,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from miro.images.transforms import CLIP_MEAN, CLIP_STD, ImageTransform
from miro.rewards import clip_family
from miro.rewards.base import Reward, RewardOptions
from miro.rewards.network import DualEncoderReward
from miro.rewards.registry import build_reward

SIZES = ((32, 32), (48, 80), (101, 33), (32, 35), (225, 452))
CAPTIONS = ["a red frog", "two cats left of a dog", "", "a very long caption " * 20, "a photo"]
RESIZE_TOLERANCE = 3e-3  # of a toy's score if one side resizes uint8, the other floats or PIL


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toys of every kind. Do not write."""
    root = tmp_path_factory.mktemp("clips")
    open_clip_toy(root / "hps")
    transformers_toy(root / "pick")
    remote_code_toy(root / "coded")
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


def all_scores(reward: Reward, record: dict[str, Any]) -> Tensor:
    """float32 (images, prompts) of a fixture."""
    prompts, images = record["prompts"], random_images(*record["sizes"])
    return torch.stack([reward.score([image] * len(prompts), prompts) for image in images])


def expanded(shapes: dict[str, list[int]], layers: dict[str, int]) -> dict[str, list[int]]:
    """Every name of a published file; a * stands for the layer numbers of an encoder."""
    full: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        count = next((n for tower, n in layers.items() if name.startswith(tower)), 1)
        full |= {name.replace("*", str(i)): shape for i in range(count if "*" in name else 1)}
    return full


def test_hpsv2_agrees_with_its_package(hpsv2: DualEncoderReward) -> None:
    record = fixture("hpsv2_scores.json")
    expected = torch.tensor(record["scores"])

    found = all_scores(hpsv2, record)

    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)
    assert (found - expected).abs().max() < RESIZE_TOLERANCE
    assert expected.std() > 20 * RESIZE_TOLERANCE


def test_pick_score_agrees_with_the_transformers_it_was_published_for(folder: Path) -> None:
    record = fixture("pick_scores.json")
    expected = torch.tensor(record["scores"])
    reward = build_reward(f"pick_score={folder / 'pick'}")

    found = all_scores(reward, record)

    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-8)
    scale = float(oracle.weight("logit_scale", ()).exp()) / 100
    assert (found - expected).abs().max() < scale * RESIZE_TOLERANCE


def test_the_published_hpsv2_weights_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    record = fixture("hpsv2_scores.json")["published"]
    shapes = expanded(record["shapes"], {"visual": 32, "transformer": 24})

    with torch.device("meta"):
        network = open_clip.create_model("ViT-H-14", pretrained=None, device="meta")

    assert len(shapes) == record["tensors"]
    assert {name: list(t.shape) for name, t in network.state_dict().items()} == shapes


def test_the_published_pick_score_weights_fit() -> None:
    record = fixture("pick_scores.json")["published"]
    shapes = expanded(record["shapes"], {"vision": 32, "text": 24})

    with torch.device("meta"):
        network = CLIPModel(CLIPConfig(**record["config"]))

    assert len(shapes) == record["tensors"]
    assert {name: list(t.shape) for name, t in network.state_dict().items()} == shapes


def test_sci_score_is_the_logits_of_transformers(folder: Path) -> None:
    network = CLIPModel.from_pretrained(folder / "pick").eval()
    words = CLIPTokenizer.from_pretrained(folder / "pick")
    process = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images = random_images(*SIZES)
    with torch.inference_mode():
        given = words(CAPTIONS, padding=True, truncation=True, max_length=77, return_tensors="pt")
        pixels = process(images=[as_pil(image) for image in images], return_tensors="pt")
        expected = network(**given, **pixels).logits_per_image.diagonal() / 100

    reward = build_reward(f"sci_score={folder / 'pick'}")

    assert reward.name == "sci_score" and reward.reads_caption
    # Both resize uint8 with torch, so nothing differs.
    torch.testing.assert_close(reward.score(images, CAPTIONS), expected, rtol=1e-4, atol=1e-8)


def test_clip_of_open_clip_is_its_logits(folder: Path) -> None:
    file = folder / "hps" / "HPS_v2.1_compressed.pt"
    network, process = open_clip_model(file)
    images = random_images(*SIZES)
    with torch.inference_mode():
        pixels = torch.stack([process(as_pil(image)) for image in images])
        text = network.encode_text(open_clip.get_tokenizer(TOY)(CAPTIONS))
        scale = network.logit_scale.exp() / 100
        expected = scale * cosines(network.encode_image(pixels), text)
        resized = torch.stack([ImageTransform(32)(image) for image in images])
        pixels = torch.stack([process(as_pil(image)) for image in resized])
        exactly = scale * cosines(network.encode_image(pixels), text)

    reward = build_reward(f"clip=open_clip:{TOY}/{file}")
    found = reward.score(images, CAPTIONS)

    torch.testing.assert_close(found, exactly, rtol=1e-4, atol=1e-8)
    assert (found - expected).abs().max() < scale * RESIZE_TOLERANCE
    assert TOY in reward.model and file.name in reward.model


def test_a_local_folder_of_open_clip_is_loaded(folder: Path, tmp_path: Path) -> None:
    file = folder / "hps" / "HPS_v2.1_compressed.pt"
    state = torch.load(file, weights_only=True)["state_dict"]
    save_file(state, tmp_path / "open_clip_model.safetensors")
    config = {
        "model_cfg": fixture("hpsv2_scores.json")["config"],
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    images = random_images((32, 32))
    reward = build_reward(f"clip={tmp_path}")

    found = reward.score(images, CAPTIONS[:1])

    network, _ = open_clip_model(file)
    with torch.inference_mode():
        image = network.encode_image(images[0][None].float() / 127.5 - 1)
        text = network.encode_text(open_clip.tokenize(CAPTIONS[:1]))
        expected = network.logit_scale.exp() / 100 * cosines(image, text)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
    assert getattr(reward, "transform").resize_mode == "stretch"  # noqa: B009


def test_the_merged_aesthetic_head_agrees_with_its_layers(folder: Path, tmp_path: Path) -> None:
    path, head = aesthetic_head(tmp_path)
    network = CLIPModel.from_pretrained(folder / "pick").eval()
    images = random_images((32, 32), (40, 32))
    resized = torch.stack([ImageTransform(32, crop_rounding="down")(image) for image in images])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    with torch.inference_mode():
        pixels = (resized / 255 - mean) / std
        embedded = cast(Any, network.get_image_features(pixel_values=pixels)).pooler_output
        expected = head(F.normalize(embedded, dim=-1))[:, 0]

    reward = build_reward(f"aesthetic={path},{folder / 'pick'}")

    assert not reward.reads_caption
    torch.testing.assert_close(reward.score(images, ["", "a"]), expected, rtol=1e-4, atol=1e-5)
    assert reward.score([], []).shape == (0,)


def test_an_aesthetic_head_uses_the_clip_in_its_folder(tmp_path: Path) -> None:
    both = transformers_toy(tmp_path / "both", tokenizer=False)
    aesthetic_head(both)

    reward = build_reward(f"aesthetic={both}")

    assert "CLIPModel both" in reward.model and "linearMSE" in reward.model
    # The text encoder was dropped.
    assert "text_model" not in dict(getattr(reward, "network").named_children())  # noqa: B009


def test_remote_code_runs_if_it_is_allowed(folder: Path) -> None:
    options = RewardOptions(allow_code=True)
    reward = build_reward(f"clip={folder / 'coded'}", options=options)
    images = random_images((20, 20), (31, 44))
    captions = ["a cat", "a photo of a red frog"]

    found = reward.score(images, captions)

    state = load_file(folder / "coded" / "model.safetensors")
    ids = [[0, 4, 5, 2], [0, 4, 9, 10, 4, 7, 8, 2]]
    text = torch.stack([state["words.weight"][row].mean(0) for row in ids])
    pixels = torch.stack([ImageTransform(20)(image) for image in images]) / 127.5 - 1
    features = F.conv2d(pixels, state["patches.weight"], state["patches.bias"], 4)
    image = features.relu().mean((2, 3))
    expected = torch.tensor(2.5).exp() / 100 * cosines(image, text)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert reward.model.endswith("by its own code")


@pytest.mark.parametrize("weights", ["coded", "jinaai/jina-clip-v2"])
def test_remote_code_is_refused_unless_it_is_allowed(folder: Path, weights: str) -> None:
    source = folder / weights if weights == "coded" else weights

    with pytest.raises(ValueError, match="code of its own.*allow_code.*open_clip:ViT-L-14"):
        build_reward(f"clip={source}")


def test_each_image_and_each_caption_is_encoded_once(
    hpsv2: DualEncoderReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    images: list[int] = []
    captions: list[int] = []
    embed_images, embed_captions = hpsv2.embed_images, hpsv2.embed_captions
    monkeypatch.setattr(
        hpsv2, "embed_images", lambda x: (images.append(len(x)), embed_images(x))[1]
    )
    monkeypatch.setattr(
        hpsv2, "embed_captions", lambda x: (captions.append(len(x)), embed_captions(x))[1]
    )
    one, other = random_images((32, 32), (40, 50))

    first = hpsv2.score([one, one, other], ["a cat", "a dog", "a cat"])
    again = hpsv2.score([other], ["a dog"])

    assert images == [2, 1] and captions == [2]
    assert len({*first.tolist(), *again.tolist()}) == 4


@pytest.mark.parametrize("name", ["hpsv2", "pick_score"])
def test_a_score_does_not_depend_on_the_batch(
    folder: Path, hpsv2: DualEncoderReward, name: str
) -> None:
    reward = hpsv2 if name == "hpsv2" else build_reward(f"pick_score={folder / 'pick'}")
    images = random_images(*SIZES)

    together = reward.score(images, CAPTIONS)

    alone = [reward.score([i], [c]).item() for i, c in zip(images, CAPTIONS, strict=True)]
    torch.testing.assert_close(together, torch.tensor(alone), rtol=0, atol=1e-6)
    assert together.isfinite().all()  # that of the empty caption too


def test_out_of_memory_halves_the_batch_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = toy_hpsv2(folder / "hps", monkeypatch).score(random_images(*SIZES), CAPTIONS)
    reward = toy_hpsv2(folder / "hps", monkeypatch, batch_size=16)
    encode = reward._encode_image

    def within_memory(pixels: Tensor) -> Tensor:
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("two images at most")
        return encode(pixels)

    monkeypatch.setattr(reward, "_encode_image", within_memory)

    found = reward.score(random_images(*SIZES), CAPTIONS)

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert "batch size is now 2" in caplog.text


def test_bf16_agrees_with_fp32(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = toy_hpsv2(folder / "hps", monkeypatch)
    half = toy_hpsv2(folder / "hps", monkeypatch, precision="bf16")
    images = random_images(*SIZES)

    difference = (half.score(images, CAPTIONS) - full.score(images, CAPTIONS)).abs().max()

    assert 0 < difference < 0.03
    assert half.num_bytes < 0.51 * full.num_bytes


def test_compile_applies_to_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function: calls.append(function) or function)

    reward = toy_hpsv2(folder / "hps", monkeypatch, compile=True)

    assert calls == [reward._encoder.encode_image]


def test_hpsv2_prefers_version_2_1_and_records_it(
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
        ("aesthetic=/no/such/head.pth", "neither a file nor a folder; run `curl"),
        ("clip=/no/such/folder", "neither a folder nor a hub id"),
        ("clip=someone/clip", "hf download someone/clip"),
        ("clip=open_clip:ViT-X-99/openai", "has no model 'ViT-X-99'"),
        ("clip=open_clip:ViT-L-14", "names no weights.*openai"),
        ("clip=open_clip:ViT-L-14/nothing", "could not be loaded by open_clip.*open_clip:MODEL/"),
        ("clip=a,b", "are 2 names, at most 1"),
        ("pick_score=,b", "names a tokenizer and no network"),
    ],
)
def test_missing_weights_are_an_error_with_a_remedy(spec: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=re.compile(remedy, re.DOTALL)):
        build_reward(spec)


def test_a_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    """transformers builds a tokenizer of two tokens if it finds no files."""
    without = transformers_toy(tmp_path / "without", tokenizer=False)
    clip_tokenizer(tmp_path / "apart")
    with pytest.raises(ValueError, match="hf download laion/CLIP-ViT-H-14"):
        build_reward(f"pick_score={without}")
    with pytest.raises(ValueError, match="contains no tokenizer"):
        build_reward(f"pick_score={without},{tmp_path}")

    reward = build_reward(f"pick_score={without},{tmp_path / 'apart'}")

    assert reward.model.endswith("tokenizer apart")


def test_a_foreign_tokenizer_and_missing_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    toy = transformers_toy(tmp_path / "toy")
    with pytest.raises(ValueError, match="has 11 tokens.*expects 49408"):
        build_reward(f"pick_score={toy},{folder / 'coded'}")
    tensors = load_file(toy / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, toy / "model.safetensors")

    with pytest.raises(ValueError, match="lacks 1 of .*visual_projection"):
        build_reward(f"pick_score={toy}")


def test_damaged_and_foreign_files_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "head.pth").write_bytes(b"<!DOCTYPE html>")
    torch.save({"rows.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="damaged, or contains more than tensors"):
        build_reward(f"aesthetic={tmp_path / 'head.pth'},{folder / 'pick'}")
    with pytest.raises(ValueError, match="rows.weight.*not those of"):
        build_reward(f"aesthetic={tmp_path / 'other.pth'},{folder / 'pick'}")
    with pytest.raises(ValueError, match="could not be loaded by open_clip"):
        toy_hpsv2(tmp_path / "other.pth", monkeypatch)
    with pytest.raises(ValueError, match="damaged, or contains more than tensors"):
        toy_hpsv2(tmp_path / "head.pth", monkeypatch)
    wide, _ = aesthetic_head(tmp_path, width=48)
    reward = build_reward(f"aesthetic={wide},{folder / 'pick'}")
    with pytest.raises(ValueError, match="embeddings of 48"):
        reward.score(random_images((32, 32)), [""])
