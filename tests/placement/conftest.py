"""A real sshd on loopback for each test that asks, and topologies of several hosts that are all this machine."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
COMMAND = f"{sys.executable} -P -m triptych.actors.command"


class Machine:
    """A folder for a test, and the processes that carry its mark in their environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.bus_port = free_ports(10)
        self.http_port = free_ports(1)
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "XDG_RUNTIME_DIR": str(folder),
            "TRIPTYCH_STATE_DIR": str(folder / "state"),
            "OMP_NUM_THREADS": "1",
            "MARK": self.mark,
        }

    def pids(self) -> list[int]:
        """Processes with the mark, other than zombies."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and f"MARK={self.mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it has ended, or belongs to another user
        return found

    def topology(self, hosts: dict[str, str], *, extra: str = "", sections: str = "") -> Path:
        """Write the demo model on hosts, by their addresses: the first has the head, the last the denoiser.

        `extra` are lines of each `[[hosts]]` entry, `sections` other sections.
        """
        head, *_, last = hosts
        entries = "".join(
            f'[[hosts]]\nname = "{name}"\naddress = "{address}"\n{extra}\n' for name, address in hosts.items()
        )
        roles = "".join(
            f'[[roles]]\nkind = "{kind}"\nhost = "{host}"\n'
            for kind, host in (("encoder", head), ("denoiser", last), ("decoder", head))
        )
        file = self.folder / "hosts.toml"
        file.write_text(
            f'[model]\npath = "{ROOT}/examples/shapes"\ndtype = "float32"\n[transfer]\ntrusted_network = true\n'
            f'pool_size = "16MiB"\n[head]\nhost = "{head}"\nport = {self.bus_port}\n[api]\nport = {self.http_port}\n'
            f"{sections}{entries}{roles}"
        )
        return file


@pytest.fixture
def machine() -> Iterator[Machine]:
    folder = Path(tempfile.mkdtemp(prefix="tr-"))
    yield Machine(folder)
    shutil.rmtree(folder)


@pytest.fixture
def ssh_config(machine: Machine) -> Iterator[Path]:
    """The file for ssh's -F with which every host name leads to an sshd of its own."""
    folder = machine.folder / "ssh"
    folder.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "authorized_keys").write_text((folder / "user.pub").read_text())
    port = free_ports(1)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized_keys\n"
        "PidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nClientAliveInterval 1\n"
    )
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    config = folder / "config"
    config.write_text(
        f"Host *\nHostName 127.0.0.1\nPort {port}\nUser {getpass.getuser()}\nIdentityFile {folder}/user\n"
        f"IdentitiesOnly yes\nUserKnownHostsFile {folder}/known_hosts\nStrictHostKeyChecking yes\n"
    )
    command = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin") or "sshd"  # which wants its whole path
    sshd = subprocess.Popen([command, "-D", "-e", "-f", folder / "sshd_config"])
    try:
        until(lambda: _listens(port), 10)
        yield config
    finally:
        sshd.terminate()
        sshd.wait(10)


def until(true: Callable[[], object], seconds: float) -> None:
    """Wait until something is true; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
