"""The supervisor's side of the zygote, and the messages between the two; the other side is `zygote`."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from triptych.actors.supervision._child_process import ChildProcess, ExitStatus, module_command, spawn_process

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_MESSAGE_BYTES: Final = 1 << 16
_log = structlog.stdlib.get_logger("actors")


class Warm(msgspec.Struct, frozen=True, tag=True):
    """The zygote has done its imports."""

    seconds: float
    """Time that they took."""
    problem: str
    """Why a module could not be imported, "" if all were."""


class Fork(msgspec.Struct, frozen=True, tag=True):
    """Fork a process and run `component_process` in it."""

    arguments: tuple[str, ...]
    """Its command line."""


class Forked(msgspec.Struct, frozen=True, tag=True):
    """The answer to a `Fork`."""

    pid: int
    """The new process, a child of the supervisor; 0 if there is none."""
    problem: str
    """Why there is none, else ""."""


_decode = msgspec.msgpack.Decoder(Warm | Forked).decode
_encode = msgspec.msgpack.Encoder().encode


class ForkUnavailableError(Exception):
    """The zygote cannot fork: it has ended, or a fork would not be safe."""


class ZygoteClient:
    """One zygote process, which imports its modules in the background."""

    def __init__(self, preload: Sequence[str], environment: Mapping[str, str]) -> None:
        self.was_warm = False
        self._loop = asyncio.get_running_loop()
        self._warm: asyncio.Future[None] = self._loop.create_future()
        self._warm.add_done_callback(_consume_exception)
        self._answer: asyncio.Future[Forked] | None = None
        self._turn = asyncio.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            theirs.set_inheritable(True)
            options = ("--channel", str(theirs.fileno()), "--parent", str(os.getpid()))
            self._process = ChildProcess(
                spawn_process(
                    (*module_command("triptych.actors.supervision.zygote"), *options, "--preload", *preload),
                    environment,
                )
            )
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket, self._on_readable)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def fork(self, arguments: tuple[str, ...]) -> int:
        """Fork a component process, a child of this process, and return its pid; raises `ForkUnavailableError`."""
        await asyncio.shield(self._warm)
        async with self._turn:
            if self._socket.fileno() < 0:
                raise ForkUnavailableError("it has ended")
            self._answer = self._loop.create_future()
            try:
                self._socket.send(_encode(Fork(arguments)))
                # The fork happens once it is asked for, so its pid is awaited in any case.
                answer = await self._answer
            except OSError as error:
                raise ForkUnavailableError(f"it cannot be asked: {error.strerror}") from error
            finally:
                self._answer = None
        if answer.problem:
            raise ForkUnavailableError(answer.problem)
        return answer.pid

    async def wait(self) -> ExitStatus:
        """Wait for its exit, and return how it exited."""
        return await self._process.wait()

    async def kill(self) -> None:
        """Kill it; the processes that it forked go on."""
        self._process.signal(signal.SIGKILL)
        await self._process.wait()
        while self._socket.fileno() >= 0:  # an answer may still be in the socket
            self._on_readable()

    def _on_readable(self) -> None:
        try:
            frame = self._socket.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            frame = b""
            _log.warning("the socket of the zygote failed", error=error.strerror)
        if not frame:
            self._close_socket("it has ended")
            return
        message = _decode(frame)
        if isinstance(message, Warm):
            self._on_warm(message)
        elif self._answer is not None and not self._answer.done():
            self._answer.set_result(message)

    def _on_warm(self, message: Warm) -> None:
        self.was_warm = True
        if message.problem:
            _log.warning("the zygote lacks a module", problem=message.problem)
        _log.info("zygote is warm", pid=self.pid, seconds=round(message.seconds, 2))
        self._warm.set_result(None)

    def _close_socket(self, why: str) -> None:
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()
        for waiting in (self._warm, self._answer):
            if waiting is not None and not waiting.done():
                waiting.set_exception(ForkUnavailableError(why))


def _consume_exception(future: asyncio.Future[None]) -> None:
    if not future.cancelled():
        future.exception()  # retrieved here, so that it is not logged if nothing waits for a fork
