"""Who a process is, as launchers say it."""

import pytest
import torch

from miro.utils.distributed import Ranks, ranks_of


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Ranks(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Ranks(3, 8, 1)),
        ({"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}, Ranks(9, 16, 1)),
        ({"SLURM_NTASKS": "16"}, Ranks(0, 1, 0)),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "SLURM_PROCID": "0"},
            Ranks(1, 2, 0),
        ),
    ],
    ids=["nothing", "torchrun", "srun", "a shell in an allocation", "torchrun in an allocation"],
)
def test_launchers_are_understood(environment: dict[str, str], expected: Ranks) -> None:
    assert ranks_of(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"},
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
    ],
)
def test_half_of_an_answer_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="RANK"):
        ranks_of(environment)


def test_a_device_is_a_processs_own() -> None:
    assert Ranks(5, 8, 5).device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert Ranks(5, 8, 1).device("cuda") == torch.device("cuda", 1)


def test_alone_everything_is_agreed() -> None:
    done = []
    Ranks().on_first(lambda: done.append(1))
    assert done == [1] and Ranks().all_true(True) and not Ranks().all_true(False)
    with pytest.raises(ValueError, match="no"):
        Ranks().on_first(lambda: (_ for _ in ()).throw(ValueError("no")))
