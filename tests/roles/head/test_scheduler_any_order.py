"""The head's decisions under any order of events, with a prompt cache of any size and without."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.roles.factories import KINDS, a_block, make_scheduler, registration, request
from triptych.actors.topology.sections import SchedulingPolicyName
from triptych.engines.memory.buddy import PAGE
from triptych.engines.stages import Stage
from triptych.roles.head.effects import Assign, AssignPreview, Cancel, NotifyWaiters, Park, ReleaseLeases
from triptych.roles.head.job import SUSPECT_AFTER, Job, State
from triptych.roles.head.registry import ExitCause
from triptych.roles.head.scheduler import JobScheduler
from triptych.roles.messages.common import Artifact, Attempt, LeaseRef
from triptych.roles.messages.stages import (
    CheckpointStored,
    PreviewStored,
    RegisterInstance,
    StageFailed,
    StageFinished,
    StageOutputsStored,
    StageReturned,
    TransferFailed,
)
from triptych.roles.previews import preview_attempt

PROMPTS = ("p", "q", "drawn from the seed")


class Traffic(RuleBasedStateMachine):
    """Submits, reports, deaths, cancels in any order: nothing is lost, doubled or leaked, and nothing stalls."""

    requests = Bundle("requests")
    scheduler: JobScheduler

    @initialize(blocks=st.sampled_from([0, 1, 2, 100]), policy=st.sampled_from(get_args(SchedulingPolicyName)))
    def start(self, blocks: int, policy: SchedulingPolicyName) -> None:
        self.scheduler = self._made(max_attempts=3, cache=blocks * PAGE, policy=policy)
        self.now = 0.0
        self.leases = 0
        self.pool_generation = 1
        self.held: set[LeaseRef] = set()
        self.made_for: dict[LeaseRef, tuple[str, int]] = {}
        self.notified: Counter[str] = Counter()
        self.told_to_park: set[Attempt] = set()
        self.generation = 0
        self.assigned: dict[str, set[Attempt]] = {}
        self.issued: dict[str, int] = {}
        for kind in KINDS:
            for k in range(2):
                self._join(f"{kind}-{k}")

    def _made(self, **options: Any) -> JobScheduler:
        return make_scheduler(**options)

    def _join(self, name: str) -> None:
        self.generation += 1
        self.assigned[name], self.issued[name] = set(), 2
        self.scheduler.register(self._registration(name), self.now)
        self._carry_out()

    def _registration(self, name: str) -> RegisterInstance:
        return registration(name, generation=self.generation, slots=2)

    def _carry_out(self) -> None:
        self.now += 1.0
        self.scheduler.dispatch(self.now)
        for effect in self.scheduler.take_effects():
            match effect:
                case Assign(name, job_id):
                    self.assigned[name].add(self.scheduler.jobs[job_id].current_attempt)
                case AssignPreview(name, attempt):
                    assert not any(self.assigned[name]), "a preview never waits beside a job"
                    self.assigned[name].add(attempt)
                case Cancel(name, attempt, _):
                    self.assigned.get(name, set()).discard(attempt)
                    self._issue(name)
                case Park(name, attempt):
                    assert attempt in self.assigned[name]
                    self.told_to_park.add(attempt)
                case ReleaseLeases(leases):
                    # What went with its pool need not be given back, but may be.
                    here = {lease for lease in leases if lease.pool_generation == self.pool_generation}
                    assert self.held.issuperset(here), "released twice"
                    self.held -= here
                case NotifyWaiters(request_id):
                    self.notified[request_id] += 1

    def _issue(self, name: str) -> int:
        self.issued[name] = self.issued.get(name, 0) + 1
        self.scheduler.registry.credit(name, self.issued[name])
        return self.issued[name]

    @rule(
        target=requests,
        n=st.integers(1, 3),
        prompt=st.sampled_from(PROMPTS),
        seed=st.integers(0, 1),
        previews=st.integers(0, 2),
        shared_deaths=st.sampled_from([0, 0, 1, SUSPECT_AFTER]),
        deadline_s=st.sampled_from([0.0, 3.0, 60.0]),
    )
    def submit(self, n: int, prompt: str, seed: int, previews: int, shared_deaths: int, deadline_s: float) -> str:
        id_ = f"r{len(self.scheduler.requests)}"
        steps = len(self.scheduler.requests)  # which no encoder reads
        asked = request(id_, n, at=self.now, seed=seed, prompt=prompt, num_inference_steps=steps)
        asked.steps, asked.priority, asked.owner = steps, seed % 3, prompt
        asked.partial_images, asked.deadline_s = previews, deadline_s
        for job in asked.jobs:
            job.shared_deaths = shared_deaths
        self.scheduler.accept(asked, self.now)
        self._carry_out()
        return id_

    @rule(id_=requests)
    def cancel(self, id_: str) -> None:
        self.scheduler.cancel(id_, "enough", self.now)
        self._carry_out()

    @precondition(lambda self: any(self.assigned.values()))
    @rule(data=st.data(), outcome=st.sampled_from(["done", "done", "done", "failed", "at fault", "source gone"]))
    def report(self, data: st.DataObject, outcome: str) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, held in self.assigned.items() if held)))
        self._report(name, data.draw(st.sampled_from(sorted(self.assigned[name], key=str))), outcome)

    def _report(self, name: str, attempt: Attempt, outcome: str) -> None:
        kind = name.partition("-")[0]
        self.assigned[name].discard(attempt)
        issued = self._issue(name)
        self.scheduler.started(attempt, name, Stage(kind), self.now)
        if outcome == "source gone" and kind != "encoder":
            job = self.scheduler.jobs.get(attempt.job_id)
            spoilt = [job.lease] if job and job.lease and job.current_attempt == attempt else []
            self.scheduler.transfer_failed(name, TransferFailed(attempt, "checksum", True, issued), self.now)
            assert not [lease for lease in spoilt if lease in self.scheduler.stored_outputs.cache]
        elif outcome != "done":
            self.scheduler.stage_failed(
                name, StageFailed(attempt, Stage(kind), "boom", outcome == "failed", issued), self.now
            )
        elif kind == "decoder":
            artifact = Artifact("x.png", "image/png", 1)
            self.scheduler.finished(name, StageFinished(attempt, Stage(kind), artifact, 0.1, issued), self.now)
        else:
            self._store_outputs(name, kind, attempt, issued)
        self._carry_out()

    @precondition(lambda self: any(held for name, held in self.assigned.items() if name.startswith("denoiser")))
    @rule(data=st.data(), step=st.integers(1, 3))
    def save(self, data: st.DataObject, step: int) -> None:
        names = [name for name, held in self.assigned.items() if held and name.startswith("denoiser")]
        name = data.draw(st.sampled_from(sorted(names)))
        attempt = data.draw(st.sampled_from(sorted(self.assigned[name], key=str)))
        self.leases += 1
        block = a_block(self.leases, self.pool_generation)
        self.held.add(block.lease)
        self.scheduler.started(attempt, name, Stage.DENOISER, self.now)
        self.scheduler.checkpoint_stored(name, CheckpointStored(attempt, step, block))
        self._carry_out()

    @precondition(lambda self: any(self.told_to_park & held for held in self.assigned.values()))
    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        parkable = [(name, each) for name, held in self.assigned.items() for each in held & self.told_to_park]
        name, attempt = data.draw(st.sampled_from(sorted(parkable, key=str)))
        self.assigned[name].discard(attempt)
        self.scheduler.returned(name, StageReturned(attempt, self._issue(name)), self.now)
        self._carry_out()

    def _store_outputs(self, name: str, kind: str, attempt: Attempt, issued: int) -> None:
        self.leases += 1
        block = a_block(self.leases, self.pool_generation)
        self.held.add(block.lease)
        seed_independent = False
        if job := self.scheduler.jobs.get(attempt.job_id):
            prompt = self._prompt(job)
            self.made_for[block.lease] = (prompt, job.seed)
            seed_independent = prompt != PROMPTS[-1]
        self.scheduler.stored(
            name, StageOutputsStored(attempt, Stage(kind), block, 0.1, issued, seed_independent), self.now
        )

    @precondition(lambda self: any(self.assigned.get(f"denoiser-{k}") for k in range(2)))
    @rule(data=st.data(), step=st.integers(1, 3))
    def store_a_preview(self, data: st.DataObject, step: int) -> None:
        denoising = [(f"denoiser-{k}", attempt) for k in range(2) for attempt in self.assigned.get(f"denoiser-{k}", ())]
        name, attempt = data.draw(st.sampled_from(sorted(denoising, key=str)))
        self.leases += 1
        block = a_block(self.leases, self.pool_generation)
        self.held.add(block.lease)
        self.scheduler.preview_stored(name, PreviewStored(preview_attempt(attempt, step), block))
        self._carry_out()

    @rule(kind=st.sampled_from(KINDS), k=st.integers(0, 1), back=st.booleans(), end=st.sampled_from(ExitCause))
    def die(self, kind: str, k: int, back: bool, end: ExitCause = ExitCause.CRASHED) -> None:
        name = f"{kind}-{k}"
        if name in self.assigned:
            del self.assigned[name]
            self.scheduler.instance_down(name, "killed", self.now, end)
            self._carry_out()
        if back:
            self._join(name)

    @rule(kind=st.sampled_from(KINDS), k=st.integers(0, 1))
    def crash_while_it_computes_all_that_it_has(self, kind: str, k: int) -> None:
        name = f"{kind}-{k}"
        for attempt in self.assigned.get(name, ()):
            self.scheduler.started(attempt, name, Stage(kind), self.now)
        self.die(kind, k, back=True)

    @rule()
    def lose_the_pool(self) -> None:
        self.pool_generation += 1
        self.held.clear()
        self.scheduler.pool_down("pool", self.pool_generation, self.now)
        self._carry_out()

    @rule(blocks=st.integers(1, 3))
    def want_memory(self, blocks: int) -> None:
        self.scheduler.evict("pool", blocks * PAGE)
        self._carry_out()

    @rule(blocks=st.integers(1, 3))
    def want_the_room_of_checkpoints(self, blocks: int) -> None:
        self.scheduler.evict_checkpoints("pool", blocks * PAGE)
        self._carry_out()

    def _prompt(self, job: Job) -> str:
        return str(self.scheduler.requests[job.request_id].inputs["prompt"])

    @invariant()
    def each_request_notifies_its_waiters_once(self) -> None:
        for id_, held in self.scheduler.requests.items():
            assert self.notified[id_] == held.terminal

    @invariant()
    def no_block_is_lost(self) -> None:
        stored_outputs = self.scheduler.stored_outputs
        needed = {lease for job in self.scheduler.jobs.values() for lease in job.leases}
        needed |= set(stored_outputs.cache.leases)
        assert needed == stored_outputs.leases
        assert self.held == needed | self.scheduler.previews.leases
        assert stored_outputs.cache.nbytes == len(stored_outputs.cache) * PAGE <= stored_outputs.cache.capacity

    @invariant()
    def no_unit_starts_from_what_was_made_of_something_else(self) -> None:
        for job in self.scheduler.jobs.values():
            if job.stored and job.stored.stage is Stage.ENCODER:
                prompt, seed = self.made_for[job.stored.payload.lease]
                assert prompt == self._prompt(job)
                if not job.uses_cached_prompt or prompt == PROMPTS[-1]:
                    assert seed == job.seed
                assert job.uses_cached_prompt != ("encoder" in job.instances)
            else:
                assert not job.uses_cached_prompt

    @invariant()
    def no_prompt_is_encoded_twice_at_a_time(self) -> None:
        if self.scheduler.stored_outputs.cache.capacity:
            jobs = [u for u in self.scheduler.jobs.values() if u.stage is Stage.ENCODER and u.instance]
            prompts = Counter(self._prompt(job) for job in jobs)
            assert max((prompts[prompt] for prompt in PROMPTS[:-1]), default=0) <= 1

    @invariant()
    def no_instance_is_overcommitted(self) -> None:
        for instance in self.scheduler.registry.instances.values():
            assert instance.credits >= 0
            assert self.scheduler.load(instance.name) <= instance.slots

    @invariant()
    def a_suspect_has_its_instance_alone(self) -> None:
        for job in self.scheduler.jobs.values():
            assert not (job.suspect and job.instance) or self.scheduler.load(job.instance) == 1

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for kind in KINDS:
            self.die(kind, 0, back=True)
        while self.scheduler.jobs:
            name = next((n for n, held in self.assigned.items() if held), None)
            assert name, f"stalled: {[(u.id, u.state) for u in self.scheduler.jobs.values()]}"
            self._report(name, min(self.assigned[name], key=str), "done")
        assert self.held == set(self.scheduler.stored_outputs.cache.leases)
        self.scheduler.clear_cache()
        self._carry_out()
        assert not self.held
        self.each_request_notifies_its_waiters_once()
        for held in self.scheduler.requests.values():
            assert held.state in (State.DONE, State.FAILED, State.CANCELLED)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
