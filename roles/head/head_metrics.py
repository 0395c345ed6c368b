"""The head's metrics: of requests that have ended, and of the jobs that wait and run now."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from triptych.engines.stages import Stage
from triptych.roles.head.job import HAPPY_PATH, RUNNING, STAGE_OF, WAITING, Job, Request, State
from triptych.roles.messages.requests import PromptCacheView
from triptych.roles.metrics import RECOVERY_SECONDS, REQUEST_SECONDS, REQUESTS, STAGE_SECONDS, WAIT_SECONDS

_SMOOTHING = 0.2
"""Weight of the newest time in the mean."""


class StageTimes:
    """How long the stages of a model take, learnt from jobs that are done; a denoise by its steps."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, Stage], float] = {}

    def learn(self, model: str, job: Job) -> None:
        """Learn from a job that is done."""
        for stage in Stage:
            seconds = job.stage_seconds.get(stage.value)
            if seconds is not None:
                each = seconds / max(1, job.total_steps) if stage is Stage.DENOISER else seconds
                known = self._seconds.get((model, stage), each)
                self._seconds[model, stage] = known + _SMOOTHING * (each - known)

    def expected(self, model: str, stage: Stage, request: Request, job: Job) -> float:
        """Return the seconds that a stage of a job will compute; 0 while nothing is known."""
        steps = (request.steps_left(job) or 1) if stage is Stage.DENOISER else 1
        return steps * self._seconds.get((model, stage), 0.0)


def observe_ended(model: str, request: Request, times: StageTimes) -> None:
    """Count a request that has ended, and the waits, stages and recoveries of its jobs."""
    REQUESTS.labels(model, request.state.value.lower()).inc()
    if request.state is State.DONE:
        REQUEST_SECONDS.labels(model).observe(max(0.0, request.finished_at - request.created_at))
    for job in request.jobs:
        for stage, seconds in waits(job):
            WAIT_SECONDS.labels(model, stage.value).observe(seconds)
        for stage, seconds in recoveries(job):
            RECOVERY_SECONDS.labels(model, stage.value).observe(seconds)
        for stage_name, seconds in job.stage_seconds.items():
            STAGE_SECONDS.labels(model, stage_name).observe(seconds)
        if job.state is State.DONE:
            times.learn(model, job)


def waits(job: Job) -> Iterator[tuple[Stage, float]]:
    """Yield each stage that the job waited for, and for how many seconds."""
    for move, following in pairwise(job.history):
        stage = STAGE_OF.get(State(move.state))
        if stage and move.state == WAITING[stage] and following.state == RUNNING[stage]:
            yield stage, max(0.0, following.at - move.at)


def recoveries(job: Job) -> Iterator[tuple[Stage, float]]:
    """Yield each stage that ran, or was to run, when the job went back, and the seconds until it ran again."""
    lost: dict[Stage, float] = {}
    for move, following in pairwise(job.history):
        stage = STAGE_OF.get(State(move.state))
        if stage and HAPPY_PATH.index(State(move.state)) > _position(following.state):
            lost.setdefault(stage, following.at)
        running = STAGE_OF.get(State(following.state))
        if running in lost and following.state == RUNNING[running]:
            yield running, max(0.0, following.at - lost.pop(running))


def _position(state: str) -> int:
    """Return how far a state is; one that ends a job early is the furthest."""
    return HAPPY_PATH.index(State(state)) if State(state) in HAPPY_PATH else len(HAPPY_PATH)


def head_metrics(
    requests: Iterable[tuple[str, Request]], models: Iterable[str], times: StageTimes, cache: PromptCacheView
) -> Iterator[Metric]:
    """Yield what is so now.

    Args:
        requests: Those that have not ended, each with the name of its model.
        models: The names of all models.
        times: Of their stages.
        cache: The prompt cache.
    """
    jobs, queued = Counter[tuple[str, str, str]](), defaultdict[tuple[str, str], float](float)
    for model, request in requests:
        for job in request.jobs:
            if (stage := job.stage) is not None:
                jobs[model, stage.value, "running" if job.running else "waiting"] += 1
                if not job.running:
                    queued[model, stage.value] += times.expected(model, stage, request, job)
    depth = GaugeMetricFamily("triptych_jobs", "Jobs by stage, waiting or running.", labels=["model", "stage", "state"])
    work = GaugeMetricFamily(
        "triptych_queued_seconds",
        "Predicted seconds of computation of the jobs that wait for a stage, for one instance: what to scale by.",
        labels=["model", "stage"],
    )
    for model in models:
        for stage in Stage:
            work.add_metric([model, stage.value], queued[model, stage.value])
            for state in ("waiting", "running"):
                depth.add_metric([model, stage.value, state], jobs[model, stage.value, state])
    yield from (depth, work)
    running = sum(count for (*_, state), count in jobs.items() if state == "running")
    yield GaugeMetricFamily(
        "vllm:num_requests_running", "Jobs that run, under the name that routers read.", value=running
    )
    waiting = sum(jobs.values()) - running
    yield GaugeMetricFamily(
        "vllm:num_requests_waiting", "Jobs that wait, under the name that routers read.", value=waiting
    )
    yield CounterMetricFamily("triptych_prompt_cache_hits", "Jobs that needed no encoder.", value=cache.hits)
    yield CounterMetricFamily("triptych_prompt_cache_misses", "Jobs sent to an encoder.", value=cache.misses)
    yield GaugeMetricFamily("triptych_prompt_cache_bytes", "Bytes of cached encoder outputs.", value=cache.nbytes)
