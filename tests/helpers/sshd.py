"""A real sshd on this machine, reached under two names."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.multirank import free_port

HOSTS = ("n0", "n1")


@contextmanager
def sshd(folder: Path) -> Iterator[str]:
    """Start sshd; yields the ssh command that reaches it as n0 and n1, without a password."""
    daemon = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if daemon is None or shutil.which("ssh") is None:
        pytest.skip("sshd is not installed: apt-get install openssh-server openssh-client")
    if os.geteuid():
        pytest.skip("sshd needs root")
    folder.mkdir()
    port = free_port()
    for key in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        subprocess.run(command, check=True)
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/user.pub\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin prohibit-password\nMaxStartups 100\n"
    )
    (folder / "ssh_config").write_text(
        f"Host {' '.join(HOSTS)}\n  HostName 127.0.0.1\n  Port {port}\n"
        f"  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  BatchMode yes\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd changes its root to this empty folder.
    process = subprocess.Popen([daemon, "-D", "-e", "-f", folder / "sshd_config"])
    ssh = f"ssh -F {folder}/ssh_config"
    try:
        for _ in range(100):
            if subprocess.run([*ssh.split(), HOSTS[0], "true"]).returncode == 0:
                break
            time.sleep(0.1)
        else:
            raise AssertionError("sshd does not answer")
        yield ssh
    finally:
        process.terminate()
        process.wait()
