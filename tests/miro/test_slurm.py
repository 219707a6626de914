"""launch/slurm.sh under a real SLURM on this machine: stops, time limits, arrays, batch scripts."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.image_folders import write_image_folder
from helpers.slurm import Slurm

from miro.data.shards import Manifest
from miro.training import checkpoint
from miro.training.checkpoint import RunFolder
from miro.training.config import TrainConfig

pytestmark = pytest.mark.long

LAUNCH = Path(__file__).parents[2] / "launch"
WORDS = (
    "demo images=160000 batch=16 threads=1 precision=fp32 compile=False report_every=160 "
    "checkpoint_every=80000 model.channels=32 model.depth=1 model.heads=2 model.hidden=32"
).split()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.env |= {"SETUP": "true", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        cluster.env["PATH"] = f"{Path(sys.executable).parent}:{cluster.env['PATH']}"
        yield cluster


def wait_until(condition: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.2)


def submit(
    slurm: Slurm, training: TrainConfig, run: Path, ranks_per_node: int = 4, **options: object
) -> str:
    words = [*WORDS, "--run", str(run), "--data", str(training.data)]
    options = {"time": 10, "output": f"{run}-%j.log", **options}
    return slurm.submit(
        LAUNCH / "slurm.sh", *words,
        nodes=2, ntasks_per_node=ranks_per_node, cpus_per_task=1, **options,
    )  # fmt: skip


def training_began(run: Path) -> bool:
    metrics = RunFolder(run).metrics
    return metrics.exists() and metrics.stat().st_size > 0


def requeued(slurm: Slurm, job: str, times: int = 1) -> bool:
    if slurm.job(job).get("Restarts") != str(times):
        return False
    slurm.restart(job)
    return True


def saved(run: Path) -> int:
    found = checkpoint.open_newest(RunFolder(run).checkpoints)
    return found.state["images"] if found else 0


def log_of(run: Path) -> str:
    return "".join(path.read_text() for path in sorted(run.parent.glob(f"{run.name}-*.log")))


def test_a_stopped_job_of_eight_ranks_saves_and_is_requeued_and_resumes(
    slurm: Slurm, training: TrainConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(slurm, training, run)
    for times in (1, 2):
        before = saved(run)
        size = RunFolder(run).metrics.stat().st_size if run.exists() else 0
        wait_until(
            lambda size=size: training_began(run) and RunFolder(run).metrics.stat().st_size > size
        )
        slurm.call("scancel", "--signal=TERM", job)
        wait_until(lambda times=times: requeued(slurm, job, times))
        assert saved(run) > before, log_of(run)
    slurm.call("scancel", job)
    assert "resumed at" in log_of(run)


def test_a_job_that_reaches_its_time_limit_saves_and_is_requeued(
    slurm: Slurm, training: TrainConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(slurm, training, run, 2, time=1, signal="TERM@20")
    wait_until(lambda: requeued(slurm, job))
    assert saved(run), log_of(run)
    slurm.call("scancel", job)


def test_a_signal_while_ranks_are_starting_requeues_the_job(
    slurm: Slurm, training: TrainConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(slurm, training, run, 2)
    for times, delay in ((1, 0.3), (2, 1.5), (3, 4)):
        wait_until(lambda: ".0" in slurm.call("squeue", "--steps", "-h", "-j", job))
        time.sleep(delay)
        slurm.call("scancel", "--signal=TERM", job)
        wait_until(lambda times=times: requeued(slurm, job, times))
    slurm.call("scancel", job)


def test_a_cancelled_job_is_not_requeued(
    slurm: Slurm, training: TrainConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(slurm, training, run, 2)
    wait_until(lambda: training_began(run))
    slurm.call("scancel", job)
    wait_until(lambda: slurm.job(job)["JobState"] == "CANCELLED")
    time.sleep(5)
    assert slurm.job(job)["JobState"] == "CANCELLED" and slurm.job(job)["Restarts"] == "0"
    assert saved(run), log_of(run)


def test_a_failed_job_is_not_requeued(slurm: Slurm, training: TrainConfig, tmp_path: Path) -> None:
    job = submit(slurm, training, tmp_path / "run", 2, export="ALL,RANK=no")
    wait_until(lambda: slurm.job(job)["JobState"] == "FAILED")
    assert slurm.job(job)["Restarts"] == "0"


def test_a_job_with_a_killed_rank_ends_and_is_not_requeued(
    slurm: Slurm, training: TrainConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(slurm, training, run, 2)
    wait_until(lambda: training_began(run))
    subprocess.run(["pkill", "-KILL", "-n", "-f", f"miro train .*{run}"], check=True)
    wait_until(lambda: slurm.job(job)["JobState"] == "FAILED")
    assert slurm.job(job)["Restarts"] == "0"


def test_a_stopped_task_of_an_array_requeues_itself_alone(
    slurm: Slurm, training: TrainConfig, tmp_path: Path
) -> None:
    script = tmp_path / "array.sh"
    words = " ".join([*WORDS, "--data", str(training.data)])
    script.write_text(
        f"#!/bin/bash\nexec bash {LAUNCH}/slurm.sh {words} --run {tmp_path}/$SLURM_ARRAY_TASK_ID\n"
    )
    job = slurm.submit(
        script, array="0-1", nodes=1, ntasks_per_node=1, time=10,
        output=f"{tmp_path}/%a.log",
    )  # fmt: skip
    wait_until(lambda: all(training_began(tmp_path / str(k)) for k in range(2)))
    slurm.call("scancel", "--signal=TERM", f"{job}_1")
    wait_until(lambda: requeued(slurm, f"{job}_1"))
    time.sleep(3)
    other = slurm.job(f"{job}_0")
    slurm.call("scancel", job)
    assert (other["JobState"], other["Restarts"]) == ("RUNNING", "0")


def test_a_batch_script_without_srun_is_one_process(slurm: Slurm, tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "in", 23)
    script = tmp_path / "annotate.sh"
    script.write_text(
        f"#!/bin/bash\nmiro annotate {source} {tmp_path}/out --rewards sharpness "
        "--samples-per-shard 5\n"
    )
    job = slurm.submit(script, ntasks=8, output=f"{tmp_path}/log", time=10)
    wait_until(lambda: slurm.job(job)["JobState"] == "COMPLETED")
    assert Manifest.read(tmp_path / "out").samples == 19
