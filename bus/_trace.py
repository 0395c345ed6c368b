"""W3C trace context: https://www.w3.org/TR/trace-context/, version 00."""

from __future__ import annotations

import os
import re
from contextvars import ContextVar

current_traceparent: ContextVar[str] = ContextVar("current_traceparent", default="")
"""The span that this task works for; sent along with every message, "" = not traced.

`Mailbox.receive` sets it to a child of the sender's span.
"""

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


def new_traceparent() -> str:
    """Start a trace: a new trace id, a new span, sampled."""
    return f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01"


def child_traceparent(traceparent: str) -> str:
    """Return a new span of the same trace; what cannot be read starts a new trace, as the standard asks."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None or not int(match[1], 16) or not int(match[2], 16):
        return new_traceparent()
    return f"00-{match[1]}-{os.urandom(8).hex()}-{match[3]}"
