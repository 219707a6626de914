"""The flow transformer: what its output depends on, and what it must be invariant to."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from miro.model.embeddings import TextEmbedding, pos_embed_2d_sincos, rope_angles
from miro.model.packed_text import PackedText, empty_text, pack
from miro.model.transformer import FlowTransformer, ModelConfig, RewardCond
from miro_kernels import qk_norm_rope

CONFIG = ModelConfig(channels=32, depth=2, heads=2, hidden=40, patch=2)
SHAPE, TEXT, REWARDS, LEVELS = (3, 6, 8), 5, 3, 9
LENGTHS = (4, 0, 2)


def build(config: ModelConfig = CONFIG, rewards: int = REWARDS) -> FlowTransformer:
    torch.manual_seed(0)
    return FlowTransformer(config, SHAPE, TEXT, rewards)


@pytest.fixture
def trained() -> FlowTransformer:
    """A network whose parameters are all away from their initial values."""
    model = build()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.2 * torch.randn(param.shape, generator=generator)
    return model.requires_grad_(False)


class Inputs:
    """A batch of three; the second sample has no text."""

    def __init__(self, draw: Callable[..., Tensor]) -> None:
        def numbers(*shape: int) -> Tensor:
            return draw(*shape, dtype=torch.float32)

        self.x, self.t = numbers(3, *SHAPE), torch.tensor([0.1, 0.5, 0.9])
        self.texts = [numbers(length, TEXT) for length in LENGTHS]
        self.bins = torch.tensor([[0, 4, 8], [3, 3, 3], [8, 0, 5]])
        self.keep = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1]]).bool()

    def rewards(self) -> RewardCond:
        return RewardCond(torch.linspace(0, 1, LEVELS), self.bins, self.keep)

    def __call__(self, model: FlowTransformer) -> Tensor:
        return model(self.x, self.t, self.rewards(), model.encode_context(pack(self.texts)))


@pytest.fixture
def inputs(draw: Callable[..., Tensor]) -> Inputs:
    return Inputs(draw)


def test_an_untrained_network_predicts_zero(inputs: Inputs) -> None:
    out = inputs(build())

    assert out.shape == (3, *SHAPE) and out.dtype == torch.float32
    assert torch.equal(out, torch.zeros_like(out))


def test_an_untrained_networks_tokens_ignore_rewards_and_text(inputs: Inputs) -> None:
    model = build()
    with torch.no_grad():
        model.out.weight.normal_()
    before = inputs(model)
    inputs.bins, inputs.texts = (inputs.bins + 1) % LEVELS, [t + 1 for t in inputs.texts]

    assert before.abs().max() > 0.1
    # Gates are initialized to zero, so no branch, and thus no text, reaches the output.
    assert torch.equal(inputs(model), before)


@pytest.mark.parametrize("change", ["x", "t", "a token", "token order", "bins", "keep"])
def test_a_trained_network_depends_on_every_input(
    trained: FlowTransformer, inputs: Inputs, change: str
) -> None:
    before = inputs(trained)
    match change:
        case "x":
            inputs.x[0, 0, 0, 0] += 1
        case "t":
            inputs.t[0] += 0.2
        case "a token":
            inputs.texts[0][1] += 1
        case "token order":
            inputs.texts[0] = inputs.texts[0].flip(0)
        case "bins":
            inputs.bins[0, 1] = 7
        case "keep":
            inputs.keep[0, 1] = False

    after = inputs(trained)

    assert (after[0] - before[0]).abs().max() > 1e-3
    torch.testing.assert_close(
        after[1:], before[1:], msg="other samples of the batch must not change"
    )


def test_the_bin_of_a_masked_reward_has_no_effect(trained: FlowTransformer, inputs: Inputs) -> None:
    before = inputs(trained)
    inputs.bins[~inputs.keep] = 6

    assert torch.equal(inputs(trained), before)


def test_each_reward_has_its_own_effect(trained: FlowTransformer, inputs: Inputs) -> None:
    inputs.bins[:] = 5
    outs = []
    for reward in range(REWARDS):
        inputs.keep[:] = False
        inputs.keep[:, reward] = True
        outs.append(inputs(trained))

    assert (outs[0] - outs[1]).abs().max() > 1e-3 and (outs[1] - outs[2]).abs().max() > 1e-3


def test_the_output_of_a_sample_does_not_depend_on_its_batch(
    trained: FlowTransformer, inputs: Inputs
) -> None:
    together = inputs(trained)

    for n in range(3):
        rewards = RewardCond(
            inputs.rewards().levels, inputs.bins[n : n + 1], inputs.keep[n : n + 1]
        )
        text = trained.encode_context(pack(inputs.texts[n : n + 1]))
        alone = trained(inputs.x[n : n + 1], inputs.t[n : n + 1], rewards, text)
        torch.testing.assert_close(alone[0], together[n], rtol=1e-4, atol=1e-5)


def test_a_nan_in_one_samples_text_stays_in_that_sample(
    trained: FlowTransformer, inputs: Inputs
) -> None:
    before = inputs(trained)
    inputs.texts[0][2] = torch.nan

    after = inputs(trained)

    assert after[0].isnan().all() and torch.equal(after[1:], before[1:])


def test_empty_texts_need_no_tokens(trained: FlowTransformer, inputs: Inputs) -> None:
    rewards, empty = inputs.rewards(), empty_text(3, TEXT)
    longer = PackedText(empty.states, empty.offsets, longest=7)  # any upper bound is valid
    mixed = pack([torch.zeros(0, TEXT)] * 3 + [torch.ones(2, TEXT)])

    out = trained(inputs.x, inputs.t, rewards, trained.encode_context(empty))

    bounded = trained(inputs.x, inputs.t, rewards, trained.encode_context(longer))
    torch.testing.assert_close(bounded, out)
    four = RewardCond(rewards.levels, inputs.bins[[0, 1, 2, 0]], inputs.keep[[0, 1, 2, 0]])
    with_another = trained(
        inputs.x[[0, 1, 2, 0]], inputs.t[[0, 1, 2, 0]], four, trained.encode_context(mixed)
    )
    torch.testing.assert_close(with_another[:3], out, rtol=1e-4, atol=1e-5)
    assert (with_another[3] - out[0]).abs().max() > 1e-3


def test_the_null_summary_is_that_of_an_empty_text(
    trained: FlowTransformer, inputs: Inputs
) -> None:
    context = trained.encode_context(pack(inputs.texts))

    torch.testing.assert_close(context.summary[1], context.null_summary[0])
    assert (context.summary[0] - context.null_summary[0]).abs().max() > 1e-3


def test_the_output_depends_on_levels_and_not_on_their_indices(
    trained: FlowTransformer, inputs: Inputs
) -> None:
    before = inputs(trained)
    text = trained.encode_context(pack(inputs.texts))
    # Only the levels that occur, in another order, as a sampler passes them.
    levels, bins = torch.unique(inputs.rewards().levels[inputs.bins], return_inverse=True)
    flipped = RewardCond(levels.flip(0), len(levels) - 1 - bins, inputs.keep)

    after = trained(inputs.x, inputs.t, flipped, text)

    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_a_network_without_rewards(inputs: Inputs) -> None:
    model = build(rewards=0)
    no_rewards = RewardCond(torch.tensor([0.0]), torch.zeros(3, 0).long(), torch.zeros(3, 0).bool())

    out = model(inputs.x, inputs.t, no_rewards, model.encode_context(pack(inputs.texts)))

    assert out.shape == (3, *SHAPE)
    (out + 1).square().sum().backward()


def test_every_parameter_gets_a_gradient(inputs: Inputs) -> None:
    model = build()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.2 * torch.randn(param.shape, generator=generator)

    names, params = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(inputs(model).square().sum(), params)

    found = dict(zip(names, grads, strict=True))
    assert [name for name, grad in found.items() if not grad.abs().sum()] == []
    # Gate, shift and scale of both sets, from time, text and each reward, and the offset of every
    # adaLN; but the first adaLN follows no branch, so its gate is unused.
    shared = found["shared.weight"].unflatten(0, (2, 3, -1)).abs().sum((2, 3))
    table = found["table.out"].unflatten(-1, (2, 3, -1)).abs().sum((1, 4))
    offsets = found["offsets"].abs().sum(-1)
    assert (shared > 0).all() and (table > 0).all()
    assert (offsets > 0).flatten().tolist() == [False] + [True] * (offsets.numel() - 1)


def test_equal_patches_differ_by_position(trained: FlowTransformer, inputs: Inputs) -> None:
    inputs.x[:] = 0.5

    tokens = trained._patchify(inputs(trained))

    # The sample without text: RoPE alone gives equal patches equal outputs.
    assert torch.pdist(tokens[1]).min() > 1e-3


def test_bf16_stays_close_to_fp32(trained: FlowTransformer, inputs: Inputs) -> None:
    exact = inputs(trained)

    out = inputs(trained.bfloat16())

    assert out.dtype == torch.float32
    error = (out - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.05


def test_an_empty_batch(trained: FlowTransformer) -> None:
    rewards = RewardCond(torch.tensor([0.5]), torch.zeros(0, 3).long(), torch.zeros(0, 3).bool())

    out = trained(
        torch.zeros(0, *SHAPE), torch.zeros(0), rewards, trained.encode_context(empty_text(0, 5))
    )

    assert out.shape == (0, *SHAPE)


def test_unpatchify_inverts_patchify(draw: Callable[..., Tensor]) -> None:
    model, x = build(), draw(2, *SHAPE)

    tokens = model._patchify(x)

    assert tokens.shape == (2, 12, 12)
    # Token 5 is row 1, column 1 of a 3 x 4 grid.
    assert torch.equal(tokens[0, 5], x[0, :, 2:4, 2:4].flatten())
    assert torch.equal(model._unpatchify(tokens, *x.shape[2:]), x)


def test_position_embeddings_are_distinct_and_of_unit_variance() -> None:
    pos_embed = pos_embed_2d_sincos(3, 5, 32)

    assert pos_embed.shape == (15, 32)
    torch.testing.assert_close(pos_embed.square().mean(1), torch.ones(15))
    assert torch.pdist(pos_embed).min() > 0.5


def test_rope_scores_depend_on_relative_position_alone(
    draw: Callable[..., Tensor],
) -> None:
    cos, sin = (angle.double() for angle in rope_angles(4, 5, 16))
    ones, q, k = torch.ones(16).double(), draw(16), draw(16)
    q, k = q.expand(1, 20, 1, 16), k.expand(1, 20, 1, 16)

    rotated_q, rotated_k = qk_norm_rope(q, k, ones, ones, cos, sin)
    scores = torch.einsum("nd,md->nm", rotated_q[0, :, 0], rotated_k[0, :, 0])

    grid = scores.reshape(4, 5, 4, 5)
    torch.testing.assert_close(grid[0, 0, 1, 2], grid[2, 1, 3, 3], rtol=1e-5, atol=1e-5)
    assert (grid[0, 0, 1, 2] - grid[0, 0, 2, 1]).abs() > 1e-3, "rows and columns differ"


def text_embedding(depth: int) -> TextEmbedding:
    """Random weights, those of the norms included."""
    torch.manual_seed(0)
    embedding = TextEmbedding(TEXT, 32, depth, heads=2, hidden=24)
    for param in embedding.blocks.parameters():
        torch.nn.init.normal_(param, 1.0 if param.ndim == 1 else 0.0, 0.3)
    return embedding


def test_tokens_attend_within_their_own_text(inputs: Inputs) -> None:
    embedding, text = text_embedding(depth=2), pack(inputs.texts)
    changed = text.states.clone()
    changed[0] += 1

    tokens, _ = embedding(text)
    change = embedding(PackedText(changed, text.offsets, text.longest))[0] - tokens

    own = len(inputs.texts[0])
    assert (change[:own].abs().amax(1) > 1e-3).all(), "each token of the changed text"
    torch.testing.assert_close(change[own:], torch.zeros_like(change[own:]), rtol=0, atol=1e-5)


def test_the_padding_of_an_empty_text_gives_no_nan_gradient(inputs: Inputs) -> None:
    embedding = text_embedding(depth=1)

    tokens, _ = embedding(pack(inputs.texts))
    tokens.square().sum().backward()

    assert 0 in [len(text) for text in inputs.texts]
    assert all(p.grad.isfinite().all() for p in embedding.blocks.parameters() if p.grad is not None)


@pytest.mark.parametrize("depth", [0, 2])
def test_a_text_is_embedded_independently_of_its_batch(inputs: Inputs, depth: int) -> None:
    embedding = text_embedding(depth)

    tokens, summary = embedding(pack(inputs.texts))

    start = 0
    for n, text in enumerate(inputs.texts):
        own, alone = embedding(pack([text]))
        torch.testing.assert_close(tokens[start : start + len(text)], own, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(summary[n], alone[0], rtol=1e-4, atol=1e-5)
        start += len(text)
    null_summary = embedding.summary(torch.zeros(TEXT))
    torch.testing.assert_close(summary[1], null_summary, rtol=1e-4, atol=1e-5)
    # The same token differs at another position.
    twice, _ = embedding(pack([inputs.texts[0][:1].repeat(2, 1)]))
    assert (twice[0] - twice[1]).abs().max() > 0.1


def test_the_network_is_the_same_for_the_same_seed() -> None:
    first, again = build().state_dict(), build().state_dict()

    assert all(torch.equal(first[name], again[name]) for name in first)


def test_position_embeddings_are_not_in_the_state_dict() -> None:
    assert {"pos_embed", "cos", "sin"}.isdisjoint(build().state_dict())


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"heads": 3}, "channels=32.*heads=3"),
        ({"heads": 16}, "channels=32.*heads=16.*divisible by 4"),
        ({"heads": 0}, "model.heads must be at least 1, got 0"),
        ({"channels": 0}, "model.channels must be at least 1, got 0"),
        ({"depth": 0}, "model.depth must be at least 1, got 0"),
        ({"hidden": -4}, "model.hidden must be at least 1, got -4"),
        ({"patch": 0}, "model.patch must be at least 1, got 0"),
        ({"text_depth": -1}, "model.text_depth must be at least 0, got -1"),
    ],
)
def test_invalid_sizes_are_named_in_the_error(bad: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(CONFIG, **bad)


def test_a_patch_that_does_not_divide_the_latents_is_rejected() -> None:
    with pytest.raises(ValueError, match="patch=4 does not divide latents of 6x8"):
        build(replace(CONFIG, patch=4))
