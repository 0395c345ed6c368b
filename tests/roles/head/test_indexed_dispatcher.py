"""The dispatcher, which finds jobs and instances by index, decides as the plain rule, which looks at all of them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, get_args

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from msgspec.structs import replace

from tests.roles.factories import KINDS, SIGNATURE, make_scheduler, request
from tests.roles.head.plain_dispatcher import PlainDispatcher
from tests.roles.head.test_scheduler_any_order import PROMPTS, Traffic
from triptych.actors.topology.sections import DispatchName, SchedulingPolicyName
from triptych.roles.head.dispatch import POLICIES
from triptych.roles.head.registry import ExitCause
from triptych.roles.head.scheduler import JobScheduler
from triptych.roles.messages.stages import InstanceWakeChanged, RegisterInstance


class Both:
    """Two objects of which every method is called alike, and must return the same."""

    def __init__(self, one: Any, other: Any) -> None:
        self.__dict__.update(one=one, other=other)

    def __getattr__(self, name: str) -> Any:
        mine, theirs = getattr(self.one, name), getattr(self.other, name)
        if name == "registry":
            return Both(mine, theirs)
        if not callable(mine):
            return mine

        def call(*arguments: Any, **options: Any) -> Any:
            copied = deepcopy(arguments)
            answer = mine(*arguments, **options)
            assert theirs(*copied, **options) == answer, name
            return answer

        return call


class PlainScheduler(JobScheduler):
    """A scheduler that dispatches by the plain rule."""

    def dispatch(self, now: float) -> None:
        self._reload_next(now)
        PlainDispatcher(self).dispatch(now)


class Lockstep(Traffic):
    """Any order of events comes to both; all that they want done, and all that they answer, is the same."""

    @initialize(
        blocks=st.sampled_from([0, 0, 2, 100]),
        policy=st.sampled_from(get_args(SchedulingPolicyName)),
        dispatch=st.sampled_from(get_args(DispatchName)),
    )
    def start(self, blocks: int, policy: SchedulingPolicyName, dispatch: DispatchName = "round_robin") -> None:
        self.dispatch_policy = POLICIES[dispatch]
        self.weights = ""
        self.restarting: set[str] = set()
        super().start(blocks, policy)

    def _made(self, **options: Any) -> Any:
        plain = PlainScheduler(self.dispatch_policy, **{key: options[key] for key in ("policy", "max_attempts")})
        made = make_scheduler(dispatch_policy=self.dispatch_policy, **options)
        plain.stored_outputs.cache = deepcopy(made.stored_outputs.cache)
        return Both(made, plain)

    def _registration(self, name: str) -> RegisterInstance:
        pool = "pool" if name.endswith("0") else "elsewhere"
        return replace(super()._registration(name), pool=pool, model=self.weights)

    def _join(self, name: str) -> None:
        if self.scheduler.admit(name, self.weights):
            super()._join(name)

    @rule(seconds=st.integers(1, 4))
    def elapse(self, seconds: int) -> None:
        self.scheduler.elapse(float(seconds), self.now)
        self._carry_out()

    @precondition(lambda self: any(held for name, held in self.assigned.items() if name.startswith("denoiser")))
    @rule(data=st.data(), steps=st.integers(1, 20))
    def progress(self, data: st.DataObject, steps: int) -> None:
        held = [attempt for name, held in self.assigned.items() for attempt in held if name.startswith("denoiser")]
        attempt = data.draw(st.sampled_from(sorted(held, key=str)))
        self.scheduler.progress(attempt, data.draw(st.integers(1, steps)), steps, self.now)
        self._carry_out()

    @rule(kind=st.sampled_from(KINDS), several=st.booleans())
    def work(self, kind: str, *, several: bool) -> None:
        for name in (f"{kind}-0", f"{kind}-1")[: 1 + several]:
            for attempt in sorted(self.assigned.get(name, ()), key=str):
                self._report(name, attempt, "done")

    @rule(priority=st.integers(1, 3), steps=st.integers(1, 50))
    def ask_for_something_urgent(self, priority: int, steps: int) -> None:
        asked = request(f"u{len(self.scheduler.requests)}", 1, at=self.now, prompt=PROMPTS[0])
        asked.steps, asked.priority = steps, priority
        self.scheduler.accept(asked, self.now)
        self._carry_out()

    @rule(kind=st.sampled_from(KINDS), k=st.integers(0, 1), back=st.booleans())
    def drain(self, kind: str, k: int, *, back: bool) -> None:
        self.scheduler.registry.drain(f"{kind}-{k}")
        self._carry_out()
        if back:
            self.die(kind, k, back=True, end=ExitCause.STOPPED)

    @rule(pool=st.sampled_from(["pool", "elsewhere"]))
    def lose_a_pool_for_a_while(self, pool: str) -> None:
        for away in (True, False):
            self.scheduler.registry.set_pool_away(pool, away=away)
            self._carry_out()

    @rule(kind=st.sampled_from(KINDS), k=st.integers(0, 1))
    def sleep_and_wake(self, kind: str, k: int) -> None:
        name = f"{kind}-{k}"
        if name in self.scheduler.registry.instances:
            for awake in (False, True):
                self.scheduler.set_awake([name], awake=awake)
                self._carry_out()
                generation = self.scheduler.registry.generation(name)
                self.scheduler.wake_changed(name, generation, InstanceWakeChanged(awake, SIGNATURE, 64, 0.1))
                self._carry_out()

    @precondition(lambda self: len(self.scheduler.requests) > 8)
    @rule(weights=st.sampled_from(["1", "2"]), patient=st.booleans())
    def reload(self, weights: str, *, patient: bool) -> None:
        self.weights = weights
        self.restarting.update(self.scheduler.reload(weights))
        self._carry_out()
        while self.restarting and not patient:
            self.restart()

    @precondition(lambda self: self.restarting)
    @rule()
    def restart(self) -> None:
        name = min(self.restarting)
        self.restarting.discard(name)
        kind, _, k = name.partition("-")
        self.die(kind, int(k), back=True, end=ExitCause.STOPPED)

    def teardown(self) -> None:
        """Nothing more is to be said at the end."""


TestLockstep = Lockstep.TestCase
TestLockstep.settings = settings(
    max_examples=40, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
