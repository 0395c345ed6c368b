"""What is kept of encoders' work, for whom it will do, and what becomes of units that need no encoder."""

from __future__ import annotations

import msgspec
import pytest

from tests.roles.books import SIGNATURE, a_slot, after, finished, hello, ledger, request, staged
from triptych.engines.buddy import PAGE, BuddyAllocator
from triptych.engines.parameters import Kind, Parameter, Signature
from triptych.roles.effects import Assign, Release
from triptych.roles.ledger import Ledger
from triptych.roles.messages.stages import TransferFailed
from triptych.roles.messages.work import LeaseRef, Numbers, Pictures, Staged, Upload
from triptych.roles.prompt_cache import UNSHARED, PromptCache, block
from triptych.roles.request import State, Unit

PICTURE = Pictures((Upload("ab.png", 9),))


def a_cache(blocks: int = 2) -> PromptCache:
    cache = PromptCache(blocks * PAGE, "tiny, float32")
    assert cache.learn(SIGNATURE)
    return cache


def keep(cache: PromptCache, prompt: str, number: int, *, seed: int = 1, seedless: bool = True) -> list[int]:
    """Offer a slot; the numbers of those that had to go."""
    gone = cache.offer(cache.key({"prompt": prompt}), seed, a_slot(number), seedless=seedless)
    return [lease.lease_id for lease in gone]


def test_a_key_has_all_that_an_encoder_reads_and_nothing_else() -> None:
    cache = a_cache()
    key = cache.key({"prompt": "a", "num_inference_steps": 4})
    assert key == cache.key({"num_inference_steps": 9, "prompt": "a"})
    assert key == cache.key({"prompt": "a"})
    others = (
        {"prompt": "b"},
        {"prompt": "a", "negative_prompt": "b"},
        {"prompt": "a", "a name that the signature does not have": 1},
        {"prompt": "a", "image": PICTURE},
        {"prompt": "a", "num_inference_steps": PICTURE},
        {"prompt": "a", "sigmas": Numbers((1.0,))},
        {"prompt": "a", "sigmas": Numbers((0.5,))},
        {"prompt": None},
    )
    assert len({key, *(cache.key(inputs) for inputs in others)}) == 1 + len(others)
    other = PromptCache(PAGE, "tiny, bfloat16")
    other.learn(SIGNATURE)
    assert other.key({"prompt": "a"}) != key


def test_before_an_encoder_has_come_every_input_may_matter() -> None:
    cache = PromptCache(PAGE)
    assert cache.key({"prompt": "a", "num_inference_steps": 4}) != cache.key({"prompt": "a"})
    assert cache.learn(SIGNATURE)
    assert not cache.learn(SIGNATURE)
    assert cache.learn(Signature((Parameter("prompt", Kind.TEXT),), encodes=("prompt",)))


def test_what_was_drawn_from_a_seed_is_for_that_seed_alone() -> None:
    cache = a_cache()
    keep(cache, "a", 1, seed=7, seedless=False)
    key = cache.key({"prompt": "a"})
    assert cache.find(key, 7) == a_slot(1)
    assert cache.find(key, 8) is None
    keep(cache, "a", 2, seed=9)
    assert cache.find(key, 8) == a_slot(2)


def test_the_least_recently_used_goes_when_the_bytes_are_used_up() -> None:
    cache = a_cache(blocks=2)
    assert keep(cache, "a", 1) == []
    assert keep(cache, "b", 2) == []
    assert cache.find(cache.key({"prompt": "a"}), 0) == a_slot(1)
    assert keep(cache, "c", 3) == [2]
    assert [lease.lease_id for lease in cache.leases] == [1, 3]
    assert (len(cache), cache.nbytes) == (2, 2 * PAGE)
    assert keep(cache, "c", 4) == [], "what is kept already is not kept twice"
    assert a_slot(4).lease not in cache


def test_bytes_are_counted_as_the_pool_gives_them() -> None:
    allocator = BuddyAllocator(64 * PAGE)
    for nbytes in (0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 4 * PAGE, 5 * PAGE):
        assert block(nbytes) == allocator.rounded(nbytes)
    cache = a_cache(blocks=3)
    large = Staged(LeaseRef("pool", 1, 9, 0, 3 * PAGE), b"", 0, 3 * PAGE)
    assert cache.offer(cache.key({"prompt": "large"}), 0, large, seedless=True) == ()
    assert len(cache) == 0, "it takes four pages"


def test_what_was_not_kept_for_every_seed_is_not_waited_for() -> None:
    cache = a_cache()
    inputs = {"prompt": "a"}
    key = cache.key(inputs)
    assert cache.can_wait(key, inputs)
    assert not cache.can_wait(key, {**inputs, "image": PICTURE})
    keep(cache, "a", 1, seedless=False)
    assert not cache.can_wait(key, inputs)
    for number in range(UNSHARED):
        keep(cache, f"other {number}", number + 2, seedless=False)
    assert cache.can_wait(key, inputs), "it does not remember for ever"


# -- in the head's books


@pytest.fixture
def books() -> Ledger:
    books = ledger(cache=4 * PAGE)
    books.hello(hello("encoder-0", slots=4), 0.0)
    books.hello(hello("denoiser-0", slots=4), 0.0)
    return books


def encoded(books: Ledger, id_: str = "first", number: int = 1, *, seedless: bool = True) -> Unit:
    """Accept a request and have it encoded."""
    books.accept(request(id_), 0.0)
    after(books)
    unit = books.units[f"{id_}/0"]
    assert books.staged(staged(unit.work, "encoder", number, seedless=seedless), 1.0)
    return unit


def test_the_second_request_of_a_prompt_visits_no_encoder(books: Ledger) -> None:
    first = encoded(books)
    books.accept(request("second", seed=5, num_inference_steps=9), 1.0)
    assert after(books) == [Assign("denoiser-0", "first/0"), Assign("denoiser-0", "second/0")]
    unit = books.units["second/0"]
    assert [(m.state, m.reason) for m in unit.history] == [
        ("ENCODER_WAITING", ""),
        ("ENCODER_DONE", "prompt cache"),
        ("DENOISING_WAITING", ""),
    ]
    assert unit.staged == first.staged
    assert unit.instances == {"denoiser": "denoiser-0"}
    assert (first.borrows, unit.borrows) == (False, True)
    view = books.staging.cache.view()
    assert (view.entries, view.nbytes, view.hits, view.misses) == (1, PAGE, 1, 1)


def test_a_slot_is_given_back_when_neither_a_unit_nor_the_cache_needs_it(books: Ledger) -> None:
    first = encoded(books)
    books.accept(request("second"), 1.0)
    after(books)
    second = books.units["second/0"]
    slot = a_slot(1).lease
    books.staged(staged(first.work, "denoiser", 2), 2.0)
    assert after(books) == []
    books.room_wanted("another pool", PAGE)
    assert slot in books.staging.cache
    books.room_wanted("pool", PAGE)
    assert after(books) == [], "a unit starts from it"
    assert slot not in books.staging.cache, "and no other will"
    books.staged(staged(second.work, "denoiser", 3), 3.0)
    assert after(books) == [Release((slot,))]
    assert slot not in books.staging.leases


def test_what_no_unit_holds_goes_before_what_one_does(books: Ledger) -> None:
    for number, prompt in enumerate(("held", "free"), start=1):
        books.accept(request(prompt, prompt=prompt), 0.0)
        after(books)
        unit = books.units[f"{prompt}/0"]
        books.staged(staged(unit.work, "encoder", number, seedless=True), 1.0)
        after(books)
    books.cancel("free", "enough", 2.0)
    books.take_effects()
    books.room_wanted("pool", PAGE)
    assert after(books) == [Release((a_slot(2).lease,))]
    assert books.staging.cache.leases == (a_slot(1).lease,)


def test_other_prompts_and_a_cache_of_no_size_take_the_whole_way(books: Ledger) -> None:
    encoded(books)
    books.accept(request("other", prompt="y"), 1.0)
    assert Assign("encoder-0", "other/0") in after(books)
    off = ledger()
    off.hello(hello("encoder-0", slots=4), 0.0)
    encoded(off)
    off.accept(request("second", n=2), 1.0)
    assert after(off) == [Assign("encoder-0", "second/0"), Assign("encoder-0", "second/1")]
    assert off.staging.cache.view() == PromptCache().view()


def test_one_encodes_for_all_that_come_at_once(books: Ledger) -> None:
    books.accept(request("r", n=3), 0.0)
    books.accept(request("s"), 0.0)
    assert after(books) == [Assign("encoder-0", "r/0")]
    books.staged(staged(books.units["r/0"].work, "encoder", 1, seedless=True), 1.0)
    assert after(books) == [Assign("denoiser-0", unit_id) for unit_id in ("r/0", "r/1", "r/2", "s/0")]
    assert [unit.borrows for unit in books.units.values()] == [False, True, True, True]


@pytest.mark.parametrize("fate", ["cancelled", "dead", "not seedless", "too large"])
def test_when_the_one_that_encodes_does_not_come_to_it_another_does(fate: str) -> None:
    books = ledger(cache=PAGE - 1 if fate == "too large" else PAGE)
    books.hello(hello("encoder-0", slots=4), 0.0)
    books.hello(hello("encoder-1", slots=4), 0.0)
    books.hello(hello("denoiser-0", slots=4), 0.0)
    books.accept(request("r"), 0.0)
    books.accept(request("s", n=2, seed=5), 0.0)
    (assigned,) = after(books)
    leader = books.units["r/0"]
    if fate == "cancelled":
        books.cancel("r", "enough", 1.0)
    elif fate == "dead":
        assert isinstance(assigned, Assign)
        books.instance_down(assigned.instance, "its process ended", 1.0)
    else:
        books.staged(staged(leader.work, "encoder", 1, seedless=fate == "too large"), 1.0)
    encoding = [
        effect.unit_id for effect in after(books) if isinstance(effect, Assign) and "encoder" in effect.instance
    ]
    expected = {
        "cancelled": ["s/0"],
        "dead": ["r/0"],
        "not seedless": ["s/0", "s/1"],
        "too large": ["s/0", "s/1"],
    }
    assert encoding == expected[fate]


def test_pictures_are_not_waited_for(books: Ledger) -> None:
    books.accept(request("r", n=2, image=PICTURE), 0.0)
    assert after(books) == [Assign("encoder-0", "r/0"), Assign("encoder-0", "r/1")]


def test_no_encoder_need_be_there_for_what_is_kept(books: Ledger) -> None:
    encoded(books)
    books.instance_down("encoder-0", "its process ended", 1.0)
    books.accept(request("other", prompt="y"), 1.0)
    books.accept(request("second"), 1.0)
    assert after(books) == [Assign("denoiser-0", "first/0"), Assign("denoiser-0", "second/0")]


def test_what_is_kept_waits_for_room_like_all_the_rest() -> None:
    books = ledger(cache=PAGE)
    books.hello(hello("encoder-0", slots=4), 0.0)
    books.hello(hello("denoiser-0", slots=1), 0.0)
    encoded(books)
    books.accept(request("second", n=9), 1.0)
    after(books)
    waiting = [unit for unit in books.units.values() if unit.state is State.DENOISING_WAITING]
    assert len(waiting) == 3, "one to compute, and twice as many at hand"
    assert books.units["second/8"].state is State.ENCODER_WAITING


def test_damaged_or_lost_tensors_are_kept_for_nobody(books: Ledger) -> None:
    encoded(books)
    books.accept(request("second"), 1.0)
    after(books)
    second = books.units["second/0"]
    books.transfer_failed(TransferFailed(second.work, "denoiser-0", "checksum", True, 99), 2.0)
    assert Assign("encoder-0", "second/0") in after(books)
    assert not second.borrows
    assert second.instances["encoder"] == "encoder-0"
    assert len(books.staging.cache) == 0
    assert a_slot(1).lease in books.staging.leases, "the first request still tries"


def test_a_pool_that_ends_takes_its_entries_along(books: Ledger) -> None:
    first = encoded(books)
    after(books)
    books.staged(staged(first.work, "denoiser", 2), 2.0)
    after(books)
    books.pool_down("pool", 2, 3.0)
    assert len(books.staging.cache) == 0
    assert after(books) == [Assign("encoder-0", "first/0")], "and nothing is given back to the pool that follows"


def test_a_report_said_twice_does_not_free_what_is_kept(books: Ledger) -> None:
    books.hello(hello("decoder-0"), 0.0)
    unit = encoded(books)
    report = staged(unit.work, "encoder", 1, seedless=True)
    after(books)
    books.staged(staged(unit.work, "denoiser", 2), 2.0)
    after(books)
    books.finished(finished(unit.work), 3.0)
    after(books)
    assert not books.staged(report, 4.0)
    assert after(books) == []


def test_after_a_restart_of_the_head_a_shared_slot_is_kept_until_the_last_has_consumed_it(books: Ledger) -> None:
    encoded(books)
    books.accept(request("second"), 1.0)
    after(books)
    restarted = ledger(cache=4 * PAGE)
    for held in list(books.requests.values()):
        restarted.accept(held, 2.0)
    restarted.hello(hello("denoiser-0", slots=4), 2.0)
    restarted.orphans(2.0)
    restarted.instance_down("denoiser-0", "its process ended", 2.0)
    restarted.hello(hello("denoiser-0", slots=4, generation=2), 2.0)
    after(restarted)
    first, second = restarted.units["first/0"], restarted.units["second/0"]
    assert (first.borrows, second.borrows) == (False, True)
    assert restarted.staged(staged(first.work, "denoiser", 2), 3.0)
    assert after(restarted) == []
    assert restarted.staged(staged(second.work, "denoiser", 3), 3.0)
    assert after(restarted) == [Release((a_slot(1).lease,))], "the new head's cache is empty"


def test_an_encoder_that_reads_something_else_empties_the_cache(books: Ledger) -> None:
    first = encoded(books)
    after(books)
    books.staged(staged(first.work, "denoiser", 2), 2.0)
    after(books)
    other = msgspec.structs.replace(hello("encoder-0", generation=2), signature=Signature())
    books.hello(other, 3.0)
    assert Release((a_slot(1).lease,)) in after(books)
