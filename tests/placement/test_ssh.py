"""`triptych up FILE --ssh` over a real sshd."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from tests.placement.conftest import COMMAND, Machine, until

pytestmark = [pytest.mark.placement, pytest.mark.timeout(400)]
READY_S = 240
HOSTS = {"a": "127.0.0.11", "b": "127.0.0.12"}


class Launcher:
    """`triptych up FILE --ssh` and what it has shown."""

    def __init__(self, file: Path, config: Path) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "triptych.actors.command", "up", file, "--ssh", "--ssh-config", config],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            print(line, end="")
            self.lines.append(line)

    def shows(self, text: str) -> bool:
        return any(text in line for line in self.lines)

    def ended(self, seconds: float) -> int:
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).is_success
    except httpx.HTTPError:
        return False


def image(url: str) -> str:
    body = {"prompt": "a large red circle on the left of a blue background", "seed": 7}
    answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)
    return str(answer.raise_for_status().json()["data"][0]["b64_json"])


def test_hosts_run_over_ssh_come_back_after_a_lost_connection_and_end_together(
    machine: Machine, ssh_config: Path
) -> None:
    words = " ".join(f"{key}={value}" for key, value in machine.environment.items())
    entry = f"ssh = 'far'\nssh_command = 'env {words} {COMMAND}'\nssh_folder = '{machine.folder}/there'"
    file, url = machine.topology(HOSTS, extra=entry), machine.url
    launcher = Launcher(file, ssh_config)
    try:
        until(lambda: ready(url) or launcher.process.poll() is not None, READY_S)
        assert launcher.process.poll() is None
        assert (machine.folder / "there" / file.name).read_bytes() == file.read_bytes()
        first = image(url)

        children = Path(f"/proc/{launcher.process.pid}/task/{launcher.process.pid}/children").read_text().split()
        lost = next(pid for pid in children if "--host b" in Path(f"/proc/{pid}/cmdline").read_bytes().decode())
        os.kill(int(lost), signal.SIGKILL)
        until(lambda: launcher.shows("b ssh was ended by SIGKILL"), 30)
        until(lambda: not ready(url), 60)
        until(lambda: ready(url), READY_S)
        assert image(url) == first

        launcher.process.send_signal(signal.SIGTERM)
        assert launcher.ended(120) == 0
        until(lambda: not machine.pids(), 30)
    finally:
        launcher.process.kill()


def test_hosts_end_with_the_one_that_runs_them(machine: Machine, ssh_config: Path) -> None:
    entry = f"ssh_command = 'env MARK={machine.mark} sh -c \"cat > /dev/null\"'"
    file = machine.topology(HOSTS, extra=entry)
    launcher = Launcher(file, ssh_config)
    until(lambda: len(machine.pids()) >= 2, 60)
    launcher.process.kill()
    until(lambda: not machine.pids(), 30)


@pytest.mark.parametrize(
    ("command", "said"), [("/no/such/triptych", "the command is not there"), ('sh -c "exit 2"', "it cannot serve")]
)
def test_what_can_never_run_is_given_up(machine: Machine, ssh_config: Path, command: str, said: str) -> None:
    file = machine.topology(HOSTS, extra=f"ssh_command = '{command}'")
    launcher = Launcher(file, ssh_config)
    assert launcher.ended(60) == 2
    assert launcher.shows(f"a given up: {said}")
