"""Configurations to and from JSON, and refused records."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from miro.conditioning import ConditioningConfig
from miro.training.config import TrainConfig
from miro.training.presets import PRESETS, demo, preset
from miro.utils.serialize import differences, from_dict, to_dict, unknown_name


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_unchanged_by_json(name: str) -> None:
    config = replace(
        preset(name),
        data=Path("some/data"),
        conditioning=ConditioningConfig(rewards=("clip", "vqa")),
        ema_weights_at=(preset(name).batch,),
    )

    again = from_dict(TrainConfig, json.loads(json.dumps(to_dict(config))))

    assert again == config


def test_an_absent_key_has_its_default() -> None:
    config = from_dict(TrainConfig, {"model": to_dict(demo().model), "seed": 5})

    assert config == TrainConfig(model=demo().model, seed=5)


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    law: Literal["sine", "square"] = "sine"


@dataclass(frozen=True)
class Outer:
    size: int
    inner: Inner = field(default_factory=Inner)


def test_an_unknown_key_is_refused_and_the_nearest_suggested() -> None:
    with pytest.raises(ValueError, match="'inner.rat'.*did you mean 'inner.rate'.*inner.law"):
        from_dict(Outer, {"size": 1, "inner": {"rat": 1.0}})
    with pytest.raises(ValueError, match="'sizes'.*did you mean 'size'"):
        from_dict(Outer, {"sizes": 1})


def test_an_invalid_choice_is_refused_and_the_nearest_suggested() -> None:
    with pytest.raises(ValueError, match="value of inner.law 'sin'; did you mean 'sine'"):
        from_dict(Outer, {"size": 1, "inner": {"law": "sin"}})


def test_a_record_without_a_required_key_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks size"):
        from_dict(Outer, {})
    with pytest.raises(ValueError, match="lacks model.channels"):
        from_dict(TrainConfig, {"model": {}})


def test_values_are_validated_when_loaded() -> None:
    record = to_dict(demo())
    record["optimizer"]["learning_rate"] = -1.0

    with pytest.raises(ValueError, match=r"optimizer\.learning_rate.*-1\.0"):
        from_dict(TrainConfig, record)


def test_differences_name_each_key_with_both_values() -> None:
    ours = to_dict(demo())
    theirs = to_dict(replace(demo(), seed=3, conditioning=ConditioningConfig(drop_all=0.5)))

    assert differences(ours, ours) == []
    assert differences(ours, theirs) == [
        "conditioning.drop_all: 0.1 here, 0.5 there",
        "seed: 0 here, 3 there",
    ]


@pytest.mark.parametrize(
    ("ours", "theirs"), [({"new": 1}, {}), ({}, {"new": 1}), ({"new": {"a": 1}}, {"new": 1})]
)
def test_a_key_only_one_record_has_is_a_difference(ours: dict[str, Any], theirs: dict) -> None:
    assert len(found := differences(ours, theirs)) == 1 and found[0].startswith("new: ")


def test_an_unknown_name_suggests_the_nearest_and_lists_all() -> None:
    error = unknown_name("reward", "colorfulness", ["sharpness", "colourfulness"])

    assert str(error) == (
        "unknown reward 'colorfulness'; did you mean 'colourfulness'? "
        "Known: colourfulness, sharpness."
    )


def test_nothing_is_suggested_for_a_dissimilar_name() -> None:
    assert "did you mean" not in str(unknown_name("reward", "xyz", ["sharpness"]))
