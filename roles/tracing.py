"""The trace of a request: which spans it has, and what identifies them. Pure.

    POST /v1/images/generations    api         the HTTP request; continues the trace of the client
      request                      head        from its acceptance to its end
        job                        head        one for each image or video
          wait                     head        for an instance of the next stage
          encoder                  head        an attempt: from its assignment to its report, or its loss
            run, step, store, ...  instance    what the timeline of that process records

A request that is traced says so in its id: `req_TRACE-SPAN`, with the ids of the trace and of the HTTP span, in hex.
So each process knows the trace of whatever it does for a job, and messages carry nothing more than that id, which
they have anyway. The ids of spans with children follow from the names of what they are about, so that a child can be
made in another process, before its parent, and without a word between them.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final, NamedTuple, TypeAlias

from triptych.roles.messages.common import Attempt

AttributeValue: TypeAlias = str | bool | int | float

# https://www.w3.org/TR/trace-context/: a later version may add fields at the end.
_TRACEPARENT: Final = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?"
)
REQUEST_ID_PREFIX: Final = "req_"
REQUEST_ID_PATTERN: Final = rf"{REQUEST_ID_PREFIX}[0-9a-f]{{32}}(?:-[0-9a-f]{{16}})?"
"""The ids that the API gives to requests, traced or not."""
_REQUEST_ID: Final = re.compile(rf"{REQUEST_ID_PREFIX}(?P<trace>[0-9a-f]{{32}})-(?P<span>[0-9a-f]{{16}})")


class TraceContext(NamedTuple):
    """A span of a trace, as the header `traceparent` has it."""

    trace_id: str
    """32 hex digits."""
    span_id: str
    """16 hex digits."""
    sampled: bool = True
    """Whether its spans are exported."""

    @property
    def traceparent(self) -> str:
        """Return the header."""
        return f"00-{self.trace_id}-{self.span_id}-{self.sampled:02x}"


@dataclass(frozen=True, slots=True)
class TraceSpan:
    """A span that has ended."""

    context: TraceContext
    name: str
    began: float
    """Unix seconds."""
    ended: float
    parent_id: str = ""
    """Span id of its parent; "" if it begins its trace."""
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    error: str = ""
    """Why it failed; "" if it did not."""
    server: bool = False
    """Whether it is of a request of a client."""


def read_traceparent(header: str) -> TraceContext | None:
    """Return the context of a W3C `traceparent` header; None if it has none that can be continued."""
    match = _TRACEPARENT.fullmatch(header)
    if match is None or match["version"] == "ff" or (match["version"] == "00" and match["more"]):
        return None
    if not int(match["trace"], 16) or not int(match["span"], 16):
        return None
    return TraceContext(match["trace"], match["span"], bool(int(match["flags"], 16) & 1))


def is_sampled(trace_id: str, share: float) -> bool:
    """Return whether a trace is among the share of those that are exported; the same for all who ask."""
    return int(trace_id[16:], 16) < share * 2**64


def new_span_id() -> str:
    """Return the id of a span that has no children in other processes."""
    return secrets.token_hex(8)


# -- the ids of a request


def traced_request_id(context: TraceContext) -> str:
    """Return the id of a request that a traced HTTP request submits; `context` is that of its span."""
    return f"{REQUEST_ID_PREFIX}{context.trace_id}-{context.span_id}"


def context_of(request_or_job_id: str) -> TraceContext | None:
    """Return the context of the HTTP request that submitted a request, job or preview; None if it is not traced."""
    match = _REQUEST_ID.fullmatch(request_or_job_id.partition("/")[0])
    return TraceContext(match["trace"], match["span"]) if match else None


def span_id_of(name: str) -> str:
    """Return the id of the span of a request or a job, by its id; of an attempt, by `attempt_name`."""
    return blake2b(name.encode(), digest_size=8).hexdigest()


def attempt_name(attempt: Attempt, instance: str) -> str:
    """Return what tells an attempt from all others of its trace: one number is for several stages."""
    return f"{attempt}@{instance}"
