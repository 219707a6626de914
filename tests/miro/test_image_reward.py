"""ImageReward against the published package, and what its file may be."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

from miro.rewards.base import RewardOptions
from miro.rewards.image_batch import ImageBatch
from miro.rewards.image_reward import ImageReward
from miro.rewards.registry import build_reward

ORACLES = Path(__file__).parents[1] / "oracles"
ORACLE = json.loads((Path(__file__).parent / "fixtures/image_reward_scores.json").read_text())
PROMPTS: list[str] = ORACLE["prompts"]

spec = importlib.util.spec_from_file_location("oracle_weights", ORACLES / "weights.py")
assert spec is not None and spec.loader is not None
rule: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rule)

PICTURES: dict[str, Tensor] = {
    name: rule.picture(name, *shape) for name, shape in ORACLE["pictures"].items()
}


def state(shapes: Mapping[str, Sequence[int]], make: Any = rule.weight) -> dict[str, Tensor]:
    return {
        name: torch.arange(shape[1])[None] if name.endswith("position_ids") else make(name, shape)
        for name, shape in shapes.items()
    }


def published_shapes() -> dict[str, list[int]]:
    """Of every tensor of the published file: a * stands for the numbers of all layers."""
    layers = {"blocks": 24, "layer": 12}
    shapes: dict[str, list[int]] = {}
    for name, shape in ORACLE["published"]["shapes"].items():
        tower = re.search(r"\.(\w+)\.\*\.", name)
        for number in range(layers[tower[1]] if tower else 1):
            shapes[name.replace("*", str(number))] = shape
    return shapes


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small ImageReward.pt. Do not write."""
    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(state(ORACLE["small"]["shapes"]), folder / "ImageReward.pt")
    return folder


@pytest.fixture(scope="module")
def reward(weights: Path) -> ImageReward:
    built = build_reward(f"image_reward={weights}")
    assert isinstance(built, ImageReward)
    return built


def as_the_package_crops(picture: Tensor) -> Tensor:
    """The square of 224 pixels that PIL makes, by which the package's pixels are ours exactly."""
    image = Image.fromarray(np.asarray(picture.permute(1, 2, 0)))
    image = TF.resize(image, [224], TF.InterpolationMode.BICUBIC)
    return TF.pil_to_tensor(TF.center_crop(image, [224]))


def assert_scores_of_the_package(reward: ImageReward, size: str) -> None:
    images = [as_the_package_crops(p) for p in PICTURES.values() for _ in PROMPTS]

    scores = reward.score(images, PROMPTS * len(PICTURES))

    expected = torch.tensor(list(ORACLE[size]["scores"].values())).flatten()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=0)


def test_scores_are_those_of_the_package(reward: ImageReward) -> None:
    assert_scores_of_the_package(reward, "small")


@pytest.mark.long
def test_scores_at_the_published_size_are_those_of_the_package(tmp_path: Path) -> None:
    torch.save(state(published_shapes()), tmp_path / "ImageReward.pt")

    reward = ImageReward(str(tmp_path), RewardOptions(batch_size=4))

    assert_scores_of_the_package(reward, "published")


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_a_picture_of_any_shape_is_cropped_as_the_package_does(
    reward: ImageReward, name: str
) -> None:
    scores = reward.score([PICTURES[name]] * len(PROMPTS), PROMPTS)

    # Single pixels are a grey level off where torch rounds another way than PIL.
    expected = torch.tensor(ORACLE["small"]["scores"][name])
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-3)


def test_prompts_are_read_as_the_package_reads_them(reward: ImageReward) -> None:
    tokens, mask = reward._tokens(PROMPTS)

    assert tokens.tolist() == ORACLE["tokens"]
    assert torch.equal(mask, (tokens != 0).long())


def test_each_distinct_picture_is_encoded_once(
    reward: ImageReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    see = reward._see
    monkeypatch.setattr(reward, "_see", lambda pixels: seen.append(len(pixels)) or see(pixels))
    pairs = ImageBatch([PICTURES["square"], PICTURES["wide"]]).take([0, 1, 0, 0, 1])

    scores = reward.score(pairs, ["a", "b", "c", "a", "b"])

    assert sum(seen) == 2
    assert scores[0] == pytest.approx(scores[3].item(), rel=1e-5)
    assert len({round(score, 4) for score in scores.tolist()}) == 3


def test_a_score_does_not_depend_on_the_rest_of_the_batch(
    reward: ImageReward, weights: Path
) -> None:
    images = [PICTURES["wide"], PICTURES["tall"], PICTURES["wide"], PICTURES["square"]]

    together = reward.score(images, PROMPTS)
    alone = torch.cat([reward.score([i], [p]) for i, p in zip(images, PROMPTS, strict=True)])
    batches = ImageReward(str(weights), RewardOptions(batch_size=3)).score(images, PROMPTS)

    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, batches, rtol=0, atol=1e-5)
    assert together.dtype == torch.float32


def test_bf16_moves_a_score_little_and_leaves_the_head_as_it_is(
    reward: ImageReward, weights: Path
) -> None:
    fast = ImageReward(str(weights / "ImageReward.pt"), RewardOptions(precision="bf16"))
    images = [PICTURES["square"]] * len(PROMPTS)

    scores, exact = fast.score(images, PROMPTS), reward.score(images, PROMPTS)

    assert next(fast.network.vision.parameters()).dtype == torch.bfloat16
    for ours, theirs in zip(
        fast.network.head.parameters(), reward.network.head.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    # A prompt moves the score by 1; about .03 was measured.
    assert scores.dtype == torch.float32
    assert 1e-4 < (scores - exact).abs().max() < 0.1


def test_no_pairs_have_no_scores_and_each_image_has_its_caption(reward: ImageReward) -> None:
    assert reward.score([], []).shape == (0,)
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        reward.score(list(PICTURES.values())[:2], ["a"])


def test_the_published_names_and_shapes_are_a_network_of_the_published_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def empty(name: str, shape: Sequence[int]) -> Tensor:
        return torch.empty(*shape, device="meta")

    full = state(published_shapes(), empty)
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


def test_a_file_of_other_names_or_shapes_is_refused(tmp_path: Path) -> None:
    def refused(change: Mapping[str, Tensor | None], message: str) -> None:
        changed = {**state(ORACLE["small"]["shapes"]), **change}
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


def test_what_is_no_file_of_tensors_is_refused(tmp_path: Path, weights: Path) -> None:
    path = tmp_path / "ImageReward.pt"
    with pytest.raises(ValueError, match="no file .*ImageReward.pt; give .*hf download"):
        build_reward(f"image_reward={tmp_path}")
    whole = (weights / "ImageReward.pt").read_bytes()
    for content in (b"", b"<html>not found</html>", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged, or no file of tensors"):
            build_reward(f"image_reward={path}")
    torch.save({"mlp.layers.0.weight": Code()}, path)
    with pytest.raises(ValueError, match="damaged, or no file of tensors"):
        build_reward(f"image_reward={path}")
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="expected a state_dict"):
        build_reward(f"image_reward={path}")
