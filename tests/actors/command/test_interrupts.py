"""Commands that are ended while they work: by Ctrl-C, and by a pipe that nobody reads any more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from triptych.actors.supervision import module_command

COMMAND = module_command("triptych.actors.command")
RUNNING = {"id": "r1", "state": "DENOISING_RUNNING", "terminal": False, "units": [{"step": 0, "total_steps": 4}]}
PATIENCE_S = 90.0


@contextmanager
def served(answer: Callable[[str, str], dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """An API that answers with JSON; yields its URL, and what it is asked for, as "GET /path"."""
    asked: list[str] = []

    class Api(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append(f"{self.command} {self.path}")
            body = json.dumps(answer(self.command, self.path)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_DELETE = _answer  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None: ...  # who asked has gone

    with Server(("127.0.0.1", 0), Api) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("at", "said", "deleted"),
    [
        ("POST", "Interrupted.", []),
        ("GET", "Interrupted; the request is cancelled.", ["DELETE /v1/requests/r1"]),
    ],
)
def test_generate_says_that_a_request_is_cancelled_where_it_is(
    at: str, said: str, deleted: list[str], tmp_path: Path
) -> None:
    started = threading.Event()
    ended = threading.Event()
    signals = iter([signal.SIGINT])
    process: subprocess.Popen[str]

    def answer(method: str, _path: str) -> dict[str, Any]:
        if method == at and started.wait(PATIENCE_S):
            for number in signals:  # once: the next one would end what the first one began
                process.send_signal(number)
            if at == "POST":
                ended.wait(PATIENCE_S)  # an answer would be one to wait for
        return RUNNING

    with served(answer) as (url, asked):
        command = (*COMMAND, "generate", "a cat", "--url", url, "-o", str(tmp_path / "cat.png"), "--draw", "off")
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        started.set()
        _, shown = process.communicate(timeout=PATIENCE_S)
        ended.set()
    assert (process.returncode, shown.strip()) == (130, said)
    assert [line for line in asked if line.startswith("DELETE")] == deleted


def test_a_load_ends_when_nobody_reads_its_results() -> None:
    with served(lambda _method, _path: {"id": "r1"}) as (url, _):
        reading, writing = os.pipe()
        command = (*COMMAND, "bench", url, "--json", "--rate", "100", "--arrivals", "constant", "--seconds", "9999")
        process = subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, text=True)
        os.close(writing)
        with os.fdopen(reading) as results:
            first = json.loads(results.readline())
        _, shown = process.communicate(timeout=PATIENCE_S)
    assert (first["outcome"], process.returncode) == ("done", 1)
    assert "Traceback" not in shown
