"""Sampling: guidance, targets, best of N, and invalid input to a pipeline."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from miro.conditioning import ConditioningConfig, RewardTarget
from miro.flow import FlowConfig, euler_timesteps, velocity
from miro.model.packed_text import PackedText, empty_text, pack
from miro.model.transformer import FlowTransformer, ModelConfig, RewardCond
from miro.prepare.encode import EncodeConfig, encode
from miro.sampling.pipeline import Pipeline, to_bytes
from miro.sampling.sampler import Guidance, best_of, draw_noise, sample
from miro.training import checkpoint
from miro.training.batch_plan import Precision
from miro.training.checkpoint import CheckpointError, RunFolder
from miro.training.config import TrainConfig
from miro.training.loop import train
from miro.training.optimizer import OptimizerConfig

SHAPE, TEXT = (2, 4, 4), 6
FLOW = FlowConfig(prediction_type="sample")
HIGH, LOW = RewardTarget((1.0, 0.75, None)), RewardTarget((0.0, 0.75, 0.5))


@pytest.fixture(scope="module")
def model() -> FlowTransformer:
    """A network for three rewards, no weight zero."""
    torch.manual_seed(0)
    model = FlowTransformer(ModelConfig(16, 2, 2, 24, 2), SHAPE, TEXT, rewards=3)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.2 * torch.randn(param.shape)
    return model.requires_grad_(False)


@pytest.fixture
def text(draw: Callable[..., Tensor]) -> PackedText:
    return pack([draw(length, TEXT, dtype=torch.float32) for length in (3, 0, 2)])


NOISE = draw_noise(SHAPE, seed=0, numbers=range(3))


def reward_cond(target: RewardTarget, batch: int = 3) -> RewardCond:
    """The target as the network's input, with a table of one level per reward."""
    keep = torch.tensor([[level is not None for level in target.levels]] * batch)
    levels = torch.tensor([0.0 if level is None else level for level in target.levels])
    return RewardCond(levels, torch.arange(len(levels)).expand(batch, -1), keep)


def reference_sample(
    model: FlowTransformer, text: PackedText, guidance: Guidance, steps: int
) -> Tensor:
    """Equation 3 plus text guidance, one network call per branch."""
    x, times = NOISE, euler_timesteps(steps)
    context, null = model.encode_context(text), model.encode_context(empty_text(3, TEXT))
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        now = t.expand(3)

        def v(target: RewardTarget, context: tuple, x: Tensor = x, now: Tensor = now) -> Tensor:
            return velocity(FLOW, model(x, now, reward_cond(target), context), x, now)

        positive = v(guidance.positive, context)
        guided = positive
        if guidance.negative is not None:
            guided = guided + guidance.reward_scale * (positive - v(guidance.negative, context))
        guided = guided + guidance.text_scale * (positive - v(guidance.positive, null))
        x = x + (t_next - t) * guided
    return x


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(HIGH),
        Guidance(HIGH, LOW, reward_scale=3.0),
        Guidance(HIGH, text_scale=1.5),
        Guidance(HIGH, LOW, reward_scale=3.0, text_scale=1.5),
        Guidance(HIGH, LOW, reward_scale=-0.5),
        Guidance(RewardTarget((None, None, None)), text_scale=2.0),
    ],
    ids=["none", "rewards", "text", "both", "negative scale", "no reward"],
)
def test_guidance_matches_its_formula(
    model: FlowTransformer, text: PackedText, guidance: Guidance
) -> None:
    out = sample(model, FLOW, text, guidance, NOISE, steps=3)

    torch.testing.assert_close(
        out, reference_sample(model, text, guidance, 3), rtol=1e-3, atol=1e-3
    )


def test_each_part_of_guidance_changes_the_image(model: FlowTransformer, text: PackedText) -> None:
    variants = [
        Guidance(HIGH), Guidance(LOW), Guidance(HIGH, LOW, 2.0), Guidance(HIGH, text_scale=2.0),
        Guidance(RewardTarget((None,) * 3)),
    ]  # fmt: skip
    outs = [sample(model, FLOW, text, guidance, NOISE, steps=2) for guidance in variants]

    for first in range(len(outs)):
        for second in range(first):
            assert (outs[first] - outs[second]).abs().max() > 1e-2
    # The second prompt is empty, so text guidance does nothing.
    torch.testing.assert_close(outs[3][1], outs[0][1], rtol=1e-3, atol=1e-3)


def test_a_compiled_network_gives_the_same_samples(
    model: FlowTransformer, text: PackedText
) -> None:
    guidance = Guidance(HIGH, LOW, reward_scale=2.0)
    compiled = torch.compile(model, backend="eager")

    out = sample(model, FLOW, text, guidance, NOISE, steps=3, network=compiled)

    torch.testing.assert_close(out, sample(model, FLOW, text, guidance, NOISE, steps=3))


def test_a_reward_scale_of_zero_skips_the_negative_branch(
    model: FlowTransformer, text: PackedText
) -> None:
    calls: list[int] = []

    def counted(x: Tensor, *rest: object) -> Tensor:
        calls.append(len(x))
        return model(x, *rest)

    without = sample(model, FLOW, text, Guidance(HIGH), NOISE, steps=2, network=counted)
    zero = sample(model, FLOW, text, Guidance(HIGH, LOW, 0.0), NOISE, steps=2, network=counted)

    assert torch.equal(without, zero) and calls == [3] * 4


def test_a_level_of_none_masks_the_reward(model: FlowTransformer, text: PackedText) -> None:
    masked = RewardTarget((None, None, None))
    x, t = NOISE, torch.ones(3)

    out = sample(model, FLOW, text, Guidance(masked), NOISE, steps=1)

    expected = model(x, t, reward_cond(masked), model.encode_context(text))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_an_exact_network_samples_the_data(
    model: FlowTransformer, text: PackedText, draw: Callable[..., Tensor], steps: int
) -> None:
    data = draw(3, *SHAPE, dtype=torch.float32).clamp(-1, 1)
    calls: list[float] = []

    def exact(x: Tensor, t: Tensor, *_: object) -> Tensor:
        calls.append(float(t[0]))
        return data

    for clip_range in (None, 1.0):
        out = sample(
            model,
            FLOW,
            text,
            Guidance(HIGH),
            NOISE,
            steps=steps,
            clip_range=clip_range,
            network=exact,
        )
        torch.testing.assert_close(out, data, rtol=1e-5, atol=1e-5)
    assert calls[:steps] == pytest.approx([1 - n / steps for n in range(steps)])


def test_clip_range_bounds_the_image(model: FlowTransformer, text: PackedText) -> None:
    guidance = Guidance(HIGH, LOW, 30.0)

    unclipped = sample(model, FLOW, text, guidance, NOISE, steps=3)
    clipped = sample(model, FLOW, text, guidance, NOISE, steps=3, clip_range=1.0)

    assert unclipped.abs().max() > 1 and clipped.abs().max() <= 1


def test_a_model_without_rewards_can_be_sampled(text: PackedText) -> None:
    bare = FlowTransformer(ModelConfig(16, 1, 2, 24, 2), SHAPE, TEXT, rewards=0)

    out = sample(bare, FLOW, text, Guidance(RewardTarget(()), text_scale=1.0), NOISE, steps=2)

    assert out.shape == NOISE.shape


def test_invalid_arguments_are_rejected(model: FlowTransformer, text: PackedText) -> None:
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        sample(model, FLOW, text, Guidance(HIGH), NOISE, steps=0)
    with pytest.raises(ValueError, match="3 texts for a batch of 2 noises"):
        sample(model, FLOW, text, Guidance(HIGH), NOISE[:2])
    with pytest.raises(ValueError, match=r"scale 2\.0 needs a negative target"):
        Guidance(HIGH, reward_scale=2.0)


def test_noise_depends_on_seed_and_number_alone() -> None:
    noise = draw_noise((3, 8, 8), seed=4, numbers=[7, 2, 7])

    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1], draw_noise((3, 8, 8), 4, [2])[0])
    assert not torch.equal(noise[1], draw_noise((3, 8, 8), 5, [2])[0])
    many = draw_noise((3, 32, 32), 0, range(20))
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


def test_best_of_chooses_the_highest_score_of_each_prompt() -> None:
    nan = float("nan")
    scores = torch.tensor([0.1, 0.9, 0.3, -5.0, nan, -7.0, nan, nan, -torch.inf])

    assert best_of(scores, 3)[:2].tolist() == [1, 3]
    assert best_of(scores, 1).tolist() == list(range(9))
    assert best_of(torch.tensor([nan, -1e30]), 2).tolist() == [1]


def test_to_bytes_rounds() -> None:
    values = torch.arange(256, dtype=torch.float32) / 255

    assert torch.equal(to_bytes(values), torch.arange(256).byte())


PROMPTS = ["a red frog", "two cats", "a red frog", ""]
TRAINING = TrainConfig(
    model=ModelConfig(channels=32, depth=1, heads=2, hidden=32, patch=8),
    images=64,
    batch=8,
    flow=FLOW,
    optimizer=OptimizerConfig(learning_rate=1e-2),
    threads=1,
    report_every=8,
    checkpoint_every=64,
    ema_weights_at=(32,),
)


@pytest.fixture(scope="module")
def runs(encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """runs(precision, rewards): the folder of a short run, trained once per module."""
    folders: dict[tuple, Path] = {}

    def run(precision: Precision = "fp32", rewards: tuple[str, ...] | None = None) -> Path:
        if (precision, rewards) not in folders:
            folder = folders[precision, rewards] = tmp_path_factory.mktemp("run")
            conditioning = ConditioningConfig(rewards=rewards, drop_all=0.0)
            config = replace(TRAINING, data=encoded, precision=precision, conditioning=conditioning)
            train(config, folder)
        return folders[precision, rewards]

    return run


def test_a_run_loads_its_newest_weights_and_a_weights_folder_its_own(
    runs: Callable[..., Path],
) -> None:
    run = RunFolder(runs())

    newest, early = Pipeline.load(run.root), Pipeline.load(run.weights_at(32))

    assert (newest.images, early.images) == (64, 32)
    weights, _ = checkpoint.load(run.weights_at(64))
    state = newest.model.state_dict()
    assert state.keys() == weights.keys() and all(torch.equal(state[n], weights[n]) for n in state)
    assert newest.rewards == ("colourfulness", "sharpness")
    assert not any(param.requires_grad for param in newest.model.parameters())


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_an_image_depends_on_its_prompt_seed_and_number_alone(
    runs: Callable[..., Path], precision: str, tolerance: float
) -> None:
    pipeline = Pipeline.load(runs(precision))
    guidance = Guidance(pipeline.target(), pipeline.target(default=0.0), 2.0, 1.0)

    together = pipeline(PROMPTS, guidance, seed=1, numbers=[4, 5, 6, 7], steps=4)

    assert together.shape == (4, 3, 32, 32) and together.dtype == torch.float32
    assert 0 <= together.min() and together.max() <= 1 and together.std() > 0.05
    # Another order and another batch size.
    reordered = pipeline(PROMPTS[::-1], guidance, seed=1, numbers=[7, 6, 5, 4], steps=4, batch=3)
    torch.testing.assert_close(reordered.flip(0), together, rtol=0, atol=tolerance)
    alone = pipeline([PROMPTS[1]], guidance, seed=1, numbers=[5], steps=4)
    torch.testing.assert_close(alone[0], together[1], rtol=0, atol=tolerance)
    other = pipeline([PROMPTS[1]], guidance, seed=2, numbers=[5], steps=4)
    assert (other[0] - together[1]).abs().max() > 2 * tolerance


def test_targets_change_the_image(runs: Callable[..., Path]) -> None:
    pipeline = Pipeline.load(runs())

    def image(target: RewardTarget) -> Tensor:
        return pipeline(["a red frog"], Guidance(target), steps=3)

    high, low = image(pipeline.target()), image(pipeline.target(default=0.0))
    masked = image(pipeline.target({"colourfulness": None, "sharpness": None}))
    assert (high - low).abs().max() > 1e-3 and (high - masked).abs().max() > 1e-3


def test_a_target_covers_the_rewards_the_run_is_conditioned_on(runs: Callable[..., Path]) -> None:
    assert Pipeline.load(runs()).target({"sharpness": 0.25}).levels == (1.0, 0.25)
    specialist = Pipeline.load(runs(rewards=("sharpness",)))
    assert specialist.target().levels == (None, 1.0)
    assert specialist.target(default=None).levels == (None, None)
    assert Pipeline.load(runs(rewards=())).target().levels == (None, None)


@pytest.mark.parametrize(
    ("rewards", "levels", "words"),
    [
        (None, {"sharpnes": 1.0}, "'sharpnes'.*did you mean 'sharpness'.*colourfulness"),
        (None, {"sharpness": 1.5}, "target of sharpness must be from 0.*to 1.*got 1.5"),
        (("sharpness",), {"colourfulness": 1.0}, "'colourfulness'.*Known: sharpness"),
    ],
)
def test_an_invalid_target_is_rejected(
    runs: Callable[..., Path], rewards: tuple[str, ...] | None, levels: dict, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Pipeline.load(runs(rewards=rewards)).target(levels)


def test_a_prompt_that_is_too_long_is_truncated_with_a_warning(
    runs: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    pipeline, long = Pipeline.load(runs()), "a red frog beside a blue fish " * 60

    text = pipeline.encode_prompts(["two cats", long])

    assert text.lengths.tolist()[1] == 256 and "two cats" not in caplog.text
    assert "a red frog beside" in caplog.text and "256 tokens" in caplog.text
    caplog.clear()
    pipeline.encode_prompts([long, long])
    assert caplog.text == "", "one warning per prompt"


def test_prompts_are_truncated_to_the_length_of_the_training_captions(
    encoded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encode(encoded.parent / "scored", tmp_path / "short", config=EncodeConfig(max_tokens=5))
    config = replace(
        TRAINING, data=tmp_path / "short", images=8, checkpoint_every=8, ema_weights_at=()
    )
    train(config, tmp_path / "run")

    text = Pipeline.load(tmp_path / "run").encode_prompts(["a red frog beside a blue fish"])

    assert text.lengths.tolist() == [5] and "5 tokens" in caplog.text


def test_an_empty_prompt_has_no_tokens(runs: Callable[..., Path]) -> None:
    assert Pipeline.load(runs()).encode_prompts(["", "two cats"]).lengths.tolist()[0] == 0


def test_damaged_weights_are_named(runs: Callable[..., Path], tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(runs(), run.root)
    tensors = run.weights_at(64) / checkpoint.TENSORS
    data = bytearray(tensors.read_bytes())
    data[len(data) // 2] ^= 1
    tensors.write_bytes(bytes(data))

    with pytest.raises(CheckpointError, match=f"{tensors} is damaged"):
        Pipeline.load(run.root)


def test_weights_that_do_not_match_their_configuration_are_rejected(
    runs: Callable[..., Path], tmp_path: Path
) -> None:
    tensors, state = checkpoint.load(RunFolder(runs()).weights_at(64))
    state = json.loads(json.dumps(state))
    state["config"]["model"]["hidden"] = 64
    checkpoint.save(tmp_path / "weights", tensors, state)

    with pytest.raises(CheckpointError, match=f"{tmp_path / 'weights'}: the weights do not match"):
        Pipeline.load(tmp_path / "weights")


def test_a_folder_without_weights_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a weights folder nor a run"):
        Pipeline.load(tmp_path)
