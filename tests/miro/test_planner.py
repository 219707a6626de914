"""The plan: the fastest that fits, of what the configuration leaves open."""

from __future__ import annotations

import operator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from miro.cli.main import main
from miro.training.batch_plan import ShardingConfig
from miro.training.memory import USABLE
from miro.training.planner import Cluster, Problem, candidates, choose_plan
from miro.training.presets import preset


def problem(name: str, gpus: int, gigabytes: float = 80, **sharding: Any) -> Problem:
    config = replace(preset(name), sharding=ShardingConfig(**sharding))
    return Problem(config, Cluster(gpus, gigabytes * 1e9))


@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("gpus", [1, 8, 16, 64])
def test_each_preset_has_a_plan_that_fits_on_gpus_of_80_gb(name: str, gpus: int) -> None:
    given = problem(name, gpus)
    plan, table = choose_plan(given)

    (chosen,) = [c for c in candidates(given) if c.plan == plan]
    assert plan.batch == given.config.batch and plan.world == gpus
    assert chosen.memory.total <= USABLE * 80e9 and not chosen.problem
    assert table.count("chosen") == 1


@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_no_possible_plan_is_faster_than_the_chosen_one(name: str, gpus: int) -> None:
    given = problem(name, gpus)
    plan, _ = choose_plan(given)

    possible = {c.plan: c.seconds for c in candidates(given) if not c.problem}
    assert possible[plan] == min(possible.values())


def test_less_memory_takes_smaller_micro_batches_then_sharding_and_checkpointing() -> None:
    plans = [choose_plan(problem("large", 8, gigabytes))[0] for gigabytes in (300, 80, 40, 24)]
    sizes = [
        next(c.memory.total for c in candidates(problem("large", 8)) if c.plan == plan)
        for plan in plans
    ]

    assert (plans[0].stage, plans[0].accumulation) == (0, 1)
    assert plans[1].accumulation > 1 and plans[-1].stage == 2
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    "given",
    [
        {"stage": "2"},
        {"micro_batch": 4},
        {"activation_checkpointing": True},
        {"stage": "2", "micro_batch": 4, "activation_checkpointing": False},
        {"offload": "optimizer"},
    ],
)
def test_what_is_configured_is_kept(given: dict[str, Any]) -> None:
    plan, _ = choose_plan(problem("small", 8, **given))
    for name, value in given.items():
        assert str(getattr(plan, name)) == str(value)
    if "offload" in given:
        assert plan.stage >= 1


def test_a_wholly_configured_plan_is_kept_though_the_estimate_says_it_does_not_fit() -> None:
    given = {"stage": "0", "micro_batch": 1024, "activation_checkpointing": False}
    plan, table = choose_plan(problem("small", 1, **given))

    assert plan.micro_batch == 1024 and "chosen" in table


def test_muon_is_not_sharded_and_one_rank_is_not() -> None:
    config = replace(preset("small").optimizer, name="muon")
    given = problem("small", 16, 40)
    given = replace(given, config=replace(given.config, optimizer=config))

    assert choose_plan(given)[0].stage == 0
    assert {c.plan.stage for c in candidates(problem("large", 1))} == {0}


def test_without_a_plan_the_error_has_the_table_and_the_smallest_cluster_that_works() -> None:
    with pytest.raises(ValueError, match=r"no plan fits(.|\n)*does not fit(.|\n)*On \d+ GPUs"):
        choose_plan(problem("large", 8, 10))
    with pytest.raises(ValueError, match=r"sharding.offload=optimizer or parameters"):
        choose_plan(problem("large", 8, 2))


@pytest.mark.parametrize(
    ("gpus", "sharding", "message"),
    [
        (12, {}, "batch=1024 does not divide among 12 processes; the next batch that does is 1032"),
        (512, {"micro_batch": 3}, r"no multiple of sharding.micro_batch=3 .* possible are 1, 2"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_those_that_do(
    gpus: int, sharding: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_plan(problem("small", gpus, **sharding))


def test_the_plan_of_a_cluster_is_printed_and_nothing_is_trained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["train", "small", "--plan", "8x80"])
    printed = capsys.readouterr().out
    assert "plan of batch 1,024 on 8 ranks" in printed and "chosen" in printed

    with pytest.raises(SystemExit):
        main(["train", "small", "--plan", "eight"])
    assert "give GPUSxGB, such as 8x80" in capsys.readouterr().err


def test_the_plan_follows_the_shapes_of_the_data(
    training: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", "demo", "--plan", "2x4", "--data", str(training.data)])
    small = capsys.readouterr().out
    main(["train", "demo", "--plan", "2x4"])

    assert small != capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "key", "expected"),
    [
        (["ema_weights_at=1280,2560"], "ema_weights_at", (1280, 2560)),
        (["--ema-weights-at=1280,2560"], "ema_weights_at", (1280, 2560)),
        (["--ema-weights-at", "1280", "2560"], "ema_weights_at", (1280, 2560)),
        (["conditioning.rewards="], "conditioning.rewards", ()),
        (["conditioning.rewards=a,b"], "conditioning.rewards", ("a", "b")),
        (["--conditioning.rewards", "a", "b"], "conditioning.rewards", ("a", "b")),
        (["data=a,b"], "data", Path("a,b")),
        (["compile=False"], "compile", False),
        (["--compile", "False"], "compile", False),
    ],
)
def test_an_option_may_be_written_in_each_form(
    words: list[str], key: str, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr("miro.cli.train._plan", lambda config, cluster: found.append(config))
    main(["train", "demo", "--plan", "1x8", *words])

    assert operator.attrgetter(key)(found[0]) == expected


def test_all_numbers_that_are_no_multiple_of_the_batch_are_named_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["train", "demo", "--plan", "1x8", "batch=48"])
    message = capsys.readouterr().err
    assert "images=131200 (nearest: 131184)" in message
    assert "report_every=1280 (nearest: 1296)" in message
    assert "checkpoint_every=12800 (nearest: 12816)" in message


def test_a_run_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "demo"])
    assert "--run DIR" in capsys.readouterr().err
