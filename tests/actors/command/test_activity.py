"""What `triptych status` makes of metrics: queues, and rates between two looks."""

from __future__ import annotations

import io

from rich.console import Console

from triptych.actors.command._activity import Queue, queues, rates, read_look
from triptych.actors.command.status import Seen, render_seen, summarize

BEFORE = """
# TYPE triptych_requests_total counter
triptych_requests_total{component="head",model="m",outcome="done"} 10
# TYPE triptych_step_seconds histogram
triptych_step_seconds_count{component="denoiser-0"} 100
triptych_step_seconds_count{component="denoiser-1"} 50
# TYPE triptych_batch_size histogram
triptych_batch_size_sum{component="denoiser-0"} 200
triptych_batch_size_sum{component="denoiser-1"} 100
# TYPE triptych_transfer_bytes_total counter
triptych_transfer_bytes_total{component="denoiser-0",transfer="load"} 1000
"""
AFTER = """
# TYPE triptych_requests_total counter
triptych_requests_total{component="head",model="m",outcome="done"} 14
triptych_requests_total{component="head",model="m",outcome="timed_out"} 1
# TYPE triptych_step_seconds histogram
triptych_step_seconds_count{component="denoiser-0"} 140
triptych_step_seconds_count{component="denoiser-1"} 20
# TYPE triptych_batch_size histogram
triptych_batch_size_sum{component="denoiser-0"} 280
triptych_batch_size_sum{component="denoiser-1"} 40
# TYPE triptych_transfer_bytes_total counter
triptych_transfer_bytes_total{component="denoiser-0",transfer="load"} 4195304
# TYPE triptych_jobs gauge
triptych_jobs{component="head",model="m",stage="encoder",state="waiting"} 0
triptych_jobs{component="head",model="m",stage="encoder",state="running"} 1
triptych_jobs{component="head",model="m",stage="denoiser",state="waiting"} 3
triptych_jobs{component="head",model="m",stage="denoiser",state="running"} 2
# TYPE triptych_queued_seconds gauge
triptych_queued_seconds{component="head",model="m",stage="denoiser"} 7.5
"""
CLUSTER = {
    "ready": True,
    "actors": [{"name": "head", "state": "ready"}, {"name": "denoiser-0", "state": "backoff"}],
    "hosts": [{"name": "a", "state": "ready"}, {"name": "b", "state": "down"}],
}


def test_rates_are_what_was_done_between_two_looks_also_by_a_process_that_was_started_again() -> None:
    found = rates(read_look(BEFORE, 10.0), read_look(AFTER, 12.0))
    assert found.requests == {"done": 2.0, "timed_out": 0.5}
    assert (found.steps, found.batch) == ((40 + 20) / 2, 2.0)
    assert found.nbytes == 4194304 / 2


def test_queues_are_those_of_each_stage() -> None:
    found = queues(read_look(AFTER, 0.0))
    assert found == [Queue("m", "encoder", 0, 1, 0.0), Queue("m", "denoiser", 3, 2, 7.5)]


def test_a_look_is_one_line_or_tables() -> None:
    look = read_look(AFTER, 12.0)
    seen = Seen(CLUSTER, look, rates(read_look(BEFORE, 10.0), look))
    assert summarize(seen) == (
        "ready, 1 of 2 actors, 1 of 2 hosts, 3 jobs wait, 3 run, "
        "2.0 requests/s, 0.5 timed out/s, 30.0 steps/s of 2.0 requests, 2.0 MiB/s"
    )
    text = io.StringIO()
    Console(file=text, width=120).print(render_seen(seen))
    rows = [row.split() for row in text.getvalue().splitlines()]
    assert rows[2] == ["denoiser", "3", "2", "7.5", "s"]
    assert ["b", "down"] in rows
    assert summarize(Seen({"ready": False, "reasons": ["no decoder"]}, None)) == "not ready, 0 of 0 actors, no decoder"
