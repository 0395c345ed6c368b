"""The head's metrics: of requests that have ended, of the jobs that wait and run now, and of the instances."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from triptych.engines.stages import Stage
from triptych.roles.head import runs
from triptych.roles.head.job import HAPPY_PATH, RUNNING, STAGE_OF, TERMINAL_STATES, Job, Request, State
from triptych.roles.head.registry import ExitCause
from triptych.roles.messages.requests import InstanceView, PromptCacheView
from triptych.roles.metrics import RECOVERY_SECONDS, REQUEST_SECONDS, REQUESTS, STAGE_SECONDS, WAIT_SECONDS

_SMOOTHING = 0.2
"""Weight of the newest time in the mean."""


class StageTimes:
    """How long the stages of a model take, learnt from jobs that are done; a denoise by its steps."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, Stage], float] = {}

    def learn(self, model: str, job: Job) -> None:
        """Learn from a job that is done."""
        for stage, seconds in dict(computed(job)).items():
            each = seconds / max(1, job.total_steps - job.resumed_from) if stage is Stage.DENOISER else seconds
            known = self._seconds.get((model, stage), each)
            self._seconds[model, stage] = known + _SMOOTHING * (each - known)

    def expected(self, model: str, stage: Stage, request: Request, job: Job) -> float:
        """Return the seconds that a stage of a job will compute; 0 while nothing is known."""
        steps = (request.steps_left(job) or 1) if stage is Stage.DENOISER else 1
        return steps * self._seconds.get((model, stage), 0.0)


def count_from_zero(models: Iterable[str]) -> None:
    """Begin at 0 what is rare, so that the first time already shows as an increase."""
    for model in models:
        for state in TERMINAL_STATES:
            REQUESTS.labels(model, state.value.lower())
        for stage in Stage:
            RECOVERY_SECONDS.labels(model, stage.value)


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
        for stage, seconds in computed(job):
            STAGE_SECONDS.labels(model, stage.value).observe(seconds)
        if job.state is State.DONE:
            times.learn(model, job)


def waits(job: Job) -> Iterator[tuple[Stage, float]]:
    """Yield each stage that the job waited for, and for how many seconds until an instance was assigned."""
    ended_at = 0.0
    for run in job.runs:
        yield Stage(run.stage), max(0.0, run.assigned_at - runs.unassigned_since(job.history, run, ended_at))
        ended_at = run.ended_at


def computed(job: Job) -> Iterator[tuple[Stage, float]]:
    """Yield each run of a stage that has made something, and the seconds of its computation.

    The last of a stage has those that its instance has measured; for others there are the times of the head alone.
    """
    made = [run for run in job.runs if run.computed_at and not run.reason]
    last = {run.stage: run for run in made}
    for run in made:
        seconds = max(0.0, run.computed_at - run.started_at)
        yield Stage(run.stage), job.stage_seconds.get(run.stage, seconds) if run is last[run.stage] else seconds


def recoveries(job: Job) -> Iterator[tuple[Stage, float]]:
    """Yield each stage that ran, or was to run, when the job went back, and the seconds until it ran again.

    Where an instance gave the job back, because it parked it or was asked to end, nothing was lost.
    """
    lost: dict[Stage, float] = {}
    for move, following in pairwise(job.history):
        stage = STAGE_OF.get(State(move.state))
        given_back = following.reason.endswith((runs.PARKED, ExitCause.STOPPED))
        if stage and not given_back and HAPPY_PATH.index(State(move.state)) > _position(following.state):
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
            if job.stage is not None:
                jobs[model, job.stage.value, "running" if job.running else "waiting"] += 1
            for stage in stages_ahead(job):
                queued[model, stage.value] += times.expected(model, stage, request, job)
    depth = GaugeMetricFamily("triptych_jobs", "Jobs by stage, waiting or running.", labels=["model", "stage", "state"])
    work = GaugeMetricFamily(
        "triptych_queued_seconds",
        "Predicted seconds of one instance for the jobs that have yet to begin a stage: what to scale by.",
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


def stages_ahead(job: Job) -> tuple[Stage, ...]:
    """Return the stages that a job has yet to begin, also those that it does not wait for yet.

    A slow stage holds back those before it, so the jobs that will need it mostly wait at the first one.
    """
    return tuple(stage for stage in Stage if _position(job.state) < HAPPY_PATH.index(RUNNING[stage]))


def instance_metrics(models: Iterable[str], instances: Iterable[tuple[str, InstanceView]]) -> Iterator[Metric]:
    """Yield how many instances serve each stage, and their slots. A monolithic one serves all three.

    Args:
        models: The names of all models.
        instances: Those that have registered, each with the name of its model.
    """
    count, slots = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
    for model, instance in instances:
        for stage in Stage if instance.kind == "monolithic" else (Stage(instance.kind),):
            count[model, stage.value, "awake" if instance.awake else "asleep"] += 1
            slots[model, stage.value, "free"] += instance.credits
            slots[model, stage.value, "taken"] += instance.slots - instance.credits  # previews take some too
    labels = ["model", "stage", "state"]
    serving = GaugeMetricFamily(
        "triptych_instances",
        "Instances that serve a stage, with their weights in memory (awake) or not.",
        labels=labels,
    )
    places = GaugeMetricFamily("triptych_slots", "Places for jobs of those instances.", labels=labels)
    for model in models:
        for stage in Stage:
            for state in ("awake", "asleep"):
                serving.add_metric([model, stage.value, state], count[model, stage.value, state])
            for state in ("free", "taken"):
                places.add_metric([model, stage.value, state], slots[model, stage.value, state])
    yield from (serving, places)
