from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from triptych.actors.child_state import ChildState
from triptych.actors.placement.service_manager import StatusReporter, describe_status
from triptych.actors.runtime.system_messages import ChildReport


def report(name: str, state: ChildState) -> ChildReport:
    return ChildReport(name, "denoiser", 7, 1, state, 0, "", 0.0)


def test_a_supervisor_is_ready_when_all_its_components_serve() -> None:
    assert describe_status({"head": None, "pool": ChildState.READY}) == (False, "waiting: head not started")
    assert describe_status({"a": ChildState.READY, "b": ChildState.ASLEEP}) == (True, "ready: a, b")
    assert describe_status({"a": ChildState.GAVE_UP, "b": ChildState.READY}) == (False, "waiting: a gave_up")


def test_systemd_and_a_file_are_told_of_each_change(folder: Path) -> None:
    asyncio.run(_hear_each_change(folder))


async def _hear_each_change(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(folder / "notify"))
        manager.setblocking(False)
        environment = {"NOTIFY_SOCKET": str(folder / "notify"), "TRIPTYCH_STATUS_FILE": str(folder / "status")}
        reporter = StatusReporter(environment)
        assert list(environment) == ["TRIPTYCH_STATUS_FILE"]  # children are not to speak for the supervisor
        reporter.watch(["pool", "denoiser-0"])
        running = asyncio.ensure_future(reporter.run())

        async def told() -> list[str]:
            received = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(manager, 4096), 10)
            return received.decode().splitlines()

        waiting = "waiting: pool not started, denoiser-0 not started"
        assert await told() == [f"STATUS={waiting}", "WATCHDOG=1"]
        assert (folder / "status").read_text() == f"{waiting}\n"
        reporter.changed(report("pool", ChildState.READY))
        reporter.changed(report("denoiser-0", ChildState.READY))
        while "READY=1" not in (lines := await told()):
            pass
        assert lines[1] == "STATUS=ready: pool, denoiser-0"
        assert (folder / "status").read_text().startswith("ready")
        assert (await told())[0] == "STATUS=ready: pool, denoiser-0"  # a second later, READY=1 no more
        reporter.changed(report("pool", ChildState.BACKOFF))
        while "STATUS=waiting: pool backoff" not in await told():
            pass
        running.cancel()


def test_nobody_is_told_where_nobody_asks() -> None:
    asyncio.run(asyncio.wait_for(StatusReporter({}).run(), 10))


def test_an_abstract_socket_is_reached() -> None:
    asyncio.run(_hear_over_an_abstract_socket())


async def _hear_over_an_abstract_socket() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("")  # the kernel chooses an abstract address
        manager.setblocking(False)
        name = manager.getsockname()
        environment = {"NOTIFY_SOCKET": f"@{name[1:].decode()}"}
        running = asyncio.ensure_future(StatusReporter(environment).run())
        received = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(manager, 4096), 10)
        assert b"WATCHDOG=1" in received
        running.cancel()
