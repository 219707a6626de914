"""The kernels of reward_adaln, alone and gated, against the reference, with every gradient."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from miro_kernels import reward_adaln, use_backend
from miro_kernels.adaln import reward_adaln_reference
from miro_kernels.adaln.op import adaln_op, gated_op
from miro_kernels.lab import testing

Draw = Callable[..., Tensor]
SIZES = {
    "usual": {},
    "smallest": {"batch": 1, "tokens": 1, "channels": 8, "rewards": 1, "levels": 1},
    "odd": {"batch": 3, "tokens": 67, "channels": 200, "rewards": 7, "levels": 5},
    "more samples than table_kernel sums at once": {"batch": 19, "tokens": 2, "channels": 24},
    "no rewards": {"rewards": 0},
}


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


def arguments(
    draw: Draw, device: str, *, gated: bool, batch: int = 3, tokens: int = 5, channels: int = 24,
    rewards: int = 2, levels: int = 4, dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:  # fmt: skip
    parts = 3 if gated else 2
    generator = torch.Generator().manual_seed(1)
    # As in the model: slices of tensors that all layers share.
    tensors = {
        "x": draw(batch, tokens, channels),
        "base": draw(batch, 2, 3, channels)[:, 1, 3 - parts :],
        "block": draw(3, 3, channels)[1, 3 - parts :],
        "table": draw(rewards, levels, 2, 3, channels)[:, :, 1, 3 - parts :],
    }
    if gated:
        tensors["branch"] = draw(batch, tokens, channels)
    tensors = {name: z.to(device, dtype).requires_grad_() for name, z in tensors.items()}
    return tensors | {
        "bins": torch.randint(levels, (batch, rewards), generator=generator).to(device),
        "keep": (torch.rand(batch, rewards, generator=generator) < 0.6).to(device),
        "eps": 1e-6,
    }


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes_match_the_reference(
    draw: Draw, device: str, sizes: dict[str, Any], gated: bool
) -> None:
    testing.assert_close(
        reward_adaln, reward_adaln_reference, arguments(draw, device, gated=gated, **sizes)
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_matches_the_reference(
    draw: Draw, device: str, dtype: torch.dtype, gated: bool
) -> None:
    given = arguments(draw, device, gated=gated, dtype=dtype, channels=40, batch=9)

    testing.assert_close(reward_adaln, reward_adaln_reference, given)


@pytest.mark.parametrize("bins", [torch.int32, torch.int64])
@pytest.mark.parametrize("keep", [torch.bool, torch.float32, torch.int64])
def test_dtypes_of_bins_and_keep_match_the_reference(
    draw: Draw, device: str, bins: Any, keep: Any
) -> None:
    given = arguments(draw, device, gated=False)
    given |= {"bins": given["bins"].to(bins), "keep": given["keep"].to(keep)}

    testing.assert_close(reward_adaln, reward_adaln_reference, given)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("empty", ["batch", "tokens"])
def test_empty_inputs_give_empty_or_zero_results(
    draw: Draw, device: str, empty: str, gated: bool
) -> None:
    given = arguments(
        draw, device, gated=gated, batch=3 * (empty != "batch"), tokens=5 * (empty != "tokens")
    )

    found = testing.evaluate(reward_adaln, given)

    assert all(not tensor.any() for tensor in found.values())
    assert found["d table"].shape == given["table"].shape


@pytest.mark.parametrize("gated", [False, True])
def test_two_runs_are_bitwise_equal(draw: Draw, device: str, gated: bool) -> None:
    given = arguments(draw, device, gated=gated, tokens=67, batch=5, dtype=torch.bfloat16)

    testing.assert_repeats(reward_adaln, given)


def test_a_bin_out_of_range_makes_its_sample_nan(draw: Draw, device: str) -> None:
    given = arguments(draw, device, gated=False)
    given["keep"] = torch.tensor([[True, True], [False, True], [True, True]], device=device)
    ours: Callable[..., Any] = reward_adaln
    clean = ours(**given)
    given["bins"][1, 0] = 4  # masked by keep, so it has no effect
    assert torch.equal(ours(**given), clean)
    given["bins"][2, 0] = -1

    out = ours(**given)

    assert torch.equal(out[:2], clean[:2]) and out[2].isnan().all()


def test_the_registered_ops_pass_opcheck(draw: Draw, device: str) -> None:
    x, base, *rewards, eps = arguments(draw, device, gated=False).values()
    torch.library.opcheck(adaln_op, (x, [base], rewards, eps))
    given = arguments(draw, device, gated=True)
    x, branch = given.pop("x"), given.pop("branch")
    base, *rewards, eps = given.values()
    torch.library.opcheck(gated_op, (x, branch, [base], rewards, eps))
