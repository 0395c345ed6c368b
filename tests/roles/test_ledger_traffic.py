"""The head's decisions under any order of events."""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from engines.panels import Panel
from roles.effects import Assign, Cancel, Release, Settle
from roles.messages.stages import StageFailed, StageFinished, TransferFailed, TransferStaged
from roles.messages.work import Artifact, LeaseRef, Work
from tests.roles.books import KINDS, a_slot, hello, ledger, request


class Traffic(RuleBasedStateMachine):
    """Submits, reports, deaths, cancels in any order: nothing is lost, doubled or leaked."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.books = ledger(max_attempts=3)
        self.now = 0.0
        self.leases = 0
        self.held: set[LeaseRef] = set()
        self.settled: Counter[str] = Counter()
        self.generation = 0
        self.in_hand: dict[str, set[Work]] = {}
        self.issued: dict[str, int] = {}
        for kind in KINDS:
            for k in range(2):
                self._join(f"{kind}-{k}")

    def _join(self, name: str) -> None:
        self.generation += 1
        self.in_hand[name], self.issued[name] = set(), 2
        self.books.hello(hello(name, generation=self.generation, slots=2), self.now)
        self._carry_out()

    def _carry_out(self) -> None:
        self.now += 1.0
        self.books.dispatch(self.now)
        for effect in self.books.take_effects():
            match effect:
                case Assign(name, unit_id):
                    self.in_hand[name].add(self.books.units[unit_id].work)
                case Cancel(name, work, _):
                    self.in_hand.get(name, set()).discard(work)
                    self._issue(name)
                case Release(leases):
                    assert self.held.issuperset(leases), "released twice"
                    self.held -= set(leases)
                case Settle(request_id):
                    self.settled[request_id] += 1

    def _issue(self, name: str) -> int:
        self.issued[name] = self.issued.get(name, 0) + 1
        self.books.fleet.credit(name, self.issued[name])
        return self.issued[name]

    @rule(target=requests, n=st.integers(1, 3))
    def submit(self, n: int) -> str:
        id_ = f"r{len(self.books.requests)}"
        self.books.accept(request(id_, n, at=self.now), self.now)
        self._carry_out()
        return id_

    @rule(id_=requests)
    def cancel(self, id_: str) -> None:
        self.books.cancel(id_, "enough", self.now)
        self._carry_out()

    @precondition(lambda self: any(self.in_hand.values()))
    @rule(data=st.data(), outcome=st.sampled_from(["done", "done", "done", "failed", "at fault", "source gone"]))
    def report(self, data: st.DataObject, outcome: str) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, held in self.in_hand.items() if held)))
        work = data.draw(st.sampled_from(sorted(self.in_hand[name], key=str)))
        kind = name.partition("-")[0]
        self.in_hand[name].discard(work)
        issued = self._issue(name)
        self.books.started(work, name, Panel(kind), self.now)
        if outcome == "source gone" and kind != "encoder":
            self.books.transfer_failed(TransferFailed(work, name, "checksum", True, issued), self.now)
        elif outcome != "done":
            self.books.stage_failed(StageFailed(work, name, kind, "boom", outcome == "failed", issued), self.now)
        elif kind == "decoder":
            artifact = Artifact("x.png", "image/png", 1)
            self.books.finished(StageFinished(work, name, kind, artifact, 0.1, issued), self.now)
        else:
            self.leases += 1
            slot = a_slot(self.leases)
            self.held.add(slot.lease)
            self.books.staged(TransferStaged(work, name, kind, slot, 0.1, issued), self.now)
        self._carry_out()

    @rule(kind=st.sampled_from(KINDS), k=st.integers(0, 1), back=st.booleans())
    def die(self, kind: str, k: int, back: bool) -> None:
        name = f"{kind}-{k}"
        if name in self.in_hand:
            del self.in_hand[name]
            self.books.instance_down(name, "killed", self.now)
            self._carry_out()
        if back:
            self._join(name)

    @invariant()
    def each_request_settles_exactly_once(self) -> None:
        for id_, held in self.books.requests.items():
            assert self.settled[id_] == held.terminal

    @invariant()
    def no_slot_is_lost(self) -> None:
        assert self.held == self.books.leases()

    @invariant()
    def no_instance_is_overcommitted(self) -> None:
        for instance in self.books.fleet.instances.values():
            assert instance.credits >= 0
            assert len(instance.in_hand) <= instance.slots

    def teardown(self) -> None:
        for kind in KINDS:
            self._join(f"{kind}-0")
        for id_ in list(self.books.requests):
            self.books.cancel(id_, "end", self.now)
        self._carry_out()
        assert not self.books.units
        assert not self.held
        self.each_request_settles_exactly_once()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
