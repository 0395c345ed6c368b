"""The zygote: a process that has imported the large libraries, and forks the processes that need them.

A fork takes a tenth of a second where the imports take seconds, and it shares their memory. It is safe as long as the
zygote has one thread, no event loop, no CUDA and no transfer engine. The zygote checks that before each fork, and
refuses if it does not hold.

Each child is forked twice, and the process between ends at once: the child then becomes a child of the supervisor, a
subreaper, which reaps it and with which it dies. The end of the zygote affects no child.

Over a socketpair of whole messages (SOCK_SEQPACKET): first the zygote sends a `Warm`, then it answers each `Fork`
with a `Forked`.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import random
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from setproctitle import setproctitle

from triptych.actors.errors import describe
from triptych.actors.supervision import component_process
from triptych.actors.supervision._process_tree import die_with_parent
from triptych.actors.supervision._zygote_client import MAX_MESSAGE_BYTES, Fork, Forked, Warm
from triptych.engines.backends import BACKENDS

if TYPE_CHECKING:
    from collections.abc import Sequence

FORBIDDEN: Final = tuple(spec.package for spec in BACKENDS.values() if not spec.fork_safe)
"""Modules that must not be imported before a fork: their threads and locks do not survive it."""


_decode_fork = msgspec.msgpack.Decoder(Fork).decode
_encode = msgspec.msgpack.Encoder().encode


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until the supervisor's end of the socket closes; in a forked child, run the component."""
    options = _parse(arguments)
    die_with_parent()
    if os.getppid() != options.parent:
        return 0
    setproctitle("triptych: zygote")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it has no tasks to dump
    channel = socket.socket(fileno=options.channel)
    channel.send(_encode(warm_up(tuple(options.preload))))
    run = _serve(channel, options.parent)
    if run is None:
        return 0
    channel.close()
    _detach_from_zygote(options.parent)
    return component_process.main(run)


def warm_up(modules: tuple[str, ...]) -> Warm:
    """Import the modules, and freeze their objects so that the garbage collector does not unshare their memory."""
    begun = time.monotonic()
    problem = ""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001  the role that needs the module reports the same error
            problem = f"{module} cannot be imported: {describe(error)}"
    gc.collect()
    gc.freeze()
    return Warm(time.monotonic() - begun, problem)


def fork_problem() -> str:
    """Return why a fork of this process would not be safe, "" if it is."""
    threads = sum(1 for _ in Path("/proc/self/task").iterdir())
    if threads > 1:
        named = ", ".join(thread.name for thread in threading.enumerate())
        return f"the zygote has {threads} threads ({named} and native ones)"
    for module in FORBIDDEN:
        if module in sys.modules:
            return f"the zygote has imported {module}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "the zygote has initialised CUDA"
    return ""


def _serve(channel: socket.socket, supervisor: int) -> tuple[str, ...] | None:
    """Answer requests; return None at their end, and in a forked child its command line."""
    while True:
        frame = channel.recv(MAX_MESSAGE_BYTES)
        if not frame:
            return None
        arguments = _decode_fork(frame).arguments
        problem = fork_problem()
        if not problem:
            try:
                pid = _fork_twice()
            except OSError as error:
                problem = f"no fork: {error.strerror}"
            else:
                if pid == 0:
                    return arguments
                channel.send(_encode(Forked(pid, "")))
                continue
        channel.send(_encode(Forked(0, problem)))


def _fork_twice() -> int:
    """Fork twice; return the pid of the grandchild once the supervisor is its parent, and 0 in the grandchild."""
    readable, writable = os.pipe()
    between = os.fork()
    if between == 0:
        try:
            pid = os.fork()
        except OSError as error:
            os.write(writable, f"-{error.errno}".encode())
            os._exit(1)
        if pid:
            os.write(writable, str(pid).encode())
            os._exit(0)
        os.close(readable)
        os.close(writable)
        return 0
    os.close(writable)
    os.waitpid(between, 0)  # when it ends, the supervisor adopts the grandchild
    told = int(os.read(readable, 32) or b"-12")
    os.close(readable)
    if told < 0:
        raise OSError(-told, os.strerror(-told))
    return told


def _detach_from_zygote(supervisor: int) -> None:
    _wait_for_parent(supervisor)
    for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    random.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.seed()


def _wait_for_parent(supervisor: int) -> None:
    """Wait until the process between has ended: its end would otherwise count as that of the parent."""
    parent = os.getppid()
    if parent == supervisor:
        return
    try:
        pidfd = os.pidfd_open(parent)
    except ProcessLookupError:
        return  # ended and reaped since
    select.select([pidfd], [], [])
    os.close(pidfd)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m triptych.actors.supervision.zygote", description=__doc__)
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the socketpair")
    parser.add_argument("--parent", type=int, required=True, help="pid of the supervisor")
    parser.add_argument("--preload", nargs="*", default=[], help="modules to import")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    component_process.exit_now(main())
