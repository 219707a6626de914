"""A real SLURM on this machine: munged, slurmctld and one slurmd per node."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from helpers.multirank import free_port

DAEMONS = ("munged", "slurmctld", "slurmd", "srun")
CONFIG = """
ClusterName=miro
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=5,sched_interval=2
ReturnToService=2
KillWait=30
MinJobAge=3600
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


class Slurm:
    """Daemons of a cluster of `nodes` nodes, all on this machine.

    Use as a context manager; skips the test where the daemons are not installed or may not run.
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 8) -> None:
        missing = [name for name in DAEMONS if shutil.which(name, path=_path()) is None]
        if missing:
            pytest.skip(
                f"{', '.join(missing)} not installed: apt-get install slurmctld slurmd "
                "slurm-client munge"
            )
        if os.geteuid():
            pytest.skip("the daemons of SLURM need root")
        self.folder, self.nodes = folder, [f"n{k}" for k in range(nodes)]
        host = socket.gethostname().split(".")[0]
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} "
            f"CPUs={cpus} Gres=gpu:{cpus} State=UNKNOWN"
            for name in self.nodes
        ]
        (folder / "state").mkdir(parents=True)
        self.config = folder / "slurm.conf"
        self.config.write_text(
            CONFIG.format(host=host, port=free_port(), folder=folder, nodes="\n".join(lines))
        )
        # Empty files are the nodes' GPUs.
        for k in range(cpus):
            (folder / f"gpu{k}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{cpus - 1}]\n")
        self.env = {**os.environ, "PATH": _path(), "SLURM_CONF": str(self.config)}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {name: str(self.folder / f"munge.{name}") for name in ("socket", "pid", "log")}
        self._start(
            ["munged", "--foreground", "--force", "--num-threads=2",
             f"--key-file={key}", f"--socket={files['socket']}", f"--pid-file={files['pid']}",
             f"--log-file={files['log']}", f"--seed-file={self.folder / 'munge.seed'}"]
        )  # fmt: skip
        self._await(lambda: Path(files["socket"]).exists(), "munged")
        self._start(["slurmctld", "-D", "-c"])
        for name in self.nodes:
            self._start(["slurmd", "-D", "-N", name])
        self._await(
            lambda: (
                self.call("sinfo", "-h", "-o", "%t %D").split() == ["idle", str(len(self.nodes))]
            ),
            "the nodes",
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.call("scancel", "--user=root")
        self._await(lambda: not self.call("squeue", "-h"), "the end of all jobs")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait(timeout=60)

    def _start(self, command: Sequence[str]) -> None:
        with open(self.folder / f"{command[0]}.out", "ab") as out:
            self._daemons.append(
                subprocess.Popen(command, env=self.env, stdout=out, stderr=subprocess.STDOUT)
            )

    def _await(self, ready: Callable[[], bool], what: str) -> None:
        for _ in range(600):
            if ready():
                return
            time.sleep(0.1)
        logs = "\n".join(f"{p}:\n{p.read_text()[-2000:]}" for p in self.folder.glob("*.log"))
        raise AssertionError(f"{what}: not within a minute\n{logs}")

    def call(self, *command: str) -> str:
        """Run a command of SLURM and return what it prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        return done.stdout

    def submit(self, script: Path, *arguments: str, **options: object) -> str:
        """`sbatch` a script; return the job's number."""
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        done = subprocess.run(
            ["sbatch", "--parsable", *flags, str(script), *arguments],
            env=self.env, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def restart(self, number: str) -> None:
        """Start a requeued job now; SLURM would wait for two minutes."""
        self.call("scontrol", "update", f"JobId={number}", "StartTime=now")

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`: JobState, Restarts, ExitCode."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "-o", "show", "job", number)))


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"
