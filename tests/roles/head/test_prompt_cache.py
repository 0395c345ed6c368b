"""Which outputs of encoders are kept, which requests they serve, and what becomes of jobs that need no encoder."""

from __future__ import annotations

import msgspec
import pytest

from tests.roles.factories import SIGNATURE, a_block, after, finished, make_scheduler, registration, request, stored
from triptych.engines.memory.buddy import PAGE
from triptych.engines.parameters.schema import Parameter, ParameterKind, Signature
from triptych.roles.head import prompt_cache
from triptych.roles.head.effects import Assign, ReleaseLeases
from triptych.roles.head.job import Job, State
from triptych.roles.head.prompt_cache import MAX_UNSHARED_KEYS, PromptCache
from triptych.roles.head.scheduler import JobScheduler
from triptych.roles.messages.common import Images, LeaseRef, Numbers, StoredPayload, Upload
from triptych.roles.messages.stages import TransferFailed

IMAGE = Images((Upload("ab.png", 9),))


def a_cache(blocks: int = 2) -> PromptCache:
    cache = PromptCache(blocks * PAGE, "tiny, float32")
    assert cache.update_signature(SIGNATURE)
    return cache


def keep(cache: PromptCache, prompt: str, number: int, *, seed: int = 1, seed_independent: bool = True) -> list[int]:
    """Offer a block; the numbers of those that had to go."""
    gone = cache.offer(cache.key({"prompt": prompt}), seed, a_block(number), seed_independent=seed_independent)
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
        {"prompt": "a", "image": IMAGE},
        {"prompt": "a", "num_inference_steps": IMAGE},
        {"prompt": "a", "sigmas": Numbers((1.0,))},
        {"prompt": "a", "sigmas": Numbers((0.5,))},
        {"prompt": None},
    )
    assert len({key, *(cache.key(inputs) for inputs in others)}) == 1 + len(others)
    other = PromptCache(PAGE, "tiny, bfloat16")
    other.update_signature(SIGNATURE)
    assert other.key({"prompt": "a"}) != key


def test_before_an_encoder_has_come_every_input_may_matter() -> None:
    cache = PromptCache(PAGE)
    assert cache.key({"prompt": "a", "num_inference_steps": 4}) != cache.key({"prompt": "a"})
    assert cache.update_signature(SIGNATURE)
    assert not cache.update_signature(SIGNATURE)
    assert cache.update_signature(Signature((Parameter("prompt", ParameterKind.TEXT),), encodes=("prompt",)))


def test_what_was_drawn_from_a_seed_is_for_that_seed_alone() -> None:
    cache = a_cache()
    keep(cache, "a", 1, seed=7, seed_independent=False)
    key = cache.key({"prompt": "a"})
    assert cache.find(key, 7) == a_block(1)
    assert cache.find(key, 8) is None
    keep(cache, "a", 2, seed=9)
    assert cache.find(key, 8) == a_block(2)


def test_the_least_recently_used_goes_when_the_bytes_are_used_up() -> None:
    cache = a_cache(blocks=2)
    assert keep(cache, "a", 1) == []
    assert keep(cache, "b", 2) == []
    assert cache.find(cache.key({"prompt": "a"}), 0) == a_block(1)
    assert keep(cache, "c", 3) == [2]
    assert [lease.lease_id for lease in cache.leases] == [1, 3]
    assert (len(cache), cache.nbytes) == (2, 2 * PAGE)
    assert keep(cache, "c", 4) == [], "what is kept already is not kept twice"
    assert a_block(4).lease not in cache


def test_the_least_recently_used_goes_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "MAX_ENTRIES", 2)
    cache = a_cache(blocks=9)
    assert [keep(cache, prompt, number) for number, prompt in enumerate("abc", start=1)] == [[], [], [1]]
    assert (len(cache), cache.nbytes) == (2, 2 * PAGE)


def test_bytes_are_counted_as_the_pool_gives_them() -> None:
    cache = a_cache(blocks=3)
    large = StoredPayload(LeaseRef("pool", 1, 9, 0, 3 * PAGE), b"", 0, 3 * PAGE)
    assert cache.offer(cache.key({"prompt": "large"}), 0, large, seed_independent=True) == ()
    assert len(cache) == 0, "it takes four pages"


def test_what_was_not_kept_for_every_seed_is_not_waited_for() -> None:
    cache = a_cache()
    inputs = {"prompt": "a"}
    key = cache.key(inputs)
    assert cache.can_share(key, inputs)
    assert not cache.can_share(key, {**inputs, "image": IMAGE})
    keep(cache, "a", 1, seed_independent=False)
    assert not cache.can_share(key, inputs)
    for number in range(MAX_UNSHARED_KEYS):
        keep(cache, f"other {number}", number + 2, seed_independent=False)
    assert cache.can_share(key, inputs), "it does not remember for ever"


# -- in the head's registry


@pytest.fixture
def scheduler() -> JobScheduler:
    scheduler = make_scheduler(cache=4 * PAGE)
    scheduler.register(registration("encoder-0", slots=4), 0.0)
    scheduler.register(registration("denoiser-0", slots=4), 0.0)
    return scheduler


def encoded(scheduler: JobScheduler, id_: str = "first", number: int = 1, *, seed_independent: bool = True) -> Job:
    """Accept a request and have it encoded."""
    scheduler.accept(request(id_), 0.0)
    after(scheduler)
    job = scheduler.jobs[f"{id_}/0"]
    assert scheduler.stored(
        "encoder-0", stored(job.current_attempt, "encoder", number, seed_independent=seed_independent), 1.0
    )
    return job


def test_the_second_request_of_a_prompt_visits_no_encoder(scheduler: JobScheduler) -> None:
    first = encoded(scheduler)
    scheduler.accept(request("second", seed=5, num_inference_steps=9), 1.0)
    assert after(scheduler) == [Assign("denoiser-0", "first/0"), Assign("denoiser-0", "second/0")]
    job = scheduler.jobs["second/0"]
    assert [(m.state, m.reason) for m in job.history] == [
        ("ENCODER_WAITING", ""),
        ("ENCODER_DONE", "prompt cache"),
        ("DENOISING_WAITING", ""),
    ]
    assert job.stored == first.stored
    assert job.instances == {"denoiser": "denoiser-0"}
    assert (first.uses_cached_prompt, job.uses_cached_prompt) == (False, True)
    view = scheduler.stored_outputs.cache.view()
    assert (view.entries, view.nbytes, view.hits, view.misses) == (1, PAGE, 1, 1)


def test_a_block_is_given_back_when_neither_a_unit_nor_the_cache_needs_it(scheduler: JobScheduler) -> None:
    first = encoded(scheduler)
    scheduler.accept(request("second"), 1.0)
    after(scheduler)
    second = scheduler.jobs["second/0"]
    block = a_block(1).lease
    scheduler.stored("denoiser-0", stored(first.current_attempt, "denoiser", 2), 2.0)
    assert after(scheduler) == []
    scheduler.evict("another pool", PAGE)
    assert block in scheduler.stored_outputs.cache
    scheduler.evict("pool", PAGE)
    assert after(scheduler) == [], "a job starts from it"
    assert block not in scheduler.stored_outputs.cache, "and no other will"
    scheduler.stored("denoiser-0", stored(second.current_attempt, "denoiser", 3), 3.0)
    assert after(scheduler) == [ReleaseLeases((block,))]
    assert block not in scheduler.stored_outputs.leases


def test_what_no_unit_holds_goes_before_what_one_does(scheduler: JobScheduler) -> None:
    for number, prompt in enumerate(("held", "free"), start=1):
        scheduler.accept(request(prompt, prompt=prompt), 0.0)
        after(scheduler)
        job = scheduler.jobs[f"{prompt}/0"]
        scheduler.stored("encoder-0", stored(job.current_attempt, "encoder", number, seed_independent=True), 1.0)
        after(scheduler)
    scheduler.cancel("free", "enough", 2.0)
    scheduler.take_effects()
    scheduler.evict("pool", PAGE)
    assert after(scheduler) == [ReleaseLeases((a_block(2).lease,))]
    assert scheduler.stored_outputs.cache.leases == (a_block(1).lease,)


def test_other_prompts_and_a_cache_of_no_size_take_the_whole_way(scheduler: JobScheduler) -> None:
    encoded(scheduler)
    scheduler.accept(request("other", prompt="y"), 1.0)
    assert Assign("encoder-0", "other/0") in after(scheduler)
    off = make_scheduler()
    off.register(registration("encoder-0", slots=4), 0.0)
    encoded(off)
    off.accept(request("second", n=2), 1.0)
    assert after(off) == [Assign("encoder-0", "second/0"), Assign("encoder-0", "second/1")]
    assert off.stored_outputs.cache.view() == PromptCache().view()


def test_one_encodes_for_all_that_come_at_once(scheduler: JobScheduler) -> None:
    scheduler.accept(request("r", n=3), 0.0)
    scheduler.accept(request("s"), 0.0)
    assert after(scheduler) == [Assign("encoder-0", "r/0")]
    scheduler.stored(
        "encoder-0", stored(scheduler.jobs["r/0"].current_attempt, "encoder", 1, seed_independent=True), 1.0
    )
    assert after(scheduler) == [Assign("denoiser-0", job_id) for job_id in ("r/0", "r/1", "r/2", "s/0")]
    assert [job.uses_cached_prompt for job in scheduler.jobs.values()] == [False, True, True, True]


@pytest.mark.parametrize("fate", ["cancelled", "dead", "not seedless", "too large"])
def test_when_the_one_that_encodes_does_not_come_to_it_another_does(fate: str) -> None:
    scheduler = make_scheduler(cache=PAGE - 1 if fate == "too large" else PAGE)
    scheduler.register(registration("encoder-0", slots=4), 0.0)
    scheduler.register(registration("encoder-1", slots=4), 0.0)
    scheduler.register(registration("denoiser-0", slots=4), 0.0)
    scheduler.accept(request("r"), 0.0)
    scheduler.accept(request("s", n=2, seed=5), 0.0)
    (assigned,) = after(scheduler)
    leader = scheduler.jobs["r/0"]
    if fate == "cancelled":
        scheduler.cancel("r", "enough", 1.0)
    elif fate == "dead":
        assert isinstance(assigned, Assign)
        scheduler.instance_down(assigned.instance, "its process ended", 1.0)
    else:
        scheduler.stored(
            "encoder-0", stored(leader.current_attempt, "encoder", 1, seed_independent=fate == "too large"), 1.0
        )
    encoding = [
        effect.job_id for effect in after(scheduler) if isinstance(effect, Assign) and "encoder" in effect.instance
    ]
    expected = {
        "cancelled": ["s/0"],
        "dead": ["r/0"],
        "not seedless": ["s/0", "s/1"],
        "too large": ["s/0", "s/1"],
    }
    assert encoding == expected[fate]


def test_images_are_not_waited_for(scheduler: JobScheduler) -> None:
    scheduler.accept(request("r", n=2, image=IMAGE), 0.0)
    assert after(scheduler) == [Assign("encoder-0", "r/0"), Assign("encoder-0", "r/1")]


def test_no_encoder_need_be_there_for_what_is_kept(scheduler: JobScheduler) -> None:
    encoded(scheduler)
    scheduler.instance_down("encoder-0", "its process ended", 1.0)
    scheduler.accept(request("other", prompt="y"), 1.0)
    scheduler.accept(request("second"), 1.0)
    assert after(scheduler) == [Assign("denoiser-0", "first/0"), Assign("denoiser-0", "second/0")]


def test_jobs_with_cached_outputs_wait_for_denoisers_as_others_do() -> None:
    scheduler = make_scheduler(cache=PAGE)
    scheduler.register(registration("encoder-0", slots=4), 0.0)
    scheduler.register(registration("denoiser-0", slots=1), 0.0)
    encoded(scheduler)
    scheduler.accept(request("second", n=9), 1.0)
    after(scheduler)
    waiting = [job for job in scheduler.jobs.values() if job.state is State.DENOISING_WAITING]
    assert len(waiting) == 3, "one to compute, and twice as many at hand"
    assert scheduler.jobs["second/8"].state is State.ENCODER_WAITING


def test_damaged_or_lost_tensors_are_kept_for_nobody(scheduler: JobScheduler) -> None:
    encoded(scheduler)
    scheduler.accept(request("second"), 1.0)
    after(scheduler)
    second = scheduler.jobs["second/0"]
    scheduler.transfer_failed("denoiser-0", TransferFailed(second.current_attempt, "checksum", True, 99), 2.0)
    assert Assign("encoder-0", "second/0") in after(scheduler)
    assert not second.uses_cached_prompt
    assert second.instances["encoder"] == "encoder-0"
    assert len(scheduler.stored_outputs.cache) == 0
    assert a_block(1).lease in scheduler.stored_outputs.leases, "the first request still tries"


def test_a_pool_that_ends_takes_its_entries_along(scheduler: JobScheduler) -> None:
    first = encoded(scheduler)
    after(scheduler)
    scheduler.stored("denoiser-0", stored(first.current_attempt, "denoiser", 2), 2.0)
    after(scheduler)
    scheduler.pool_down("pool", 2, 3.0)
    assert len(scheduler.stored_outputs.cache) == 0
    assert after(scheduler) == [Assign("encoder-0", "first/0")], "and nothing is given back to the pool that follows"


def test_a_report_said_twice_does_not_free_what_is_kept(scheduler: JobScheduler) -> None:
    scheduler.register(registration("decoder-0"), 0.0)
    job = encoded(scheduler)
    report = stored(job.current_attempt, "encoder", 1, seed_independent=True)
    after(scheduler)
    scheduler.stored("denoiser-0", stored(job.current_attempt, "denoiser", 2), 2.0)
    after(scheduler)
    scheduler.finished("decoder-0", finished(job.current_attempt), 3.0)
    after(scheduler)
    assert not scheduler.stored("encoder-0", report, 4.0)
    assert after(scheduler) == []


def test_after_a_restart_of_the_head_a_shared_block_is_kept_until_the_last_has_consumed_it(
    scheduler: JobScheduler,
) -> None:
    encoded(scheduler)
    scheduler.accept(request("second"), 1.0)
    after(scheduler)
    restarted = make_scheduler(cache=4 * PAGE)
    for held in list(scheduler.requests.values()):
        restarted.accept(held, 2.0)
    restarted.register(registration("denoiser-0", slots=4), 2.0)
    restarted.requeue_orphans(2.0)
    restarted.instance_down("denoiser-0", "its process ended", 2.0)
    restarted.register(registration("denoiser-0", slots=4, generation=2), 2.0)
    after(restarted)
    first, second = restarted.jobs["first/0"], restarted.jobs["second/0"]
    assert (first.uses_cached_prompt, second.uses_cached_prompt) == (False, True)
    assert restarted.stored("denoiser-0", stored(first.current_attempt, "denoiser", 2), 3.0)
    assert after(restarted) == []
    assert restarted.stored("denoiser-0", stored(second.current_attempt, "denoiser", 3), 3.0)
    assert after(restarted) == [ReleaseLeases((a_block(1).lease,))], "the new head's cache is empty"


def test_an_encoder_that_reads_something_else_empties_the_cache(scheduler: JobScheduler) -> None:
    first = encoded(scheduler)
    after(scheduler)
    scheduler.stored("denoiser-0", stored(first.current_attempt, "denoiser", 2), 2.0)
    after(scheduler)
    other = msgspec.structs.replace(registration("encoder-0", generation=2), signature=Signature())
    scheduler.register(other, 3.0)
    assert ReleaseLeases((a_block(1).lease,)) in after(scheduler)
