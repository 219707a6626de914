"""The private names of DeepSpeed that miro uses exist, and stand in one module."""

import re
from dataclasses import replace
from pathlib import Path

import deepspeed.ops
import pytest
from helpers.engines import PLAN, engine, inputs, learn
from torch.nn import functional

import miro

ENGINE_NAMES = ("enable_backward_allreduce",)
ZERO12_NAMES = (
    "averaged_gradients",
    "cpu_offload",
    "single_partition_of_fp32_groups",
    "update_lp_params",
)
ZERO12_PARAM_NAMES = ("_hp_mapping",)
ZERO3_NAMES = (
    "averaged_gradients",
    "fp16_partitioned_groups_flat",
    "fp32_partitioned_groups_flat",
    "get_param_id",
    "grad_position",
    "offload_optimizer",
    "persistent_parameters",
)
ZERO3_PARAM_NAMES = ("all_gather", "ds_numel", "ds_shape", "partition")
MAPPING_NAMES = ("param_group_index", "hp_fragment_address", "lp_fragment_address")


def missing(owner: object, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if not hasattr(owner, name)]


def test_the_op_builder_registry_and_the_allreduce_switch_exist() -> None:
    assert hasattr(deepspeed.ops, "__compatible_ops__")
    assert missing(engine().deepspeed, ENGINE_NAMES) == []


@pytest.mark.parametrize("stage", [1, 2])
def test_the_names_of_stages_1_and_2_exist(stage: int) -> None:
    made = engine(plan=replace(PLAN, stage=stage))
    param = made.parameters["out.weight"]

    assert missing(made.deepspeed.optimizer, ZERO12_NAMES) == []
    assert missing(param, ZERO12_PARAM_NAMES) == []
    assert missing(param._hp_mapping, MAPPING_NAMES) == []  # type: ignore[attr-defined]


def test_the_names_of_stage_3_exist() -> None:
    made = engine(plan=replace(PLAN, stage=3))

    assert missing(made.deepspeed.optimizer, ZERO3_NAMES) == []
    assert missing(made.parameters["out.weight"], ZERO3_PARAM_NAMES) == []


def test_a_step_at_stage_3_leaves_the_linear_layer_of_other_models_alone() -> None:
    linear = functional.linear

    made = engine(plan=replace(PLAN, stage=3))
    learn(made, made.predict(*inputs(0)).square().mean(), images=0)

    assert functional.linear is linear


def test_no_other_module_uses_them() -> None:
    # Ordinary words, and a public key of the configuration.
    common = {"all_gather", "partition", "offload_optimizer"}
    names = {*ENGINE_NAMES, *ZERO12_NAMES, *ZERO12_PARAM_NAMES, *ZERO3_NAMES, *ZERO3_PARAM_NAMES}
    pattern = re.compile("|".join(rf"\b{name}\b" for name in sorted(names - common)))
    users = [
        path.name
        for folder in miro.__path__
        for path in Path(folder).rglob("*.py")
        if pattern.search(path.read_text(encoding="utf-8"))
    ]

    assert users == ["deepspeed_internals.py"]
