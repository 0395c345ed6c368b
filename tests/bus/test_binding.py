from __future__ import annotations

import asyncio
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from triptych.bus import AddressError, CurveKeys, Mailbox, Message, Outbox, SocketOptions


class Ping(Message):
    pass


class Pong(Message):
    pass


async def ask_once(mailbox: Mailbox) -> Pong:
    outbox = Outbox("test")
    try:
        reference = outbox.reference(mailbox.name, mailbox.address)
        answer = asyncio.ensure_future(reference.ask(Ping(), Pong, timeout_s=20))
        (await mailbox.receive()).reply(Pong())
        return await answer
    finally:
        outbox.close()


def test_the_folder_is_made_for_this_user_alone(run: Callable[..., Any], folder: Path) -> None:
    async def scenario() -> None:
        mailbox = Mailbox("a", f"ipc://{folder}/deep/run/a", (Ping,))
        await mailbox.start()
        assert stat.S_IMODE((folder / "deep/run").stat().st_mode) == 0o700
        assert await ask_once(mailbox) == Pong()
        mailbox.close()
        mailbox.close()
        assert not (folder / "deep/run/a").exists()

    run(scenario())


def test_a_folder_open_to_others_is_refused(run: Callable[..., Any], folder: Path) -> None:
    folder.chmod(0o755)
    with pytest.raises(AddressError, match="chmod 700"):
        run(Mailbox("a", f"ipc://{folder}/a", (Ping,)).start())


def test_a_stale_file_is_replaced(run: Callable[..., Any], folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "a"))  # closed, never unlinked: what a killed process leaves

    async def scenario() -> None:
        mailbox = Mailbox("a", f"ipc://{folder}/a", (Ping,))
        await mailbox.start()
        assert await ask_once(mailbox) == Pong()
        mailbox.close()

    run(scenario())


def test_a_live_mailbox_keeps_its_address(run: Callable[..., Any], folder: Path) -> None:
    async def scenario() -> None:
        first = Mailbox("a", f"ipc://{folder}/a", (Ping,))
        await first.start()
        with pytest.raises(AddressError, match="live process"):
            await Mailbox("a", f"ipc://{folder}/a", (Ping,)).start()
        assert await ask_once(first) == Pong()
        first.close()

    run(scenario())


def test_a_taken_tcp_port_is_refused(run: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = SocketOptions(curve=CurveKeys.new())
        with pytest.raises(AddressError, match="cannot be bound"):
            run(Mailbox("a", f"tcp://127.0.0.1:{port}", (Ping,), options=options).start())


def test_a_plain_file_is_never_removed(run: Callable[..., Any], folder: Path) -> None:
    (folder / "a").write_text("precious")
    with pytest.raises(AddressError, match="no socket"):
        run(Mailbox("a", f"ipc://{folder}/a", (Ping,)).start())
    assert (folder / "a").read_text() == "precious"


def test_a_closed_address_is_free_at_once(run: Callable[..., Any], folder: Path) -> None:
    async def scenario() -> None:
        for _ in range(20):
            for address in (f"ipc://{folder}/a", f"inproc://{folder}"):
                mailbox = Mailbox("a", address, (Ping,))
                await mailbox.start()
                assert await ask_once(mailbox) == Pong()
                mailbox.close()

    run(scenario())


def test_closing_never_takes_the_successors_file(run: Callable[..., Any], folder: Path) -> None:
    async def scenario() -> None:
        old = Mailbox("a", f"ipc://{folder}/a", (Ping,))
        await old.start()
        (folder / "a").unlink()  # the run folder was swept
        successor = Mailbox("a", f"ipc://{folder}/a", (Ping,))
        await successor.start()
        old.close()
        assert await ask_once(successor) == Pong()
        successor.close()

    run(scenario())


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
def test_there_is_no_tcp_without_keys(run: Callable[..., Any], host: str) -> None:
    async def scenario() -> None:
        with pytest.raises(AddressError, match="CURVE"):
            await Mailbox("a", f"tcp://{host}:5999", (Ping,)).start()
        with pytest.raises(AddressError, match="CURVE"):
            Outbox("test").reference("a", f"tcp://{host}:5999").tell(Ping())

    run(scenario())
