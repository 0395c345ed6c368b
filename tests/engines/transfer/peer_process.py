"""The test's side of `transfer_peer.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("transfer_peer.py")
WAIT_S = 30.0


class PeerProcess:
    """One peer; `session` and `base` are how others address its arena."""

    def __init__(
        self,
        nbytes: int,
        environ: dict[str, str],
        settings: dict[str, Any],
        popen: Callable[..., subprocess.Popen[str]] = subprocess.Popen,
    ) -> None:
        self.nbytes = nbytes
        self.process = popen(
            [sys.executable, str(SCRIPT), str(nbytes), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environ,
        )
        self._ids = iter(range(1, 1_000_000))
        self._answers: dict[int, Queue[dict[str, Any]]] = {}
        first: Queue[dict[str, Any]] = Queue()
        threading.Thread(target=self._read, args=(first,), daemon=True).start()
        hello = first.get(timeout=WAIT_S)
        assert "session" in hello, f"the peer ended with code {self.process.wait()}"
        self.session: str = hello["session"]
        self.base: int = hello["base"]

    def send(self, do: str, **arguments: Any) -> int:
        number = next(self._ids)
        self._answers[number] = Queue()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"id": number, "do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        return number

    def answer(self, number: int, timeout_s: float = WAIT_S) -> dict[str, Any]:
        return self._answers[number].get(timeout=timeout_s)

    def ask(self, do: str, **arguments: Any) -> Any:
        """The value of the answer; fails the test for an error."""
        reply = self.answer(self.send(do, **arguments))
        assert "error" not in reply, reply
        return reply.get("value")

    def refused(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The error of the answer; fails the test when there is none."""
        reply = self.answer(self.send(do, **arguments))
        assert "error" in reply, reply
        return reply

    def source(self, offset: int, nbytes: int) -> dict[str, Any]:
        """What another peer pulls with to get these bytes."""
        return {"session": self.session, "address": self.base + offset, "nbytes": nbytes}

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _read(self, first: Queue[dict[str, Any]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            (first if "session" in message else self._answers[message["id"]]).put(message)
        first.put({})


def until(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """Ask again and again; fails the test when the condition does not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"


@contextmanager
def peer(
    nbytes: int = 1 << 20,
    environ: dict[str, str] | None = None,
    popen: Callable[..., subprocess.Popen[str]] = subprocess.Popen,
    **settings: Any,
) -> Iterator[PeerProcess]:
    """A peer that ends with the block. `settings` are the keywords of `open_backend`."""
    started = PeerProcess(nbytes, environ or {}, settings, popen)
    try:
        yield started
    finally:
        started.kill()


def arrives(puller: PeerProcess, source: PeerProcess, offset: int, nbytes: int, byte: int) -> bool:
    """Whether a pull to the begin of the arena brings what the source has filled there with a pattern of `byte`."""
    expected = source.ask("fill", offset=offset, nbytes=nbytes, byte=byte)
    puller.ask("pull", **source.source(offset, nbytes), offset=0, timeout_s=20)
    return puller.ask("checksum", offset=0, nbytes=nbytes) == expected
