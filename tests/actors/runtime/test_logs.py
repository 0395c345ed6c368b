"""The log of a process, line by line."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
import weakref

from tests.actors.supervision.supervised import ROOT
from triptych.actors.runtime import logs

FROM_A_CLIENT = """
import structlog
from triptych.actors.runtime import logs
logs.configure("api")
try:
    raise ValueError("first\\nsecond \\x1b]0;title\\x07")
except ValueError:
    structlog.stdlib.get_logger("api").exception("refused", path="/\\x1b[2Jx")
"""
LOGGING = """
import logging, structlog
from triptych.actors.runtime import logs
logs.configure("head", 7)
log = structlog.stdlib.get_logger("actor").bind(actor="head")
with structlog.contextvars.bound_contextvars(request_id="r1"):
    log.info("taken in", steps=4)
logging.getLogger("a.library").warning("from %s", "elsewhere")
log.debug("not shown")
try:
    raise ValueError("boom")
except ValueError:
    log.exception("crashed")
"""


def test_a_terminal_gets_no_command_that_a_client_has_sent() -> None:
    master, slave = pty.openpty()
    try:
        subprocess.run([sys.executable, "-c", FROM_A_CLIENT], cwd=ROOT, stderr=slave, check=True)
        shown = os.read(master, 1 << 16).decode().replace("\r\n", "\n")
    finally:
        os.close(master)
        os.close(slave)
    assert "/\\x1b[2Jx" in shown
    assert "ValueError: first\nsecond \\x1b]0;title\\x07" in shown, "a traceback keeps its lines"
    assert not any(command in shown for command in ("\x1b[2J", "\x1b]0", "\x07"))


def test_logs_are_json_lines_with_process_generation_and_request() -> None:
    done = subprocess.run([sys.executable, "-c", LOGGING], cwd=ROOT, capture_output=True, text=True, check=True)
    taken, library, crashed = (json.loads(line) for line in done.stderr.splitlines())
    assert taken.pop("timestamp")
    assert taken == {
        "process": "head",
        "generation": 7,
        "actor": "head",
        "request_id": "r1",
        "event": "taken in",
        "steps": 4,
        "level": "info",
    }
    assert (library["event"], library["process"], library["level"]) == ("from elsewhere", "head", "warning")
    assert "ValueError: boom" in crashed["exception"]


def test_a_line_is_made_once_for_all_handlers_and_nothing_else_is_kept_of_a_record() -> None:
    formatter = logs._formatter([])
    record = logging.LogRecord("library", logging.INFO, "", 0, "text", None, None)
    line = formatter.format(record)
    assert formatter.format(record) is line
    kept = weakref.ref(record)
    del record
    assert kept() is None
