"""Binning, missing scores, dropout and targets."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from miro.conditioning import (
    Bins,
    ConditioningConfig,
    RewardTarget,
    conditioned_rewards,
    keep_rewards,
    keep_text,
)

NAN = float("nan")


def column(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def assigned(bins: Bins, scores: np.ndarray) -> list[int]:
    return bins.assign(scores)[0][:, 0].tolist()


@pytest.mark.parametrize("count", [2, 3, 64])
@pytest.mark.parametrize("samples", [64, 100, 1000, 997])
def test_distinct_scores_fill_quantile_bins_equally(count: int, samples: int) -> None:
    scores = np.random.default_rng(0).standard_cauchy((samples, 1)).astype(np.float32)

    bins = Bins.fit(scores, ["clip"], count)

    sizes = np.bincount(assigned(bins, scores), minlength=count)
    assert len(sizes) == bins.count == count
    assert sizes.max() - sizes.min() <= 1


def test_fewer_scores_than_bins_spread_over_all_bins() -> None:
    scores = column(3, 1, 2)

    assert assigned(Bins.fit(scores, ["clip"], 10), scores) == [9, 3, 6]


def test_bins_are_monotonic_in_the_score() -> None:
    scores = np.sort(np.random.default_rng(1).normal(size=(500, 1)).round(1), 0)

    for binning in ("quantile", "equal_width"):
        found = assigned(Bins.fit(scores, ["clip"], 16, binning), scores)
        assert found == sorted(found)


def test_equal_scores_share_a_bin() -> None:
    scores = column(*[0.0] * 50, *range(1, 51))

    bins = assigned(Bins.fit(scores, ["clip"], 10), scores)

    assert len(set(bins[:50])) == 1 and len(set(bins[50:])) == 5
    assert min(bins[50:]) > bins[0]


def test_a_constant_reward_is_in_one_bin() -> None:
    scores = column(*[0.3] * 20)

    for binning in ("quantile", "equal_width"):
        assert len(set(assigned(Bins.fit(scores, ["clip"], 8, binning), scores))) == 1


def test_equal_width_bins_divide_the_range() -> None:
    scores = column(0, 1, 2, 3, 100)

    assert assigned(Bins.fit(scores, ["clip"], 4, "equal_width"), scores) == [0, 0, 0, 0, 3]


def test_scores_outside_the_fitted_range_are_in_the_outer_bins() -> None:
    bins = Bins.fit(column(*range(100)), ["clip"], 10)

    assert assigned(bins, column(-1e30, -1, 100, 1e30)) == [0, 0, 9, 9]


@pytest.mark.parametrize("unknown", [NAN, np.inf, -np.inf])
def test_a_non_finite_score_is_unknown_and_does_not_change_the_bins(
    unknown: float,
) -> None:
    scores = column(5, 1, unknown, 3, unknown, 4, 2)

    bins = Bins.fit(scores, ["clip"], 5)
    found, known = bins.assign(scores)

    assert bins == Bins.fit(column(1, 2, 3, 4, 5), ["clip"], 5)
    assert known[:, 0].tolist() == [True, True, False, True, False, True, True]
    assert found[known].tolist() == [4, 0, 2, 3, 1]


def test_each_reward_has_its_own_bins() -> None:
    scores = np.concatenate((column(1, 2, 3, 4), column(40, 30, 20, NAN)), 1)

    found, known = Bins.fit(scores, ["clip", "vqa"], 2).assign(scores)

    assert found[:, 0].tolist() == [0, 0, 1, 1]
    assert found[:3, 1].tolist() == [1, 1, 0] and not known[3, 1]


def test_bins_do_not_depend_on_the_order_of_the_samples() -> None:
    scores = np.random.default_rng(2).normal(size=(200, 3)).astype(np.float32)
    scores[::7] = NAN
    shuffled = np.random.default_rng(3).permutation(scores)

    names = ["clip", "vqa", "hpsv2"]
    assert Bins.fit(scores, names, 16) == Bins.fit(shuffled, names, 16)


def test_a_reward_without_scores_is_rejected_by_name() -> None:
    scores = np.concatenate((column(1, 2), column(NAN, NAN)), 1)

    with pytest.raises(ValueError, match="'vqa' has no known score.*annotate"):
        Bins.fit(scores, ["clip", "vqa"], 4)


def test_quantile_levels_run_from_zero_to_one() -> None:
    levels = Bins.fit(column(*range(9)), ["clip"], 5).quantile_levels()

    torch.testing.assert_close(levels, torch.tensor([0, 0.25, 0.5, 0.75, 1]))


def test_bins_of_no_rewards() -> None:
    bins = Bins.fit(np.zeros((4, 0), np.float32), [], 64)

    assert bins.rewards == () and bins.assign(np.zeros((4, 0)))[0].shape == (4, 0)
    assert len(bins.quantile_levels()) == bins.count


def test_bins_round_trip_through_json_exactly() -> None:
    scores = np.random.default_rng(4).normal(size=(300, 2)).astype(np.float32)
    bins = Bins.fit(scores, ["clip", "vqa"], 64)

    again = Bins.from_json(bins.to_json(), "bins.json")

    assert again == bins and again.rewards == ("clip", "vqa")
    assert torch.equal(again.assign(scores)[0], bins.assign(scores)[0])


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"version": 2, "edges": {}}', '{"version": 1}',
     '{"version": 1, "edges": [1]}', '{"version": 1, "edges": {"clip": ["a"]}}',
     '{"version": 1, "edges": {"clip": 3}}',
     '{"version": 1, "edges": {"clip": [1, 2], "vqa": [1]}}',
     '{"version": 1, "edges": {"clip": [2, 1]}}'],
)  # fmt: skip
def test_a_malformed_bins_file_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"run/bins\.json is not a bins file"):
        Bins.from_json(text, "run/bins.json")


def test_the_format_of_the_bins_file() -> None:
    record = json.loads(Bins.fit(column(1, 2, 3, 4), ["clip"], 2).to_json())

    assert record == {"version": 1, "edges": {"clip": [3.0]}}


def test_conditioned_rewards_are_those_of_the_configuration() -> None:
    data = ("clip", "vqa", "hpsv2")

    def mask(rewards: tuple[str, ...] | None) -> list[bool]:
        return conditioned_rewards(ConditioningConfig(rewards=rewards), data).tolist()

    assert mask(None) == [True] * 3 and mask(()) == [False] * 3
    assert mask(("hpsv2", "clip")) == [True, False, True]
    with pytest.raises(ValueError, match="unknown reward.*'vqaa'.*did you mean 'vqa'.*clip, hpsv2"):
        mask(("vqaa",))


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5))


def drop(rows: int = 40_000, rewards: int = 3, **probabilities: Any) -> torch.Tensor:
    known, active = torch.ones(rows, rewards, dtype=torch.bool), torch.ones(rewards).bool()
    config = ConditioningConfig(**{"drop_all": 0.0, **probabilities})
    return keep_rewards(config, known, active, uniform(rows, rewards + 1))


def test_each_reward_is_dropped_at_its_rate_and_independently() -> None:
    keep = drop(drop_one=0.3)

    assert (keep.float().mean(0) - 0.7).abs().max() < 0.01
    patterns = Counter(map(tuple, keep.tolist()))
    for pattern in [(True,) * 3, (True, False, True), (False,) * 3]:
        chance = 0.7 ** sum(pattern) * 0.3 ** (3 - sum(pattern))
        assert abs(patterns[pattern] / 40_000 - chance) < 0.01


def test_all_rewards_are_dropped_together_at_their_rate() -> None:
    keep = drop(drop_all=0.2)

    assert set(map(tuple, keep.tolist())) == {(True,) * 3, (False,) * 3}
    assert abs(keep[:, 0].float().mean() - 0.8) < 0.01


def test_both_reward_dropouts_combine() -> None:
    keep = drop(drop_one=0.25, drop_all=0.2)

    assert (keep.float().mean(0) - 0.75 * 0.8).abs().max() < 0.01


def test_text_dropout_is_independent_of_reward_dropout() -> None:
    config = ConditioningConfig(drop_all=0.5, drop_text=0.3)
    drawn, everything = uniform(40_000, 3), torch.ones(40_000, 1).bool()
    rewards = keep_rewards(config, everything, everything[0], drawn[:, 1:])

    text = keep_text(config, drawn[:, 0])

    assert text.dtype == torch.bool and abs(text.float().mean() - 0.7) < 0.01
    assert abs((text & rewards[:, 0]).float().mean() - 0.7 * 0.5) < 0.01


@pytest.mark.parametrize(("probability", "keep"), [(0.0, True), (1.0, False)])
def test_dropout_rates_of_zero_and_one_are_exact(probability: float, keep: bool) -> None:
    assert (drop(drop_one=probability) == keep).all()
    assert (drop(drop_all=probability) == keep).all()
    config = ConditioningConfig(drop_text=probability)
    assert (keep_text(config, uniform(10_000, 1)[:, 0]) == keep).all()


def test_unknown_and_inactive_rewards_are_always_masked() -> None:
    known = torch.rand(5000, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    active = torch.tensor([True, False, True])
    for config in (ConditioningConfig(drop_all=0.0), ConditioningConfig(drop_one=0.5)):
        keep = keep_rewards(config, known, active, uniform(5000, 4))
        assert not (keep & ~known).any() and not keep[:, 1].any() and keep[:, 0].any()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"bins": 1}, "conditioning.bins.*got 1"),
        ({"drop_one": -0.1}, "conditioning.drop_one.*got -0.1"),
        ({"drop_all": 1.1}, "conditioning.drop_all.*got 1.1"),
        ({"drop_text": NAN}, "conditioning.drop_text.*got nan"),
    ],
)
def test_invalid_values_are_named_in_the_error(bad: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ConditioningConfig(**bad)


def test_a_target_has_the_default_for_rewards_not_named() -> None:
    rewards = ("clip", "vqa", "hpsv2")

    assert RewardTarget.from_dict(rewards, {}, 1.0).levels == (1.0, 1.0, 1.0)
    assert RewardTarget.from_dict(rewards, {"vqa": 0.25, "hpsv2": None}, 1.0).levels == (
        1.0,
        0.25,
        None,
    )
    assert RewardTarget.from_dict(rewards, {"clip": 0.0}, None).levels == (0.0, None, None)


def test_a_target_of_an_unknown_reward_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown reward.*'hpsv'.*did you mean 'hpsv2'"):
        RewardTarget.from_dict(("clip", "hpsv2"), {"hpsv": 1.0}, 1.0)


@pytest.mark.parametrize("level", [-0.01, 1.01, NAN, float("inf")])
def test_a_target_outside_zero_to_one_is_rejected(level: float) -> None:
    with pytest.raises(ValueError, match=f"target of clip.*0.*1.*got {level}"):
        RewardTarget.from_dict(("clip",), {"clip": level}, 1.0)
    with pytest.raises(ValueError, match=f"0.*1.*got {level}"):
        RewardTarget.from_dict(("clip",), {}, level)
