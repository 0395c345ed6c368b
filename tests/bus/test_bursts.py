"""The descriptor of a ZMQ socket is edge triggered: one missed wake-up and a message waits forever."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from triptych.bus import Delivery, Mailbox, Message, Outbox, SocketOptions

Run = Callable[..., Any]


class Number(Message):
    value: int


class Twice(Message):
    value: int


class Broken(Message):
    pass


@contextlib.asynccontextmanager
async def doubling(name: str, folder: Path) -> AsyncIterator[str]:
    mailbox = Mailbox(name, f"ipc://{folder}/{name}", (Number,), capacity=4096)
    await mailbox.start()

    async def serve() -> None:
        while True:
            delivery = await mailbox.receive()
            assert isinstance(delivery.message, Number)
            delivery.reply(Twice(2 * delivery.message.value))

    task = asyncio.create_task(serve())
    try:
        yield mailbox.address
    finally:
        task.cancel()
        mailbox.close()


def test_bursts_of_asks_in_both_directions(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        async with doubling("a", folder) as a, doubling("b", folder) as b:
            outboxes = [Outbox("a"), Outbox("b")]
            towards = [outboxes[0].reference("b", b), outboxes[1].reference("a", a)]
            for size in (1, 2, 700, 3, 1000, 1, 500, 64):
                asks = [
                    reference.ask(Number(value), Twice, timeout_s=25) for value in range(size) for reference in towards
                ]
                answers = await asyncio.gather(*asks)
                assert answers == [Twice(2 * value) for value in range(size) for _ in towards]
            for outbox in outboxes:
                outbox.close()

    run(scenario())


def test_one_at_a_time_and_many_at_once_mixed(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        async with doubling("a", folder) as a:
            outbox = Outbox("test")
            reference = outbox.reference("a", a)

            async def worker(count: int) -> None:
                for value in range(count):
                    assert await reference.ask(Number(value), Twice, timeout_s=25) == Twice(2 * value)

            await asyncio.gather(*(worker(count) for count in (1, 10, 100, 1000, 1000)))
            outbox.close()

    run(scenario())


def test_a_burst_of_tells_arrives_whole_and_in_order(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        mailbox = Mailbox("a", f"ipc://{folder}/a", (Number,), capacity=4096)
        await mailbox.start()
        outbox = Outbox("test", options=SocketOptions(high_water_mark=4096))
        reference = outbox.reference("a", mailbox.address)
        for burst in range(3):
            for value in range(2000):
                reference.tell(Number(value))
            for value in range(2000):
                assert (await mailbox.receive()).message == Number(value), burst
        outbox.close()
        mailbox.close()

    run(scenario())


def test_a_failing_receiver_does_not_stall_the_messages_behind(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        def broken(_delivery: Delivery) -> None:
            raise RuntimeError("broken")

        mailbox = Mailbox("a", f"ipc://{folder}/a", (Number,), urgent={Broken: broken})
        reported: list[BaseException] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context["exception"]))
        await mailbox.start()
        outbox = Outbox("test")
        reference = outbox.reference("a", mailbox.address)
        for value in range(100):
            if value == 3:
                reference.tell(Broken())
            reference.tell(Number(value))
        received = [(await mailbox.receive()).message for _ in range(100)]
        assert received == [Number(value) for value in range(100)]
        assert [str(error) for error in reported] == ["broken"]
        outbox.close()
        mailbox.close()

    run(scenario())


class CountingSelector(selectors.DefaultSelector):
    """Counts how often the loop goes round."""

    turns = 0

    def select(self, timeout: float | None = None) -> Any:
        self.turns += 1
        return super().select(timeout)


def test_without_traffic_the_loop_stands_still(folder: Path) -> None:
    selector = CountingSelector()

    async def scenario() -> None:
        async with doubling("a", folder) as a:
            outbox = Outbox("test")
            reference = outbox.reference("a", a)
            await asyncio.gather(*(reference.ask(Number(n), Twice, timeout_s=25) for n in range(50)))
            down = asyncio.ensure_future(reference.down())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):  # what the burst left behind
                    await down
            before = selector.turns
            watch = asyncio.ensure_future(reference.down())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await watch
            assert selector.turns - before < 8  # the time-out itself takes a few
            outbox.close()

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(scenario())
