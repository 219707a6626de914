"""reward_adaln against loops over samples and rewards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miro_kernels import adaln, gated_residual_adaln, reward_adaln

Draw = Callable[..., Tensor]


def arguments(
    draw: Draw, *, batch: int = 3, tokens: int = 4, channels: int = 6, rewards: int = 2,
    levels: int = 5, gated: bool, dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:  # fmt: skip
    parts = 3 if gated else 2
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "x": draw(batch, tokens, channels, dtype=dtype),
        "base": draw(batch, parts, channels, dtype=dtype),
        "block": draw(parts, channels, dtype=dtype),
        "table": draw(rewards, levels, parts, channels, dtype=dtype),
        "bins": torch.randint(levels, (batch, rewards), generator=generator),
        "keep": torch.rand(batch, rewards, generator=generator) < 0.6,
    }
    return tensors | ({"branch": draw(batch, tokens, channels, dtype=dtype)} if gated else {})


def modulation_by_loops(given: dict[str, Any]) -> Tensor:
    summed = given["base"] + given["block"]
    for b in range(len(summed)):
        for r in range(given["table"].shape[0]):
            if given["keep"][b, r]:
                summed[b] += given["table"][r, int(given["bins"][b, r])]
    return summed


def expected(given: dict[str, Any], eps: float = 1e-6) -> tuple[Tensor, ...]:
    *gate, shift, scale = modulation_by_loops(given)[:, :, None].unbind(1)
    x = given["x"] + gate[0] * given["branch"] if gate else given["x"]
    h = F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift
    return (x, h) if gate else (h,)


def outputs(result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"batch": 1, "tokens": 1, "channels": 1, "rewards": 1, "levels": 1},
        {"batch": 2, "tokens": 7, "channels": 123, "rewards": 7, "levels": 64},
        {"rewards": 0},
        {"batch": 0},
        {"tokens": 0},
    ],
)
def test_it_matches_its_formula(draw: Draw, sizes: dict[str, Any], gated: bool) -> None:
    given = arguments(draw, gated=gated, **sizes)

    results = outputs(reward_adaln(**given, eps=1e-5))

    for result, exact in zip(results, expected(given, 1e-5), strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gated", [False, True])
def test_without_rewards_it_equals_adaln(draw: Draw, gated: bool) -> None:
    given = arguments(draw, gated=gated)
    given["keep"] = torch.zeros_like(given["keep"])
    modulation = (given["base"] + given["block"]).unbind(1)

    plain = (
        gated_residual_adaln(given["x"], given["branch"], *modulation)
        if gated
        else adaln(given["x"], *modulation)
    )

    torch.testing.assert_close(reward_adaln(**given), plain)


def test_the_bin_of_a_missing_reward_has_no_effect(draw: Draw) -> None:
    given = arguments(draw, gated=True)
    given["keep"][:, 1] = False
    before = outputs(reward_adaln(**given))
    given["bins"][:, 1] = (given["bins"][:, 1] + 1) % 5

    after = outputs(reward_adaln(**given))

    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    given["bins"][:, 0] = (given["bins"][:, 0] + 1) % 5
    given["keep"][:, 0] = True
    assert not torch.equal(outputs(reward_adaln(**given))[1], after[1])


@pytest.mark.parametrize("bins", [torch.uint8, torch.int32])
@pytest.mark.parametrize("keep", [torch.uint8, torch.float32])
def test_bins_may_have_any_integer_dtype_and_keep_any_numeric_one(
    draw: Draw, bins: torch.dtype, keep: torch.dtype
) -> None:
    given = arguments(draw, gated=False)
    other = given | {"bins": given["bins"].to(bins), "keep": given["keep"].to(keep)}

    assert torch.equal(outputs(reward_adaln(**other))[0], outputs(reward_adaln(**given))[0])


@pytest.mark.parametrize("gated", [False, True])
def test_strided_arguments_give_the_results_of_contiguous_ones(draw: Draw, gated: bool) -> None:
    given = arguments(draw, gated=gated)
    strided: dict[str, Any] = {
        name: torch.stack((value, value), -1)[..., 0] if value.ndim > 1 else value
        for name, value in given.items()
    }
    assert not strided["table"].is_contiguous()

    results, plain = outputs(reward_adaln(**strided)), outputs(reward_adaln(**given))

    torch.testing.assert_close(results, plain)


@pytest.mark.parametrize("gated", [False, True])
def test_bf16_results_are_within_rounding_error(draw: Draw, gated: bool) -> None:
    given = arguments(
        draw, batch=4, tokens=5, channels=96, rewards=7, gated=gated, dtype=torch.bfloat16
    )
    exact_given = {n: z.double() if z.is_floating_point() else z for n, z in given.items()}

    results = outputs(reward_adaln(**given))

    assert all(result.dtype == torch.bfloat16 for result in results)
    added = modulation_by_loops(exact_given | {"base": 0 * exact_given["base"], "block": 0})
    *gate, shift, scale = (2**-8 * added.abs())[:, :, None].unbind(1)
    exact = expected(exact_given)
    if gated:
        # Two roundings to bf16: the sum over rewards, then x′.
        bound = 2**-8 * exact[0].abs() + gate[0] * exact_given["branch"].abs() + 1e-5
        assert ((results[0].double() - exact[0]).abs() <= bound).all()
        # h is the norm of the x′ returned.
        exact_given |= {"x": results[0].double(), "branch": 0 * exact_given["branch"]}
        exact = expected(exact_given)
    normed = F.layer_norm(exact_given["x"], (96,), eps=1e-6)
    bound = 2**-8 * exact[-1].abs() + scale * normed.abs() + shift + 1e-5
    assert ((results[-1].double() - exact[-1]).abs() <= bound).all()


@pytest.mark.parametrize("gated", [False, True])
def test_it_passes_gradcheck(draw: Draw, gated: bool) -> None:
    given = arguments(draw, batch=2, tokens=3, channels=4, levels=3, gated=gated)
    given["keep"] = torch.tensor([[True, False], [True, True]])
    names = [name for name, value in given.items() if value.is_floating_point()]
    assert names == ["x", "base", "block", "table"] + ["branch"] * gated

    def op(*values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        changed: dict[str, Any] = dict(zip(names, values, strict=True))
        return reward_adaln(**given | changed)

    assert torch.autograd.gradcheck(op, [given[name].requires_grad_() for name in names])


def test_only_table_rows_of_present_rewards_get_a_gradient(draw: Draw) -> None:
    given = arguments(draw, batch=2, rewards=2, levels=4, gated=False)
    given["bins"], given["keep"] = torch.tensor([[1, 2], [3, 2]]), torch.tensor([[1, 0], [1, 0]])
    given["table"].requires_grad_()

    outputs(reward_adaln(**given))[0].square().sum().backward()

    nonzero = given["table"].grad.abs().sum((2, 3)) > 0
    assert nonzero.tolist() == [[False, True, False, True], [False] * 4]


@pytest.mark.parametrize("changed", ["base", "block", "table", "bins", "keep", "branch"])
def test_a_wrong_shape_raises_with_the_argument(draw: Draw, changed: str) -> None:
    given = arguments(draw, gated=True)
    good = tuple(given[changed].shape)
    given[changed] = torch.cat((given[changed], given[changed][..., :1]), -1)

    with pytest.raises(ValueError) as error:
        reward_adaln(**given)

    for part in ("reward_adaln", changed, str(good), str(tuple(given[changed].shape))):
        assert part in str(error.value)


def test_a_base_with_a_gate_requires_a_branch(draw: Draw) -> None:
    given = arguments(draw, gated=True)
    del given["branch"]

    with pytest.raises(
        ValueError, match=r"base must be \(B, K, D\) = \(3, 2, 6\), got \(3, 3, 6\)"
    ):
        reward_adaln(**given)
