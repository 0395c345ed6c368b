"""Completion in a real bash, which is what people type in."""

from __future__ import annotations

import os
import pty
import select
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from triptych.actors.command import app

COMMAND = Path(sys.executable).with_name("triptych")
SHELL = ("/bin/bash", "--norc", "--noprofile", "-i")
COMPLETED = {
    "triptych stat": "triptych status ",
    "triptych generate --neg": "triptych generate --negative ",
    "triptych up --log-level w": "triptych up --log-level warning ",
}
CLEAR_LINE = b"\x15"


def read_until(terminal: int, text: str, within_s: float = 60.0) -> None:
    shown, end = "", time.monotonic() + within_s
    while text not in shown:
        left = end - time.monotonic()
        assert left > 0, f"{text!r} is not in {shown!r}"
        if select.select([terminal], [], [], left)[0]:
            shown += os.read(terminal, 4096).decode()


def test_bash_completes_commands_options_and_values() -> None:
    assert COMMAND.exists(), "the environment has the command: make install"
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(PATH=f"{COMMAND.parent}:{os.environ['PATH']}", PS1="$ ", TERM="dumb", INPUTRC="/dev/null")
        os.execv(SHELL[0], SHELL)
    try:
        os.write(terminal, b'eval "$(triptych completion bash)"; echo loaded-$?\n')
        read_until(terminal, "loaded-0")
        for typed, completed in COMPLETED.items():
            os.write(terminal, typed.encode() + b"\t")
            read_until(terminal, completed)
            os.write(terminal, CLEAR_LINE)
        os.write(terminal, b"exit\n")
    finally:
        os.close(terminal)  # which ends the shell, too
        os.waitpid(pid, 0)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(shell: str) -> None:
    shown = CliRunner().invoke(app, ["completion", shell])
    assert (shown.exit_code, f"_TRIPTYCH_COMPLETE=complete_{shell}" in shown.stdout) == (0, True)
