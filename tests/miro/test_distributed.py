"""The rank of a process, from the variables of launchers."""

import pytest
import torch

from miro.utils.distributed import DistEnv, dist_env

SLURM = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, DistEnv(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, DistEnv(3, 8, 1)),
        ({**SLURM, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "12"}, DistEnv(9, 12, 1)),
        ({"SLURM_NTASKS": "16"}, DistEnv(0, 1, 0)),
        (SLURM, DistEnv(0, 1, 0)),
        ({**SLURM, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, DistEnv(0, 1, 0)),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "SLURM_PROCID": "0"},
            DistEnv(1, 2, 0),
        ),
    ],
    ids=[
        "nothing",
        "torchrun",
        "srun",
        "a shell in an allocation",
        "a batch script",
        "an interactive step",
        "torchrun in an allocation",
    ],  # fmt: skip
)
def test_the_variables_of_launchers_are_read(
    environment: dict[str, str], expected: DistEnv
) -> None:
    assert dist_env(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"},
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
    ],
)
def test_incomplete_or_invalid_variables_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="RANK"):
        dist_env(environment)


def test_each_local_rank_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert DistEnv(5, 8, 5).device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert DistEnv(5, 8, 1).device("cuda") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU: there are 2"):
        DistEnv(2, 8, 2).device("cuda")


def test_a_task_of_srun_that_sees_one_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert DistEnv(3, 8, 3).device("cuda") == torch.device("cuda", 0)


def test_a_machine_without_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no GPU on this machine; choose device=cpu"):
        DistEnv().device("cuda")


def test_collectives_of_one_process_are_local() -> None:
    done = []
    DistEnv().on_first(lambda: done.append(1))
    assert done == [1] and DistEnv().all_true(True) and not DistEnv().all_true(False)
    with pytest.raises(ValueError, match="no"):
        DistEnv().on_first(lambda: (_ for _ in ()).throw(ValueError("no")))
