"""Which HTTP requests are traced, and how their spans are called."""

from __future__ import annotations

from typing import Any

import pytest

from triptych.api.request_context import begins_trace, child_of, http_span, new_request_id
from triptych.roles.tracing import TraceContext, context_of, traced_request_id

CLIENT = TraceContext("a" * 32, "b" * 16)


def scope(method: str, path: str, **more: Any) -> dict[str, Any]:
    return {"type": "http", "method": method, "path": path, **more}


def test_what_makes_something_begins_a_trace_and_what_looks_does_not() -> None:
    asked = [("POST", "/v1/videos"), ("GET", "/v1/videos"), ("DELETE", "/v1/requests/r"), ("POST", "/metrics")]
    assert [begins_trace(scope(*each)) for each in asked] == [True, False, False, False]


def test_a_client_decides_about_its_own_trace_and_a_share_of_the_others_is_exported() -> None:
    for sampled in (True, False):
        child = child_of(CLIENT._replace(sampled=sampled), new_request_id(), 1.0)
        assert (child.trace_id, child.sampled) == (CLIENT.trace_id, sampled)
        assert child.span_id != CLIENT.span_id
    request_id = new_request_id()
    begun = child_of(None, request_id, 1.0)
    assert (f"req_{begun.trace_id}", begun.sampled) == (request_id, True)
    assert context_of(traced_request_id(begun)) == begun
    assert not child_of(None, request_id, 0.0).sampled


@pytest.mark.anyio
async def test_a_path_writes_no_control_sequences_to_a_log(client, monkeypatch) -> None:
    paths = []
    monkeypatch.setattr("triptych.api.request_context.log.info", lambda _event, **facts: paths.append(facts["path"]))
    await client.get("/v1/%1b]0;x%07/%C2%9B2J/%E5%9B%BE a")
    assert paths == ["/v1/\\x1b]0;x\\x07/\\x9b2J/\u56fe a"]


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (scope("POST", "/v1/videos", endpoint=1, path_params={}), "POST /v1/videos"),
        (
            scope("POST", "/v1/videos/v_1/cancel", endpoint=1, path_params={"video_id": "v_1"}),
            "POST /v1/videos/{video_id}/cancel",
        ),
        (scope("POST", "/v1/what/anybody/likes"), "POST"),
    ],
)
def test_spans_have_few_names(asked: dict[str, Any], name: str) -> None:
    span = http_span(CLIENT, "c" * 16, asked, 200, 1.5)
    assert (span.name, span.parent_id, span.server, span.error) == (name, "c" * 16, True, "")
    assert span.ended - span.began == pytest.approx(1.5)
    assert span.attributes["url.path"] == asked["path"]
    assert http_span(CLIENT, "", asked, 503, 0.1).error == "status 503"
