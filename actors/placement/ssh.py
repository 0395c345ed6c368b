"""`triptych up FILE --ssh`: run `triptych up FILE --host NAME` on each host over one ssh, and again when it ends.

The topology file goes over with each start, through the stdin that then stays open as long as the remote supervisor is
to run: `--until-eof` ends it when this process, the connection or its machine is gone. So all hosts run the same bytes,
and nobody has to copy a file or compare two.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import random
import shlex
import signal
import time
from typing import TYPE_CHECKING, Final, cast

import structlog

from triptych.actors.runtime.logs import printable
from triptych.actors.supervision import (
    ChildExit,
    ChildSpec,
    ExitKind,
    Retire,
    SupervisorSpec,
    Wait,
    decide_restart,
)
from triptych.actors.topology import stop_bound_s

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from triptych.actors.topology import HostSection, Topology

    ShowLine = Callable[[str, str], None]
    """Shows a line of a host: its name and the text."""

EXIT_CANNOT_CONNECT: Final = 255
"""Of ssh itself; any other exit code is that of the remote command."""
_NO_SUCH_COMMAND: Final = (126, 127)
_CANNOT_SERVE: Final = 2
_COPY_FAILED: Final = 74
_CHUNK: Final = 1 << 16
_MARGIN_S: Final = 10.0
_KILL_AFTER_S: Final = 5.0
_OPTIONS: Final = (
    "BatchMode=yes",  # never ask: nobody may be there
    "ConnectTimeout=5",
    "ServerAliveInterval=1",  # a silent host is given up after 3 s
    "ServerAliveCountMax=3",
    "ControlPath=none",  # a shared connection would have the keepalives of whoever opened it
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
)
_log = structlog.stdlib.get_logger("actors")


def ssh_command(host: HostSection, remote: str, *, config: str = "") -> tuple[str, ...]:
    """Return the arguments of ssh that run the shell command `remote` on a host. Pure.

    Args:
        host: Where to.
        remote: For the login shell there.
        config: A file for ssh's `-F`; "" for its own.
    """
    own = ("-F", config) if config else ()
    options = itertools.chain.from_iterable(("-o", option) for option in _OPTIONS)
    return ("ssh", *own, "-T", *options, "--", host.ssh or host.address, remote)


def remote_command(host: HostSection, file: Path, content: bytes, *, log_level: str = "") -> str:
    """Return the shell command that takes the topology from its stdin and then runs the supervisor of `host`. Pure.

    Args:
        host: Whose components to run.
        file: Absolute path of the topology here; it goes to the same path there, or to `host.ssh_folder`.
        content: The bytes of the file.
        log_level: For the supervisor; "" for its own default.
    """
    name = shlex.quote(file.name)
    command = f'{host.ssh_command} up "$PWD"/{name} --host {shlex.quote(host.name)} --until-eof'
    if log_level:
        command += f" --log-level {shlex.quote(log_level)}"
    digest = hashlib.sha256(content).hexdigest()
    script = "\n".join(
        [
            "umask 077",
            f"folder={_quote_path(host.ssh_folder or str(file.parent))}",
            f'mkdir -p -- "$folder" && cd -- "$folder" || exit {_COPY_FAILED}',
            f"new=.{name}.$$",
            "trap 'rm -f -- \"$new\"' EXIT",
            f'head -c {len(content)} > "$new" || exit {_COPY_FAILED}',
            f'echo "{digest}  $new" | sha256sum -c --status || exit {_COPY_FAILED}',
            f'cmp -s -- "$new" {name} || mv -f -- "$new" {name} || exit {_COPY_FAILED}',
            'rm -f -- "$new"; trap - EXIT',
            f"exec {command}",
        ]
    )
    return f"exec sh -c {shlex.quote(script)}"  # the login shell may be any


def exit_of(host: str, code: int, lasted_s: float, *, at: float, period_s: float) -> ChildExit:
    """Return what the end of an ssh means for the supervisor of `host`. Pure.

    A topology that can never be served there, or a missing command, is not tried again. A short life, such as that of a
    connection that could not be made, is tried again without end, with growing waits; after a longer one it is
    restarted at once.

    Args:
        host: Its name.
        code: Exit code of ssh, negative for a signal.
        lasted_s: Seconds for which it ran.
        at: When it ended, in seconds of a monotonic clock.
        period_s: `[supervision] period_s`, which a longer life exceeds.
    """
    kind = ExitKind.CRASH if lasted_s >= period_s else ExitKind.START_DELAYED
    if code == EXIT_CANNOT_CONNECT:
        reason = "ssh has lost the connection, or could not make one"
    elif code in _NO_SUCH_COMMAND:
        kind, reason = ExitKind.START_FAILURE, "the command is not there: give its path with ssh_command in [[hosts]]"
    elif code == _CANNOT_SERVE:
        kind, reason = ExitKind.START_FAILURE, "it cannot serve the topology, for the reason above"
    elif code == _COPY_FAILED:
        reason = "the topology could not be written there: see ssh_folder in [[hosts]]"
    else:
        reason = f"it ended with exit code {code}" if code >= 0 else f"ssh was ended by {signal.Signals(-code).name}"
    return ChildExit(host, kind, at, reason)


class SshLauncher:
    """Keeps the supervisor of every host of a topology running over ssh.

    Args:
        topology: With `[[hosts]]`.
        show: Shows what happens, and the lines of each host.
        config: A file for ssh's `-F`; "" for its own.
        log_level: For the remote supervisors; "" for their own default.
    """

    def __init__(self, topology: Topology, show: ShowLine, *, config: str = "", log_level: str = "") -> None:
        self._topology = topology
        self._show = show
        self._config = config
        self._log_level = log_level
        self._content = topology.path.read_bytes()
        self._stopping = asyncio.Event()
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._failed: set[str] = set()

    async def run(self) -> int:
        """Run until `stop`, or until the head's host or all hosts have failed; return the exit code."""
        await asyncio.gather(*(self._keep_up(host) for host in self._topology.hosts))
        return _CANNOT_SERVE if self._failed else 0

    def stop(self) -> None:
        """End the supervisors of all hosts, after their drain; when called again, end every ssh."""
        if self._stopping.is_set():
            for process in self._running.values():
                _signal(process, signal.SIGKILL)
            return
        self._stopping.set()

    async def _keep_up(self, host: HostSection) -> None:
        options = self._topology.supervision
        spec = SupervisorSpec((ChildSpec(host.name),), intensity=options.intensity, period_s=options.period_s)
        history: tuple[float, ...] = ()
        delays = 0
        while not self._stopping.is_set():
            begun = time.monotonic()
            code = await self._run_once(host)
            now = time.monotonic()
            if self._stopping.is_set():
                return
            ended = exit_of(host.name, code, now - begun, at=now, period_s=options.period_s)
            decision = decide_restart(spec, history, ended, jitter=random.random(), delays=delays)  # noqa: S311
            history = decision.history
            delays = delays + 1 if ended.kind is ExitKind.START_DELAYED else 0
            for action in decision.actions:
                if isinstance(action, Retire):
                    self._give_up(host, action.reason)
                    return
            pause = sum(action.seconds for action in decision.actions if isinstance(action, Wait))
            self._show(host.name, f"{ended.reason}; starting it again{f' in {pause:.1f} s' if pause else ''}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    def _give_up(self, host: HostSection, reason: str) -> None:
        self._failed.add(host.name)
        self._show(host.name, f"given up: {reason}")
        if host.name == self._topology.head_host or len(self._failed) == len(self._topology.hosts):
            self.stop()

    async def _run_once(self, host: HostSection) -> int:
        """Run ssh once, and return its exit code."""
        remote = remote_command(host, self._topology.path, self._content, log_level=self._log_level)
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *ssh_command(host, remote, config=self._config),
            stdin=pipe,
            stdout=pipe,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us: ssh has to stay, to show how its host drains
        )
        self._running[host.name] = process
        try:
            shown = asyncio.ensure_future(self._show_lines(host.name, process))
            ended = asyncio.ensure_future(process.wait())
            stopping = asyncio.ensure_future(self._stopping.wait())
            stdin = cast("asyncio.StreamWriter", process.stdin)
            with contextlib.suppress(ConnectionError):  # ssh has ended: its exit code says why
                stdin.write(self._content)
                await stdin.drain()
            await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not ended.done():
                await self._stop_remote(host, process, ended)
            await shown
            return ended.result()
        finally:
            _signal(process, signal.SIGKILL)
            del self._running[host.name]

    async def _stop_remote(
        self, host: HostSection, process: asyncio.subprocess.Process, ended: asyncio.Future[int]
    ) -> None:
        cast("asyncio.StreamWriter", process.stdin).close()  # the end of its stdin, which --until-eof waits for
        bound = stop_bound_s(self._topology) + _MARGIN_S
        for number, seconds in ((None, bound), (signal.SIGTERM, _KILL_AFTER_S), (signal.SIGKILL, _KILL_AFTER_S)):
            if number is not None:
                self._show(host.name, f"has not ended in time: {number.name} for its ssh")
                _signal(process, number)
            await asyncio.wait({ended}, timeout=seconds)
            if ended.done():
                return

    async def _show_lines(self, host: str, process: asyncio.subprocess.Process) -> None:
        stdout = cast("asyncio.StreamReader", process.stdout)
        rest = b""
        while chunk := await stdout.read(_CHUNK):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _CHUNK:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._show(host, shown(line))
        if rest:
            self._show(host, shown(rest))


def shown(line: bytes) -> str:
    """Return a line of another machine as it is shown here. Pure."""
    return printable(line.decode(errors="replace").expandtabs())


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def _quote_path(path: str) -> str:
    """Return a path for the shell, in which a "~" at its start still stands for the home folder."""
    if path == "~" or path.startswith("~/"):
        return f'"$HOME"{shlex.quote(path[1:])}' if path != "~" else '"$HOME"'
    return shlex.quote(path)
