"""The head's decisions under any order of events, with a prompt cache of any size and without."""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.roles.books import KINDS, a_slot, hello, ledger, request
from triptych.engines.buddy import PAGE
from triptych.engines.panels import Panel
from triptych.roles.effects import Assign, Cancel, Release, Settle
from triptych.roles.fleet import End
from triptych.roles.ledger import Ledger
from triptych.roles.messages.stages import StageFailed, StageFinished, TransferFailed, TransferStaged
from triptych.roles.messages.work import Artifact, LeaseRef, Work
from triptych.roles.request import State, Unit

PROMPTS = ("p", "q", "drawn from the seed")


class Traffic(RuleBasedStateMachine):
    """Submits, reports, deaths, cancels in any order: nothing is lost, doubled or leaked, and nothing stalls."""

    requests = Bundle("requests")
    books: Ledger

    @initialize(blocks=st.sampled_from([0, 1, 2, 100]))
    def start(self, blocks: int) -> None:
        self.books = ledger(max_attempts=3, cache=blocks * PAGE)
        self.now = 0.0
        self.leases = 0
        self.pool_generation = 1
        self.held: set[LeaseRef] = set()
        self.made_for: dict[LeaseRef, tuple[str, int]] = {}
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
                    # What went with its pool need not be given back, but may be.
                    here = {lease for lease in leases if lease.pool_generation == self.pool_generation}
                    assert self.held.issuperset(here), "released twice"
                    self.held -= here
                case Settle(request_id):
                    self.settled[request_id] += 1

    def _issue(self, name: str) -> int:
        self.issued[name] = self.issued.get(name, 0) + 1
        self.books.fleet.credit(name, self.issued[name])
        return self.issued[name]

    @rule(target=requests, n=st.integers(1, 3), prompt=st.sampled_from(PROMPTS), seed=st.integers(0, 1))
    def submit(self, n: int, prompt: str, seed: int) -> str:
        id_ = f"r{len(self.books.requests)}"
        steps = len(self.books.requests)  # which no encoder reads
        asked = request(id_, n, at=self.now, seed=seed, prompt=prompt, num_inference_steps=steps)
        self.books.accept(asked, self.now)
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
        self._report(name, data.draw(st.sampled_from(sorted(self.in_hand[name], key=str))), outcome)

    def _report(self, name: str, work: Work, outcome: str) -> None:
        kind = name.partition("-")[0]
        self.in_hand[name].discard(work)
        issued = self._issue(name)
        self.books.started(work, name, Panel(kind), self.now)
        if outcome == "source gone" and kind != "encoder":
            unit = self.books.units.get(work.unit_id)
            spoilt = [staged.lease for staged in unit.staged.values()] if unit and unit.work == work else []
            self.books.transfer_failed(TransferFailed(work, name, "checksum", True, issued), self.now)
            assert not [lease for lease in spoilt if lease in self.books.staging.cache]
        elif outcome != "done":
            self.books.stage_failed(StageFailed(work, name, Panel(kind), "boom", outcome == "failed", issued), self.now)
        elif kind == "decoder":
            artifact = Artifact("x.png", "image/png", 1)
            self.books.finished(StageFinished(work, name, Panel(kind), artifact, 0.1, issued), self.now)
        else:
            self._stage(name, kind, work, issued)
        self._carry_out()

    def _stage(self, name: str, kind: str, work: Work, issued: int) -> None:
        self.leases += 1
        slot = a_slot(self.leases, self.pool_generation)
        self.held.add(slot.lease)
        seedless = False
        if unit := self.books.units.get(work.unit_id):
            prompt = self._prompt(unit)
            self.made_for[slot.lease] = (prompt, unit.seed)
            seedless = prompt != PROMPTS[-1]
        self.books.staged(TransferStaged(work, name, Panel(kind), slot, 0.1, issued, seedless), self.now)

    @rule(kind=st.sampled_from(KINDS), k=st.integers(0, 1), back=st.booleans(), end=st.sampled_from(End))
    def die(self, kind: str, k: int, back: bool, end: End = End.CRASHED) -> None:
        name = f"{kind}-{k}"
        if name in self.in_hand:
            del self.in_hand[name]
            self.books.instance_down(name, "killed", self.now, end)
            self._carry_out()
        if back:
            self._join(name)

    @rule()
    def lose_the_pool(self) -> None:
        self.pool_generation += 1
        self.held.clear()
        self.books.pool_down("pool", self.pool_generation, self.now)
        self._carry_out()

    @rule(blocks=st.integers(1, 3))
    def want_room(self, blocks: int) -> None:
        self.books.room_wanted("pool", blocks * PAGE)
        self._carry_out()

    def _prompt(self, unit: Unit) -> str:
        return str(self.books.requests[unit.request_id].inputs["prompt"])

    @invariant()
    def each_request_settles_exactly_once(self) -> None:
        for id_, held in self.books.requests.items():
            assert self.settled[id_] == held.terminal

    @invariant()
    def no_slot_is_lost(self) -> None:
        staging = self.books.staging
        needed = {staged.lease for unit in self.books.units.values() for staged in unit.staged.values()}
        needed |= set(staging.cache.leases)
        assert self.held == needed == staging.leases
        assert staging.cache.nbytes == len(staging.cache) * PAGE <= staging.cache.capacity

    @invariant()
    def no_unit_starts_from_what_was_made_of_something_else(self) -> None:
        for unit in self.books.units.values():
            if staged := unit.staged.get(Panel.ENCODER):
                prompt, seed = self.made_for[staged.lease]
                assert prompt == self._prompt(unit)
                if not unit.borrows or prompt == PROMPTS[-1]:
                    assert seed == unit.seed
                assert unit.borrows != ("encoder" in unit.instances)
            else:
                assert not unit.borrows

    @invariant()
    def no_prompt_is_encoded_twice_at_a_time(self) -> None:
        if self.books.staging.cache.capacity:
            units = [u for u in self.books.units.values() if u.panel is Panel.ENCODER and u.instance]
            prompts = Counter(self._prompt(unit) for unit in units)
            assert max((prompts[prompt] for prompt in PROMPTS[:-1]), default=0) <= 1

    @invariant()
    def no_instance_is_overcommitted(self) -> None:
        for instance in self.books.fleet.instances.values():
            assert instance.credits >= 0
            assert len(instance.in_hand) <= instance.slots

    def teardown(self) -> None:
        if not hasattr(self, "books"):
            return
        for kind in KINDS:
            self.die(kind, 0, back=True)
        while self.books.units:
            name = next((n for n, held in self.in_hand.items() if held), None)
            assert name, f"stalled: {[(u.id, u.state) for u in self.books.units.values()]}"
            self._report(name, min(self.in_hand[name], key=str), "done")
        assert self.held == set(self.books.staging.cache.leases)
        self.books.clear_cache()
        self._carry_out()
        assert not self.held
        self.each_request_settles_exactly_once()
        for held in self.books.requests.values():
            assert held.state in (State.DONE, State.FAILED, State.CANCELLED)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
