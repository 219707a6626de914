"""Launch scripts stopped and killed at random moments; nodes.sh over a real sshd."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from helpers.multirank import free_port
from helpers.sshd import HOSTS, sshd

from miro.training import checkpoint
from miro.training.checkpoint import RunFolder
from miro.training.config import TrainConfig
from miro.training.metrics_log import read_metrics
from miro.utils.stop_request import EXIT_STOPPED

pytestmark = pytest.mark.long

LAUNCH = Path(__file__).parents[2] / "launch"
IMAGES = 24_000
WORDS = (
    f"demo images={IMAGES} batch=8 threads=1 precision=fp32 compile=False report_every=240 "
    "checkpoint_every=2400 model.channels=32 model.depth=1 model.heads=2 model.hidden=32"
).split()


def words(training: TrainConfig, run: Path) -> list[str]:
    return [*WORDS, "--run", str(run), "--data", str(training.data)]


@pytest.fixture(scope="module")
def environment() -> Mapping[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with sshd(tmp_path_factory.mktemp("sshd") / "files") as command:
        yield command


def command_of(script: str, training: TrainConfig, run: Path, folder: Path) -> list[str]:
    if script == "node.sh":
        return [str(LAUNCH / script), *words(training, run)]
    hosts = folder / "hosts"
    hosts.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    return [str(LAUNCH / script), str(hosts), *words(training, run)]


def variables(script: str, ssh: str, environment: Mapping[str, str]) -> dict[str, str]:
    setup = f"export PATH={environment['PATH']} OMP_NUM_THREADS=1"
    own = {"GPUS": "2"} if script == "node.sh" else {
        "SSH": ssh, "SETUP": setup, "MASTER_ADDR": "127.0.0.1", "PORT": str(free_port()),
    }  # fmt: skip
    return {**environment, **own}


def default_signals() -> None:
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def ranks_of(run: Path) -> list[int]:
    """Processes that train this run."""
    pattern = f"miro.cli train .*--run {run}( |$)"
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True)
    return [
        pid
        for pid in map(int, found.stdout.split())
        if b"torch.distributed" not in (line := Path(f"/proc/{pid}/cmdline").read_bytes())
        and b"torchrun" not in line
        and b"ssh" not in line
    ]


@pytest.mark.parametrize("script", ["node.sh", "nodes.sh"])
def test_stops_and_kills_at_random_moments_lose_nothing(
    training: TrainConfig,
    tmp_path: Path,
    ssh: str,
    environment: Mapping[str, str],
    script: str,
) -> None:
    """The run ends with the weights of one that nothing happened to, and no stop loses a step."""
    undisturbed = subprocess.run(
        command_of(script, training, tmp_path / "undisturbed", tmp_path),
        env=variables(script, ssh, environment),
        capture_output=True,
        text=True,
    )
    assert undisturbed.returncode == 0, undisturbed.stderr
    draw = random.Random(script)
    run = tmp_path / "run"
    stops = kills = 0
    while stops + kills < 16:
        process = subprocess.Popen(
            command_of(script, training, run, tmp_path),
            env=variables(script, ssh, environment),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=default_signals,
        )  # fmt: skip
        time.sleep(draw.uniform(0.2, 14))
        trained = [line["images"] for line in read_metrics(RunFolder(run).metrics)]
        ranks = ranks_of(run)
        if draw.random() < 0.3 and ranks and process.poll() is None:
            os.kill(draw.choice(ranks), signal.SIGKILL)
            kills += 1
            expected = {1, 137, 255}
        else:
            process.send_signal(draw.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGINT]))
            stops += 1
            expected = {EXIT_STOPPED}
        output, _ = process.communicate(timeout=600)
        if process.returncode == 0:
            break  # It had finished.
        assert process.returncode in expected, output
        assert ranks_of(run) == []
        if expected == {EXIT_STOPPED} and trained:
            found = checkpoint.open_newest(RunFolder(run).checkpoints)
            assert found is not None and found.state["images"] >= trained[-1], output
    print(f"{script}: {stops} stops, {kills} kills")

    done = subprocess.run(
        command_of(script, training, run, tmp_path), env=variables(script, ssh, environment)
    )
    assert done.returncode == 0
    ours, theirs = (
        checkpoint.load(RunFolder(folder).weights_at(IMAGES))[0]
        for folder in (run, tmp_path / "undisturbed")
    )
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_a_lost_connection_saves_and_ends_the_run_on_all_machines(
    training: TrainConfig, tmp_path: Path, ssh: str, environment: Mapping[str, str]
) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        command_of("nodes.sh", training, run, tmp_path),
        env=variables("nodes.sh", ssh, environment),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while not read_metrics(RunFolder(run).metrics):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    subprocess.run(["pkill", "-KILL", "-P", str(process.pid), "-n", "ssh"], check=True)
    output, _ = process.communicate(timeout=600)

    assert process.returncode not in (0, EXIT_STOPPED), output
    deadline = time.monotonic() + 120
    while ranks_of(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ranks_of(run) == []
    assert checkpoint.open_newest(RunFolder(run).checkpoints) is not None, output
