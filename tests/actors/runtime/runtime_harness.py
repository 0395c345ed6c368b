"""Actors that do what they are told, and a runtime around them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog

from triptych.actors import Actor, ActorCrashedError, AddressBook, DeferredReply, Incarnation
from triptych.actors.runtime.runtime import Runtime
from triptych.actors.runtime.system_messages import Inspect, Inspection
from triptych.bus import (
    Message,
    Outbox,
    Reference,
    RefusedError,
    RemoteError,
)


class Work(Message):
    request_id: str
    text: str = ""


class Done(Message):
    text: str


class Tell(Message):
    text: str


class Told(Message):
    pass


class Texts(Message):
    texts: tuple[str, ...]


class Open(Message):
    pass


class AskSender(Message):
    pass


class AskSenderLater(Message):
    pass


class SentBy(Message):
    name: str
    generation: int


class Worker(Actor):
    """Does what the text of its work says."""

    mailbox_capacity = 4

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.gate = asyncio.Event()
        self.entered = asyncio.Event()
        self.texts: list[str] = []
        self.texts_when_caught_up: list[int] = []
        self.drained = False

    async def started(self) -> None:
        if self.name == "peer":
            self.set_state("joining", "waits for worker")

    async def stopping(self) -> None:
        self.drained = True

    def caught_up(self) -> None:
        self.texts_when_caught_up.append(len(self.texts))

    async def work(self, message: Work) -> Done:
        match message.text:
            case "refuse":
                raise RefusedError("not_today", "come back tomorrow")
            case "crash":
                raise ValueError("out of paper")
            case "wait":
                self.entered.set()
                await self.gate.wait()
            case "cancelled":
                task = self.spawn(asyncio.Event().wait(), name="waiter")
                task.cancel()
                await task
            case "context":
                return Done(str(structlog.contextvars.get_contextvars()))
            case "nothing":
                return None  # type: ignore[return-value]
            case "peer":
                return await self.reference("peer").ask(Work(message.request_id, "echo"), Done, timeout_s=5)
        return Done(message.text)

    async def tell(self, message: Tell) -> None:
        self.texts.append(message.text)
        if message.text == "spawn a crash":
            self.spawn(self._crash(), name="crash")
        if message.text == "open":
            self.gate.set()

    async def told(self, message: Told) -> Texts:
        return Texts(tuple(self.texts))

    async def sent_by(self, message: AskSender) -> SentBy:
        return SentBy(*self.sender)

    async def sent_by_later(self, message: AskSenderLater) -> DeferredReply[SentBy]:
        return DeferredReply(self._sent_by_later())

    async def _sent_by_later(self) -> SentBy:
        self.entered.set()
        await self.gate.wait()
        return SentBy(*self.sender)

    async def later(self, message: Open) -> DeferredReply[Done]:
        return DeferredReply(self._wait_for_gate())

    async def _wait_for_gate(self) -> Done:
        self.entered.set()
        await self.gate.wait()
        if "refuse later" in self.texts:
            raise RefusedError("late", "no")
        if "crash later" in self.texts:
            raise KeyError("late")
        return Done("later")

    async def _crash(self) -> None:
        raise LookupError("no such thing")


class Starting(Actor):
    """Starts when it is let, or fails to."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        super().__init__(name)
        self.error = error
        self.gate = asyncio.Event()
        self.loading = asyncio.Event()

    async def started(self) -> None:
        self.loading.set()
        if self.error is not None:
            raise self.error
        await self.gate.wait()

    async def tell(self, message: Tell) -> None:
        pass


class RuntimeHarness:
    """A runtime, and a client outside of it."""

    def __init__(self, folder: Path, *actors: Actor) -> None:
        self.address_book = AddressBook(None, {actor.name: f"ipc://{folder}/{actor.name}" for actor in actors})
        self.runtime = Runtime(actors, Incarnation(self.address_book, 7, restarts=2, kind="test"))
        self.outbox = Outbox("client")

    def reference(self, name: str) -> Reference:
        return self.outbox.reference(name, self.address_book.address(name))


async def ask(reference: Reference, text: str = "") -> str:
    return (await reference.ask(Work("r1", text), Done, timeout_s=5)).text


@asynccontextmanager
async def busy_worker(folder: Path) -> AsyncIterator[tuple[Worker, Reference, asyncio.Task[str]]]:
    """A worker whose handler runs until its gate is opened, and the ask that it handles."""
    worker = Worker("worker")
    harness = RuntimeHarness(folder, worker)
    async with harness.runtime:
        reference = harness.reference("worker")
        waiting = asyncio.create_task(ask(reference, "wait"))
        await worker.entered.wait()
        yield worker, reference, waiting


async def until_queued(reference: Reference, count: int) -> None:
    """Wait until that many messages are in the mailbox."""
    while (await reference.ask(Inspect(), Inspection, timeout_s=5)).actors[0].mailbox_depth < count:
        pass


async def crash_of(harness: RuntimeHarness, use: Callable[[Reference], Awaitable[object]]) -> ActorCrashedError:
    """What the runtime raises after its worker has been used so that it crashes."""

    async def serve() -> None:
        async with harness.runtime:
            await use(harness.reference("worker"))
            await harness.runtime.wait()

    with pytest.raises(ActorCrashedError) as caught:
        await serve()
    return caught.value


async def failure_of(reference: Reference, message: Message) -> RemoteError:
    """With what an ask is answered."""
    with pytest.raises(RemoteError) as caught:
        await reference.ask(message, Done, timeout_s=5)
    return caught.value


def run(scenario: object) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await scenario  # type: ignore[misc]

    asyncio.run(bounded())
