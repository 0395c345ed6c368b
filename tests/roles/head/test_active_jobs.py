"""The indexes of active jobs forget those that have ended."""

from __future__ import annotations

from triptych.roles.head.active_jobs import SPARE_EXPIRIES, ActiveJobs, Ranking
from triptych.roles.head.job import Clock, Job


def test_what_is_kept_of_timeouts_is_bounded_by_the_active_jobs_and_each_of_those_times_out() -> None:
    jobs = ActiveJobs(Clock(), lambda _: Ranking(0, b"", None), lambda _: None, lambda _: 0.0)
    active = [Job(f"active/{k}", "active", k, 0, 600.0 + k) for k in range(3)]
    for job in active:
        jobs.add(job)
    for k in range(10_000):
        jobs.add(job := Job(f"r{k}/0", f"r{k}", 0, 0, 500.0))
        jobs.remove(job)
    assert len(jobs._expiries) <= 2 * len(active) + SPARE_EXPIRIES
    jobs.clock.now = 601.0
    assert jobs.take_expired() == (active[0], active[1])
