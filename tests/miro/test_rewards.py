"""Rewards of pixels, the registry, and its error messages."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from miro.rewards.base import RewardOptions
from miro.rewards.pixels import Colourfulness, Sharpness
from miro.rewards.registry import build_reward, reward_names
from miro.utils.reward_names import REWARD_ORDER, order_rewards


def as_uint8(image: Tensor) -> Tensor:
    """float (3, H, W) in [0, 1] to uint8."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def drawing(size: int = 48) -> Tensor:
    """Coloured boxes on a plain ground, float (3, size, size): crisp edges, flat elsewhere."""
    image = torch.full((3, size, size), 0.9)
    image[:, size // 8 : size // 2, size // 8 : size // 2] = torch.tensor([0.8, 0.1, 0.2])[
        :, None, None
    ]
    image[:, size // 2 : -size // 8, size // 3 : -size // 8] = torch.tensor([0.1, 0.3, 0.7])[
        :, None, None
    ]
    return image


def blur(image: Tensor, sigma: float) -> Tensor:
    reach = int(3 * sigma) + 1
    kernel = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, -1)
    padded = F.pad(image[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[..., None]), kernel[:, :, None])[:, 0]


def noisy(image: Tensor, sigma: float, seed: int = 0) -> Tensor:
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    return image + sigma * noise


def score_one(reward: Colourfulness | Sharpness, image: Tensor) -> float:
    return reward.score([as_uint8(image)], ["ignored"]).item()


def test_a_grey_image_has_zero_colourfulness() -> None:
    grey = drawing().mean(0, keepdim=True).expand(3, -1, -1)
    assert score_one(Colourfulness(), grey) == 0


def test_more_saturation_is_more_colourful() -> None:
    image = drawing()
    grey = image.mean(0, keepdim=True)
    scores = [score_one(Colourfulness(), grey + s * (image - grey)) for s in (0.2, 0.5, 0.8, 1.0)]
    assert scores == sorted(scores) and scores[0] > 0


def test_colourfulness_agrees_with_the_published_formula() -> None:
    image = as_uint8(torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(1)))
    red, green, blue = image.double()
    rg, yb = red - green, (red + green) / 2 - blue
    spread = (rg.var(unbiased=False) + yb.var(unbiased=False)).sqrt()
    expected = spread + 0.3 * (rg.mean() ** 2 + yb.mean() ** 2).sqrt()
    assert Colourfulness().score([image], [""]).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_pure_colour_has_the_colourfulness_of_its_mean_alone() -> None:
    red = torch.zeros(3, 8, 8)
    red[0] = 1
    assert score_one(Colourfulness(), red) == pytest.approx(0.3 * (255**2 + 127.5**2) ** 0.5)


@pytest.mark.parametrize("size", [32, 96])
def test_blur_lowers_sharpness(size: int) -> None:
    image = drawing(size)
    scores = [score_one(Sharpness(), image)]
    scores += [score_one(Sharpness(), blur(image, sigma)) for sigma in (0.6, 1.2, 2.4)]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1] + 0.5


def test_lost_contrast_lowers_sharpness() -> None:
    image = drawing()
    assert score_one(Sharpness(), 0.5 + 0.3 * (image - 0.5)) < score_one(Sharpness(), image)


@pytest.mark.parametrize("sigma", [0.01, 0.03, 0.1, 0.2])
@pytest.mark.parametrize("content", ["crisp", "blurred", "constant"])
def test_noise_does_not_raise_sharpness(content: str, sigma: float) -> None:
    image = {
        "crisp": drawing(),
        "blurred": blur(drawing(), 2.0),
        "constant": torch.full((3, 48, 48), 0.5),
    }[content]
    before = score_one(Sharpness(), image)
    after = [score_one(Sharpness(), noisy(image, sigma, seed)) for seed in range(4)]
    assert max(after) <= before + 0.05, (before, after)


@pytest.mark.parametrize("reward", [Colourfulness(), Sharpness()], ids=lambda r: r.name)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (3, 5), (64, 64)])
def test_a_constant_image_of_any_size_scores_zero(reward, shape: tuple[int, int]) -> None:
    image = torch.full((3, *shape), 77, dtype=torch.uint8)
    assert reward.score([image], [""]).tolist() == [0.0]


@pytest.mark.parametrize("reward", [Colourfulness(), Sharpness()], ids=lambda r: r.name)
def test_a_score_does_not_depend_on_the_rest_of_the_batch(reward) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = [(32, 32), (17, 40), (32, 32), (64, 64), (17, 40)]
    images = [as_uint8(torch.rand(3, *size, generator=generator)) for size in sizes]
    together = reward.score(images, [""] * len(images))
    alone = torch.cat([reward.score([image], [""]) for image in images])
    assert together.dtype == torch.float32 and torch.equal(together, alone)


def test_an_empty_batch_has_no_scores() -> None:
    assert Sharpness().score([], []).shape == (0,)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(4, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 0, 8, dtype=torch.uint8),
        torch.zeros(8, 8, dtype=torch.uint8),
    ],
    ids=["floats", "four channels", "no rows", "no channels"],
)
def test_an_invalid_image_is_refused_by_its_index(image: Tensor) -> None:
    good = torch.zeros(3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="image 1: expected uint8"):
        Colourfulness().score([good, image], ["", ""])


def test_a_missing_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="1 images but 2 captions"):
        Colourfulness().score([torch.zeros(3, 8, 8, dtype=torch.uint8)], ["", ""])


def test_an_unknown_reward_offers_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="did you mean 'colourfulness'"):
        build_reward("colorfulness")
    with pytest.raises(ValueError, match="did you mean 'hpsv2'"):
        order_rewards(["hps_v2"])


def test_order_rewards_follows_the_registered_order() -> None:
    assert order_rewards(["sharpness", "vqa", "clip"]) == ("clip", "vqa", "sharpness")
    with pytest.raises(ValueError, match="'clip' is given twice"):
        order_rewards(["clip", "sharpness", "clip"])


def test_every_registered_reward_is_in_the_order() -> None:
    assert reward_names() and set(reward_names()) <= set(REWARD_ORDER)


def test_a_built_reward_has_its_name() -> None:
    for name in ("colourfulness", "sharpness"):
        reward = build_reward(name)
        assert reward.name == name and not reward.reads_caption


def test_missing_and_superfluous_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="has no weights after '='"):
        build_reward("clip=")
    with pytest.raises(ValueError, match="'sharpness' has no weights"):
        build_reward("sharpness=/some/folder")


class WhiteReward:
    """A reward of a user's own, built from "test_rewards:WhiteReward"."""

    name, model, reads_caption = "white", "none", False

    def __init__(self, weights: str | None, options: RewardOptions) -> None:
        self.weights, self.options = weights, options

    def score(self, images: list[Tensor], captions: list[str]) -> Tensor:
        return torch.stack([(image == 255).float().mean() for image in images])


def test_a_user_defined_reward_is_imported_by_module_and_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "users_rewards", sys.modules[__name__])

    reward = build_reward("users_rewards:WhiteReward=some/weights", "meta")

    assert isinstance(reward, WhiteReward) and reward.weights == "some/weights"
    assert reward.options.device == "meta"
    for name in ("users_rewards:Black", "no_such_module:WhiteReward"):
        with pytest.raises(ValueError, match=f"reward '{name}'.*give MODULE:CLASS"):
            build_reward(name)
