"""The events of the cluster: what its supervisors tell comes at once, and no snapshot contradicts it."""

from __future__ import annotations

import asyncio

import pytest

from triptych.actors.runtime.system_messages import ChildReport, SupervisorQuery, SupervisorReport, SupervisorWait
from triptych.api.cluster_events import ClusterEvents
from triptych.bus import Delivery, Mailbox

pytestmark = pytest.mark.anyio
BOUND_S = 20.0


class FakeSupervisor:
    """A supervisor's mailbox; the test says how its children are."""

    def __init__(self, topology) -> None:
        address = f"ipc://{topology.run_dir}/supervisor"
        self.mailbox = Mailbox("supervisor", address, (SupervisorQuery, SupervisorWait), generation=1)
        self.report = SupervisorReport((child("ready", 1), other()), 1)
        self.waiting: list[Delivery] = []
        self.asked = asyncio.Event()
        """Set when somebody waits for the next change."""

    async def __aenter__(self) -> FakeSupervisor:
        await self.mailbox.start()
        self.task = asyncio.get_running_loop().create_task(self._serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        self.mailbox.close()

    def change(self, *children: ChildReport) -> None:
        self.report = SupervisorReport(children, self.report.revision + 1)
        for delivery in self.waiting:
            delivery.reply(self.report)
        self.waiting.clear()

    async def _serve(self) -> None:
        while True:
            delivery = await self.mailbox.receive()
            match delivery.message:
                case SupervisorWait(revision) if revision == self.report.revision:
                    self.waiting.append(delivery)
                    self.asked.set()
                case _:
                    delivery.reply(self.report)


def child(state: str, generation: int, reason: str = "", *, silence_s: float = 0.0) -> ChildReport:
    restarts = generation - 1
    return ChildReport("denoiser-0", "denoiser", 42, generation, state, restarts, reason, 1.0, silence_s=silence_s)


def other() -> ChildReport:
    return ChildReport("decoder-0", "decoder", 43, 1, "ready", 0, "", 1.0)


async def until(stream, name: str) -> dict:
    """The next event of that name."""
    async for event in stream:
        if event.name == name:
            return event.data
    raise AssertionError


async def test_a_change_of_a_component_is_told_at_once_and_later_snapshots_agree_with_it(services, fake_head, topology):
    async with asyncio.timeout(BOUND_S), FakeSupervisor(topology) as supervisor:
        stream = ClusterEvents(services.cluster).stream()
        first = await anext(stream)
        assert (first.name, first.data["head"]["completed"]) == ("cluster", 3)
        await supervisor.asked.wait()
        supervisor.asked.clear()
        supervisor.change(child("backoff", 1, "killed by SIGKILL"), other())
        told = await until(stream, "component")
        assert (told["component"], told["state"], told["generation"]) == ("denoiser-0", "backoff", 1)
        assert told["reason"] == "killed by SIGKILL"
        seen = await until(stream, "cluster")
        (row,) = (row for row in seen["actors"] if row["name"] == "denoiser-0")
        assert row["state"] == "backoff"
        await stream.aclose()


async def test_what_is_as_before_is_not_told(services, fake_head, topology):
    async with asyncio.timeout(BOUND_S), FakeSupervisor(topology) as supervisor:
        stream = ClusterEvents(services.cluster).stream()
        await anext(stream)
        await supervisor.asked.wait()
        supervisor.asked.clear()
        supervisor.change(child("ready", 1, silence_s=1.0), other())
        await supervisor.asked.wait()
        supervisor.asked.clear()
        supervisor.change(child("starting", 2), other())
        assert (await until(stream, "component"))["state"] == "starting"
        await stream.aclose()


async def test_those_who_ask_together_share_a_snapshot(services, fake_head):
    observer = services.cluster
    (at, one), (same_at, other_one) = await asyncio.gather(observer.shared_snapshot(0.0), observer.shared_snapshot(0.0))
    assert (at, one is other_one) == (same_at, True)
    later, new = await observer.shared_snapshot(at + 1e-9)
    assert later > at
    assert new is not one
