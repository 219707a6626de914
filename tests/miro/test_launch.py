"""The launch scripts, run on this machine where possible, else printed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.image_folders import write_image_folder
from helpers.multirank import free_port

from miro.cli.launch import launch
from miro.data.shards import Manifest
from miro.training import checkpoint
from miro.training.checkpoint import RunFolder
from miro.training.config import TrainConfig
from miro.training.loop import train
from miro.training.metrics_log import read_metrics
from miro.utils.locks import exclusive_lock
from miro.utils.stop_request import EXIT_STOPPED

LAUNCH = Path(__file__).parents[2] / "launch"
# The `training` fixture as command-line options.
WORDS = (
    "demo images=96 batch=8 threads=1 precision=fp32 compile=False report_every=8 "
    "checkpoint_every=96 model.channels=32 model.depth=1 model.heads=2 model.hidden=32 "
    "optimizer.name=adamw flow.timestep_mean=0 optimizer.learning_rate=3e-3 "
    "optimizer.warmup_images=16 optimizer.beta2=0.99 optimizer.ema_halflife_images=10000"
)


def words(training: TrainConfig, run: Path, *more: str) -> list[str]:
    return [*WORDS.split(), "--run", str(run), "--data", str(training.data), *more]


def shell(command: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    here = str(Path(sys.executable).parent)
    path = {"PATH": f"{here}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def single(training: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The losses of the run on one process."""
    folder = tmp_path_factory.mktemp("single")
    train(replace(training, checkpoint_every=96, ema_weights_at=()), folder)
    return losses(folder)


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in read_metrics(RunFolder(folder).metrics)])


def test_node_sh_trains_on_all_processes_of_a_machine(
    training: TrainConfig, single: torch.Tensor, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    done = shell(
        [LAUNCH / "node.sh", *words(training, run, "sharding.stage=2")],
        GPUS="2", TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert '"stage": 2' in RunFolder(run).deepspeed.read_text()
    torch.testing.assert_close(losses(run), single, rtol=1e-5, atol=0)


def hostfile(folder: Path, hosts: Sequence[str]) -> Path:
    path = folder / "hosts"
    path.write_text("# two machines\n" + "".join(f"{host} slots=1\n" for host in hosts))
    return path


def default_signals() -> None:
    """Shells cannot trap a signal that is ignored when they start, as SIGHUP is under nohup."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def start(command: Sequence[str | Path], **environment: str) -> subprocess.Popen[str]:
    here = str(Path(sys.executable).parent)
    path = {"PATH": f"{here}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, **path, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=default_signals,
    )  # fmt: skip


def stop_when_training(process: subprocess.Popen[str], run: Path, number: int) -> str:
    """Send a signal once the run has reported; return what it printed."""
    metrics = RunFolder(run).metrics
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=600)
    return output


ENDLESS = ("images=160000", "checkpoint_every=80000")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_node_sh_told_to_stop_saves_and_exits_with_75(
    training: TrainConfig, tmp_path: Path, number: int
) -> None:
    run = tmp_path / "run"
    process = start([LAUNCH / "node.sh", *words(training, run, *ENDLESS)], GPUS="2")
    output = stop_when_training(process, run, number)

    assert process.returncode == EXIT_STOPPED, output
    assert "Traceback" not in output, output
    found = checkpoint.open_newest(RunFolder(run).checkpoints)
    assert found is not None and not list(run.rglob("*.writing"))


def test_node_sh_told_to_stop_before_there_are_ranks_exits_with_75(
    training: TrainConfig, tmp_path: Path
) -> None:
    process = start([LAUNCH / "node.sh", *words(training, tmp_path / "run")], GPUS="2")
    time.sleep(0.5)
    process.terminate()
    output, _ = process.communicate(timeout=600)

    assert process.returncode == EXIT_STOPPED, output


def test_nodes_sh_told_to_stop_exits_with_75_once_all_machines_have_saved(
    training: TrainConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(
        [LAUNCH / "nodes.sh", hostfile(tmp_path, ["127.0.0.1", "localhost"]),
         *words(training, run, *ENDLESS)],
        SSH=remote(tmp_path, 'exec bash -c "$2"'), PORT=str(free_port()), SETUP="true",
    )  # fmt: skip
    output = stop_when_training(process, run, signal.SIGTERM)

    assert process.returncode == EXIT_STOPPED, output
    assert checkpoint.open_newest(RunFolder(run).checkpoints) is not None
    assert not list(run.rglob("*.writing"))
    with exclusive_lock(run):
        pass  # No rank is left.


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "has no line HOST slots=GPUS"),
        ("# node-0 slots=8\n", "has no line HOST slots=GPUS"),
        ("node-0\n", "'node-0  ': each line must be HOST slots=GPUS"),
        ("node-0 slots=\n", "each line must be HOST slots=GPUS"),
        ("node-0 slots=0\n", "each line must be HOST slots=GPUS"),
        ("node-0 slots=8 x\n", "each line must be HOST slots=GPUS"),
        ("node-0 slots=8\nnode-0 slots=8\n", "node-0 is there twice"),
    ],
)
def test_a_hostfile_is_checked(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "hosts").write_text(lines)
    done = shell([LAUNCH / "nodes.sh", tmp_path / "hosts", "small"], DRY_RUN="1")
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, "MASTER_ADDR=node-0"), ({"MASTER_ADDR": "10.0.0.1"}, "MASTER_ADDR=10.0.0.1")],
)
def test_the_user_of_a_host_is_for_ssh_only(
    tmp_path: Path, variables: dict[str, str], expected: str
) -> None:
    (tmp_path / "hosts").write_text("root@node-0 slots=8\t# the first\r\n\nnode-1 slots=4")
    done = shell([LAUNCH / "nodes.sh", tmp_path / "hosts", "small"], DRY_RUN="1", **variables)

    first, second = done.stdout.splitlines()
    assert " root@node-0 " in first and expected in first and expected in second
    assert "NODE_RANK=1" in second and "GPUS=4" in second


@pytest.mark.parametrize("script", ["node.sh", "nodes.sh", "laptop.sh", "data.sh", "slurm.sh"])
def test_a_script_without_arguments_prints_its_usage(script: str) -> None:
    done = shell(["bash", LAUNCH / script])
    assert done.returncode == 2 and f"launch/{script} " in done.stderr
    assert "set -euo" not in done.stderr


def remote(folder: Path, line: str) -> str:
    """A replacement for ssh that runs its command on this machine."""
    path = folder / "remote"
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


def test_nodes_sh_trains_with_two_launchers_on_loopback(
    training: TrainConfig, single: torch.Tensor, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    done = shell(
        [LAUNCH / "nodes.sh", hostfile(tmp_path, ["127.0.0.1", "localhost"]),
         *words(training, run, "sharding.stage=1")],
        SSH=remote(tmp_path, 'exec bash -c "$2"'), PORT=str(free_port()), SETUP="true",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(run), single, rtol=1e-5, atol=0)


@pytest.fixture
def networks() -> Iterator[list[str]]:
    """Addresses of two connected network namespaces; skips without the permission."""
    names, addresses = ["miro-a", "miro-b"], ["10.77.0.1", "10.77.0.2"]
    commands = [f"ip netns add {name}" for name in names]
    commands += ["ip link add miro-a type veth peer name miro-b"]
    for name, address in zip(names, addresses, strict=True):
        commands += [
            f"ip link set {name} netns {name}",
            f"ip -n {name} address add {address}/24 dev {name}",
            f"ip -n {name} link set {name} up",
            f"ip -n {name} link set lo up",
        ]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{command}: {done.stderr.strip()}")
        yield addresses
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.skipif(shutil.which("ip") is None, reason="iproute2 is not installed")
def test_nodes_sh_trains_across_two_network_namespaces(
    training: TrainConfig, single: torch.Tensor, tmp_path: Path, networks: list[str]
) -> None:
    run = tmp_path / "run"
    inside = f'''case $1 in {networks[0]}) name=miro-a;; *) name=miro-b;; esac
export GLOO_SOCKET_IFNAME=$name
exec ip netns exec $name bash -c "$2"'''

    done = shell(
        [LAUNCH / "nodes.sh", hostfile(tmp_path, networks),
         *words(training, run, "sharding.stage=3")],
        SSH=remote(tmp_path, inside), SETUP="true",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(run), single, rtol=1e-5, atol=0)


def test_a_failed_machine_ends_the_others(training: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"

    done = shell(
        [LAUNCH / "nodes.sh", hostfile(tmp_path, ["127.0.0.1", "lost"]), *words(training, run)],
        SSH=remote(tmp_path, '[ "$1" = lost ] && exit 3; exec bash -c "$2"'),
        PORT=str(free_port()), SETUP="true",
    )  # fmt: skip

    assert done.returncode == 3, done.stderr


def test_a_dry_run_prints_the_commands_of_each_script(capfd: pytest.CaptureFixture[str]) -> None:
    launch(LAUNCH, dry_run=True)

    printed = capfd.readouterr().out
    for part in (
        "miro annotate PHOTOS RUN/scored",
        "torchrun --standalone --nproc-per-node gpu --module -- miro.cli train PRESET --run DIR",
        "NNODES=2 NODE_RANK=1 GPUS=8 MASTER_ADDR=node-0",
        "srun --wait=60 miro train PRESET",
    ):
        assert part in printed, printed


def test_a_slurm_job_that_stopped_and_saved_is_requeued(tmp_path: Path) -> None:
    """With fakes of SLURM's commands; test_slurm.py has a real one."""
    for name, line in {
        "srun": "[ $CODE = 75 ] && touch $MIRO_STOPPED_FILE && exit 0; exit $CODE",
        "scontrol": f"""case $1 in
requeue) echo $2 >> {tmp_path}/requeued;;
show) [ $2 = job ] && echo JobState=$STATE || echo node-7;;
esac""",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)

    path = f"{tmp_path}:{os.environ['PATH']}"
    for code, state in ((0, "RUNNING"), (1, "RUNNING"), (75, "RUNNING"), (75, "CANCELLED")):
        job = {
            "SLURM_JOB_ID": f"10{code}", "SLURM_JOB_NODELIST": "node-[7-8]",
            "CODE": str(code), "STATE": state,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", LAUNCH / "slurm.sh", "small"],
            env={**os.environ, **job, "PATH": path, "SETUP": "true"},
        )
        assert done.returncode == code

    assert (tmp_path / "requeued").read_text() == "1075\n"


def test_data_sh_writes_a_dataset_with_all_processes_of_a_machine(tmp_path: Path) -> None:
    source, scored, encoded = (
        write_image_folder(tmp_path / "in", 23),
        tmp_path / "a",
        tmp_path / "b",
    )
    rewards = ["--rewards", "sharpness", "--samples-per-shard", "5"]
    many = {"GPUS": "2", "DEVICE": "cpu"}

    annotated = shell([LAUNCH / "data.sh", "annotate", source, scored, *rewards], **many)
    made = shell([LAUNCH / "data.sh", "encode", scored, encoded, "--size", "8"], **many)

    assert annotated.returncode == 0, annotated.stderr
    assert made.returncode == 0, made.stderr
    assert Manifest.read(encoded).samples == Manifest.read(scored).samples == 19
    assert Manifest.read(encoded).rewards == ("sharpness",)
    assert annotated.stderr.count("19 samples,") <= 1, "only rank 0 prints"
