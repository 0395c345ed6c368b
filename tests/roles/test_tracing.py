"""Which trace a request belongs to, and what its spans are called."""

from __future__ import annotations

import pytest

from triptych.roles.messages.common import Attempt
from triptych.roles.timeline import Span, trace_spans
from triptych.roles.tracing import (
    TraceContext,
    attempt_name,
    context_of,
    is_sampled,
    read_traceparent,
    span_id_of,
    traced_request_id,
)

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONTEXT = TraceContext(TRACE, SPAN)
REQUEST = f"req_{TRACE}-{SPAN}"


@pytest.mark.parametrize(
    ("header", "sampled"),
    [(f"00-{TRACE}-{SPAN}-01", True), (f"00-{TRACE}-{SPAN}-00", False), (f"01-{TRACE}-{SPAN}-03-more", True)],
)
def test_the_trace_of_a_client_is_read(header: str, sampled: bool) -> None:
    assert read_traceparent(header) == TraceContext(TRACE, SPAN, sampled)


@pytest.mark.parametrize(
    "header",
    [
        "", "nonsense", f"00-{TRACE}-{SPAN}", f"00-{TRACE}-{SPAN}-01-more", f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01",
    ],
)  # fmt: skip
def test_what_is_no_traceparent_begins_a_trace(header: str) -> None:
    assert read_traceparent(header) is None


def test_a_traced_request_says_so_in_its_id() -> None:
    assert traced_request_id(CONTEXT) == REQUEST
    assert [context_of(name) for name in (REQUEST, f"{REQUEST}/0", f"{REQUEST}/0.3")] == [CONTEXT] * 3
    assert [context_of(name) for name in ("req_1", f"req_{TRACE}", f"req_{TRACE}-{SPAN}x/0", "")] == [None] * 4
    assert read_traceparent(CONTEXT.traceparent) == CONTEXT


def test_a_share_of_the_traces_is_sampled_and_all_processes_agree_on_which() -> None:
    ids = [f"{'a' * 16}{k << 54:016x}" for k in range(1024)]
    assert [sum(is_sampled(id_, share) for id_ in ids) for share in (0.0, 0.25, 1.0)] == [0, 256, 1024]


def test_a_batch_is_in_the_trace_of_each_of_its_attempts_below_that_attempt() -> None:
    traced, preview, other = Attempt(f"{REQUEST}/0", 2), Attempt(f"{REQUEST}/0.3", 2), Attempt("req_1/0", 1)
    event = Span(track="compute", name="step", began=1.0, ended=2.0, step=3, total_steps=4)
    found = list(trace_spans(event, (traced, other, preview), "denoiser-0", 100.0))
    assert [span.context.trace_id for span in found] == [TRACE] * 2
    assert len({span.context.span_id for span in found}) == 2
    assert [span.parent_id for span in found] == [
        span_id_of(attempt_name(traced, "denoiser-0")), span_id_of(f"{REQUEST}/0"),
    ]  # fmt: skip
    (step, _) = found
    assert (step.name, step.began, step.ended, step.error) == ("step", 101.0, 102.0, "")
    assert step.attributes == {
        "triptych.instance": "denoiser-0", "triptych.attempt": 2, "triptych.step": 3, "triptych.steps": 4,
        "triptych.batch": 3,
    }  # fmt: skip
