"""The active jobs of a model, found by what decisions go by: their stage, instance, weights and rank. Pure.

No decision looks at all jobs. `refile` brings the indexes up to date with a job that has changed.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, ValuesView
from dataclasses import dataclass
from enum import IntEnum
from math import inf
from typing import Final, NamedTuple, TypeVar

from triptych.engines.stages import Stage
from triptych.roles.head.job import RUNNING, STAGE_OF, WAITING, Clock, Job, State
from triptych.roles.messages.common import Attempt

SPARE_EXPIRIES: Final = 64
"""Outdated entries of a heap that are not worth to rebuild it."""

K = TypeVar("K")
_NOT_BEGUN: Final = frozenset({State.PENDING, State.ENCODER_WAITING})
_STAGE_WAITED_FOR: Final = {state: stage for stage, state in WAITING.items()}


class PromptState(IntEnum):
    """What the prompt cache says about a job that waits for an encoder."""

    OPEN = 0
    """Nothing: it needs an encoder."""
    CACHED = 1
    """It has the outputs."""
    IN_PROGRESS = 2
    """An encoder makes outputs now that the job can share."""


class Bucket(NamedTuple):
    """What jobs that wait for a stage have in common: whether an instance can take them, and their rank but for age."""

    aged: bool
    """Whether they go next because they were passed over; the other facts of the rank are left out then."""
    priority: int
    prompt: PromptState
    suspect: bool
    weights: str
    """Version of the weights that they need."""
    alike: tuple[object, ...] = ()
    """What else orders them under the policy."""


class Waiting(NamedTuple):
    """A job that waits for an instance."""

    due_at: float
    """0 where the policy does not go by it."""
    serial: int
    """Counts arrivals."""
    job: Job
    priority: int


class WaitingQueue:
    """The jobs that wait for an instance of one stage, in buckets that are in order of due time and age."""

    def __init__(self) -> None:
        self.buckets: dict[Bucket, list[Waiting]] = {}
        self._by_age: list[Waiting] = []
        """Those that can still be passed over, oldest first."""
        self._priorities: Counter[int] = Counter()

    def __bool__(self) -> bool:
        return bool(self.buckets)

    def add(self, bucket: Bucket, entry: Waiting) -> None:
        """Add a job."""
        insort(self.buckets.setdefault(bucket, []), entry, key=_due)
        if not bucket.aged:
            insort(self._by_age, entry, key=_age)
        self._priorities[entry.priority] += 1

    def remove(self, bucket: Bucket, entry: Waiting) -> None:
        """Remove a job."""
        entries = self.buckets[bucket]
        del entries[bisect_left(entries, _due(entry), key=_due)]
        if not entries:
            del self.buckets[bucket]
        if not bucket.aged:
            del self._by_age[bisect_left(self._by_age, entry.serial, key=_age)]
        self._priorities[entry.priority] -= 1
        if not self._priorities[entry.priority]:
            del self._priorities[entry.priority]

    @property
    def oldest(self) -> Waiting | None:
        """Return the oldest that can still be passed over."""
        return self._by_age[0] if self._by_age else None

    @property
    def highest_priority(self) -> int:
        """Return the highest priority; at least one job waits."""
        return max(self._priorities)

    def most_urgent_after(self, served: int, weights: str) -> int | None:
        """Return the highest priority of those that are left when the first `served` have an instance; None if none is.

        Suspects, and jobs that need other weights, do not count.
        """
        counted = [
            (bucket, entries)
            for bucket, entries in self.buckets.items()
            if not bucket.suspect and bucket.weights == weights
        ]
        aged = sorted(entry for bucket, entries in counted if bucket.aged for entry in entries)
        urgent = [entry.priority for entry in aged[served:]]
        left = max(0, served - len(aged))
        for bucket, entries in sorted(counted, key=lambda each: -each[0].priority):
            if not bucket.aged:
                left -= len(entries)
                if left < 0:
                    urgent.append(bucket.priority)
                    break
        return max(urgent, default=None)


def _due(entry: Waiting) -> tuple[float, int]:
    return entry[:2]


def _age(entry: Waiting) -> int:
    return entry.serial


@dataclass(frozen=True, slots=True)
class Ranking:
    """What the indexes need to know of a job, besides the job."""

    priority: int
    prompt: bytes
    """Key of its prompt, b"" while nothing is cached."""
    bucket: Bucket | None
    """None if it does not wait for an instance."""
    due_at: float = 0.0


class _Place(NamedTuple):
    """Where a job is filed: all that the indexes go by."""

    state: State
    instance: str
    entered_at: float
    expires_at: float
    weights: str
    begun: bool
    suspect: bool
    parking: bool
    priority: int
    prompt: bytes
    bucket: Bucket | None
    due_at: float


class _Entry:
    """An active job, with its place."""

    __slots__ = ("expires_at", "job", "place", "serial")
    place: _Place

    def __init__(self, job: Job, serial: int) -> None:
        self.job = job
        self.serial = serial
        self.expires_at = inf
        """Its time in the heap."""


class ActiveJobs(Mapping[str, Job]):
    """The active jobs by id, oldest first.

    Args:
        clock: The clock of the jobs.
        ranking_of: Returns what is to be known of a job.
        load_changed: Called with the name of an instance that was given a job, or has lost one.
        limit_s: Returns the most seconds that a job may be in its state; 0 for no limit.
    """

    def __init__(
        self,
        clock: Clock,
        ranking_of: Callable[[Job], Ranking],
        load_changed: Callable[[str], None],
        limit_s: Callable[[Job], float],
    ) -> None:
        self.clock = clock
        self.waiting = {stage: WaitingQueue() for stage in Stage}
        """The jobs that wait for an instance, by stage."""
        self.suspects: dict[str, Job] = {}
        self.parking: dict[str, Job] = {}
        """Those whose instances were told to park them."""
        self.denoising: dict[int, dict[str, Job]] = {}
        """Those that an instance has for their denoise, by priority."""
        self.encoding: dict[bytes, dict[str, Job]] = {}
        """Those that an instance has for their encode, by prompt."""
        self.begun = 0
        """How many are under way: assigned to an instance, or between two stages."""
        self._ranking_of = ranking_of
        self._load_changed = load_changed
        self._limit_s = limit_s
        self._jobs: dict[str, Job] = {}
        self._entries: dict[str, _Entry] = {}
        self._arrivals = 0
        self._states: Counter[State] = Counter()
        self._assigned: Counter[State] = Counter()
        """How many of a state have an instance."""
        self._by_instance: dict[str, dict[str, Job]] = {}
        self._by_weights: dict[str, dict[str, Job]] = {}
        self._by_prompt: dict[bytes, dict[str, Job]] = {}
        """Those that wait for an encoder, by prompt."""
        self._unassigned: list[tuple[float, int]] = []
        """When jobs without an instance came into their state, earliest first."""
        self._expiries: list[tuple[float, int, str]] = []
        """A heap of times at which jobs time out; those of earlier states, and of jobs that have ended, are skipped."""

    # -- by id

    def __getitem__(self, job_id: str) -> Job:
        return self._jobs[job_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._jobs)

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._jobs

    def values(self) -> ValuesView[Job]:
        """Return the jobs."""
        return self._jobs.values()

    def find(self, attempt: Attempt, instance: str) -> Job | None:
        """Return the job whose current attempt that is, if it is assigned to the instance."""
        job = self._jobs.get(attempt.job_id)
        return job if job and job.current_attempt == attempt and job.instance == instance else None

    def add(self, job: Job) -> None:
        """Add a job, the youngest."""
        job.set_clock(self.clock)
        self._arrivals += 1
        self._jobs[job.id] = job
        self._entries[job.id] = entry = _Entry(job, self._arrivals)
        self._file(entry, self._place(entry))

    def remove(self, job: Job) -> None:
        """Remove a job."""
        del self._jobs[job.id]
        self._unfile(self._entries.pop(job.id))
        self._trim_expiries()

    def refile(self, job: Job) -> None:
        """Bring the indexes up to date with a job that may have changed; no-op if it is not active."""
        entry = self._entries.get(job.id)
        if entry and (place := self._place(entry)) != entry.place:
            self._unfile(entry)
            # One with a prompt is placed again: it may have been the one that encodes it.
            self._file(entry, self._place(entry) if place.prompt else place)

    def refile_all(self) -> None:
        """Bring the indexes up to date after a change that concerns all jobs."""
        for job in self._jobs.values():
            self.refile(job)

    def refile_prompt(self, prompt: bytes) -> None:
        """Bring the indexes up to date with what the prompt cache says about a prompt."""
        for job in tuple(self._by_prompt.get(prompt, {}).values()):
            self.refile(job)

    # -- indexes

    @property
    def counts(self) -> Mapping[State, int]:
        """Return the number of jobs in each state."""
        return +self._states

    def serial(self, job: Job) -> int:
        """Return the number of an active job, which counts arrivals."""
        return self._entries[job.id].serial

    def on(self, instance: str) -> tuple[Job, ...]:
        """Return the jobs that are assigned to an instance, oldest first."""
        return self._in_order(self._by_instance.get(instance, {}))

    def load(self, instance: str) -> int:
        """Return how many jobs are assigned to an instance."""
        return len(self._by_instance.get(instance, ()))

    def with_other_weights(self, model: str) -> tuple[Job, ...]:
        """Return the jobs that were started with other weights than `model`, oldest first."""
        return self._in_order(
            {id_: job for weights, jobs in self._by_weights.items() if weights != model for id_, job in jobs.items()}
        )

    def under_way(self, stage: Stage, after: Stage) -> int:
        """Return how many jobs an instance of `stage` has, or have stored its outputs for the stage `after`."""
        states = (WAITING[after], RUNNING[after], RUNNING[stage])
        return sum(self._states[state] for state in states) + self._assigned[WAITING[stage]]

    @property
    def unassigned_since(self) -> float | None:
        """Return when the one that has been in its state longest without an instance came into it, on the clock."""
        return self._unassigned[0][0] if self._unassigned else None

    def take_expired(self) -> tuple[Job, ...]:
        """Return the jobs whose time is over, oldest first; each is to be ended, or refiled."""
        found = {}
        while self._expiries and self._expiries[0][0] <= self.clock.now:
            at, _, job_id = heapq.heappop(self._expiries)
            entry = self._entries.get(job_id)
            if entry and entry.expires_at == at:
                found[job_id] = entry.job
        return self._in_order(found)

    def _in_order(self, jobs: Mapping[str, Job]) -> tuple[Job, ...]:
        return tuple(sorted(jobs.values(), key=self.serial))

    def _place(self, entry: _Entry) -> _Place:
        job, ranking = entry.job, self._ranking_of(entry.job)
        limit_s = self._limit_s(job)
        return _Place(
            state=job.state,
            instance=job.instance,
            entered_at=job.entered_at,
            expires_at=min(job.expires_at, job.entered_at + limit_s) if limit_s else job.expires_at,
            weights=job.model if job.stored or job.instance else "",
            begun=bool(job.instance or job.stored) or job.state not in _NOT_BEGUN,
            suspect=job.suspect,
            parking=job.parking,
            priority=ranking.priority,
            prompt=ranking.prompt if job.stage is Stage.ENCODER else b"",
            bucket=ranking.bucket,
            due_at=ranking.due_at,
        )

    def _file(self, entry: _Entry, place: _Place) -> None:
        job, id_ = entry.job, entry.job.id
        entry.place = place
        self._states[place.state] += 1
        self.begun += place.begun
        if place.instance:
            self._assigned[place.state] += 1
            self._by_instance.setdefault(place.instance, {})[id_] = job
            self._load_changed(place.instance)
            if STAGE_OF.get(place.state) is Stage.DENOISER:
                self.denoising.setdefault(place.priority, {})[id_] = job
        else:
            insort(self._unassigned, (place.entered_at, entry.serial))
        if place.weights:
            self._by_weights.setdefault(place.weights, {})[id_] = job
        if place.suspect:
            self.suspects[id_] = job
        if place.parking:
            self.parking[id_] = job
        if place.bucket:
            queue = self.waiting[_STAGE_WAITED_FOR[place.state]]
            queue.add(place.bucket, Waiting(place.due_at, entry.serial, job, place.priority))
        if place.prompt:
            by_prompt = self.encoding if place.instance else self._by_prompt
            by_prompt.setdefault(place.prompt, {})[id_] = job
            if place.instance and len(by_prompt[place.prompt]) == 1:
                self.refile_prompt(place.prompt)
        if place.expires_at != entry.expires_at:
            entry.expires_at = place.expires_at
            heapq.heappush(self._expiries, (place.expires_at, entry.serial, id_))
            self._trim_expiries()

    def _trim_expiries(self) -> None:
        """Rebuild the heap once most of it is of jobs that have ended, and of earlier states."""
        if len(self._expiries) > 2 * len(self._entries) + SPARE_EXPIRIES:
            self._expiries = [(entry.expires_at, entry.serial, id_) for id_, entry in self._entries.items()]
            heapq.heapify(self._expiries)

    def _unfile(self, entry: _Entry) -> None:
        job, id_, place = entry.job, entry.job.id, entry.place
        self._states[place.state] -= 1
        self.begun -= place.begun
        if place.instance:
            self._assigned[place.state] -= 1
            _discard(self._by_instance, place.instance, id_)
            self._load_changed(place.instance)
            if STAGE_OF.get(place.state) is Stage.DENOISER:
                _discard(self.denoising, place.priority, id_)
        else:
            del self._unassigned[bisect_left(self._unassigned, (place.entered_at, entry.serial))]
        if place.weights:
            _discard(self._by_weights, place.weights, id_)
        if place.suspect:
            del self.suspects[id_]
        if place.parking:
            del self.parking[id_]
        if place.bucket:
            queue = self.waiting[_STAGE_WAITED_FOR[place.state]]
            queue.remove(place.bucket, Waiting(place.due_at, entry.serial, job, place.priority))
        if place.prompt:
            by_prompt = self.encoding if place.instance else self._by_prompt
            _discard(by_prompt, place.prompt, id_)
            if place.instance and place.prompt not in by_prompt:
                self.refile_prompt(place.prompt)


def _discard(groups: dict[K, dict[str, Job]], key: K, job_id: str) -> None:
    """Remove a job from a group, and the group with its last job."""
    del groups[key][job_id]
    if not groups[key]:
        del groups[key]
