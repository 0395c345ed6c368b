"""What is run over ssh, and what its end means; a real sshd is in tests/placement."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from triptych.actors.placement.ssh import exit_of, remote_command, shown, ssh_command
from triptych.actors.supervision import ExitKind
from triptych.actors.topology import HostSection

CONTENT = b"a topology\n" * 10_000
ECHO = 'sh -c \'printf "%s\\n" "$@"; cat\' --'


def host(**keys: str) -> HostSection:
    return HostSection(name="b", address="10.0.0.2", **keys)


def run(remote: str, stdin: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["sh", "-c", remote], input=stdin, capture_output=True, timeout=60, check=False)


def test_ssh_never_asks_and_gives_a_silent_host_up_after_three_seconds() -> None:
    command = ssh_command(host(), "run this")
    assert command[-3:] == ("--", "10.0.0.2", "run this")
    assert {"BatchMode=yes", "ServerAliveInterval=1", "ServerAliveCountMax=3"} <= set(command)
    assert ssh_command(host(ssh="me@node"), "", config="f")[:3] == ("ssh", "-F", "f")
    assert ssh_command(host(ssh="me@node"), "")[-2] == "me@node"


def test_the_topology_goes_over_before_the_command_takes_the_rest_of_stdin(tmp_path: Path) -> None:
    there = tmp_path / "a folder; with 'signs'"
    remote = remote_command(
        host(ssh_command=ECHO, ssh_folder=str(there)), Path("/here/t x.toml"), CONTENT, log_level="info"
    )
    done = run(remote, CONTENT + b"the rest")
    expected = ["up", f"{there}/t x.toml", "--host", "b", "--until-eof", "--log-level", "info", "the rest"]
    assert done.stdout.decode().splitlines() == expected
    assert (there / "t x.toml").read_bytes() == CONTENT
    assert [file.name for file in there.iterdir()] == ["t x.toml"]


def test_a_cut_off_topology_replaces_none(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text("the one before")
    remote = remote_command(host(ssh_command=ECHO), tmp_path / "t.toml", CONTENT)
    done = run(remote, CONTENT[:-1])
    assert (done.returncode, done.stdout) == (74, b"")
    assert (tmp_path / "t.toml").read_text() == "the one before"
    assert [file.name for file in tmp_path.iterdir()] == ["t.toml"]


def test_a_home_folder_is_that_of_the_other_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    remote = remote_command(host(ssh_command=ECHO, ssh_folder="~/x y"), Path("/here/t.toml"), CONTENT)
    assert run(remote, CONTENT).stdout.splitlines()[1] == f"{tmp_path}/x y/t.toml".encode()
    assert shlex.split(remote)[:3] == ["exec", "sh", "-c"]


@pytest.mark.parametrize(
    ("code", "lasted_s", "kind", "said"),
    [
        (255, 1.0, ExitKind.START_DELAYED, "connection"),
        (255, 100.0, ExitKind.CRASH, "connection"),
        (0, 100.0, ExitKind.CRASH, "exit code 0"),
        (1, 1.0, ExitKind.START_DELAYED, "exit code 1"),
        (-9, 100.0, ExitKind.CRASH, "SIGKILL"),
        (74, 1.0, ExitKind.START_DELAYED, "could not be written"),
        (2, 100.0, ExitKind.START_FAILURE, "cannot serve"),
        (127, 0.1, ExitKind.START_FAILURE, "command is not there"),
    ],
)
def test_only_what_can_never_run_is_not_tried_again(code: int, lasted_s: float, kind: ExitKind, said: str) -> None:
    ended = exit_of("b", code, lasted_s, at=0.0, period_s=30.0)
    assert (ended.kind, said in ended.reason) == (kind, True)


def test_a_line_of_another_machine_holds_no_command_for_the_terminal() -> None:
    assert shown(b"ready \x1b[2J\x07\xff on\tport") == "ready \\x1b[2J\\x07\N{REPLACEMENT CHARACTER} on port"
