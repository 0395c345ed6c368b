from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.roles.transfer_harness import FAR, VALUES, FakeInstance, W
from triptych.actors.runtime.system_messages import Inspect, Inspection
from triptych.bus import BusError
from triptych.engines.codec.codec import pack
from triptych.engines.memory import streams
from triptych.engines.memory.streams import StreamEvent
from triptych.roles.messages.common import Attempt, LeaseRef, StoredPayload
from triptych.roles.messages.pool import LeaseBlock, ReleaseBlocks, SealBlock
from triptych.roles.messages.stages import (
    CheckpointStored,
    PreviewStored,
    StageCancelled,
    StageOutputsStored,
    StageReturned,
)
from triptych.roles.messages.worker import (
    CancelAttempt,
    LoadInputs,
    RunStage,
    StoreCheckpoint,
    StoreOutputs,
    StorePreview,
)
from triptych.roles.pool import client
from triptych.roles.pool import pool as pool_module
from triptych.roles.pool.client import FAULTS
from triptych.roles.pool.pool import build
from triptych.roles.previews import preview_attempt
from triptych.roles.worker.attempts import Phase, PreviewValues, Snapshot


def same(one: dict[str, object], other: dict[str, object]) -> bool:
    def equal(a: object, b: object) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return a == b

    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)


def test_what_one_role_stores_another_loads_from_the_same_memory(run_transfers: Any) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        encoder, denoiser = await open_transfer("encoder-0"), await open_transfer("denoiser-0")
        encoder.begin()
        stored = await encoder.store_outputs()
        (view,) = (await encoder.fake_instance.leases("pool")).leases
        assert (view.lease, view.state, view.owner, view.attempt) == (stored.lease, "sealed", "encoder-0", W)
        denoiser.begin(W, nothing=True)
        denoiser.fake_instance.tell(LoadInputs(W, stored, None, FAR))
        assert (await denoiser.fake_instance.inbox.next(RunStage)).attempt == W
        assert same(denoiser.values(), VALUES)
        assert len((await encoder.fake_instance.leases("pool")).leases) == 1

    run_transfers(body)


def test_a_block_is_leased_ahead_for_outputs_of_the_size_of_the_last(
    run_transfers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        encoder = await open_transfer("encoder-0")
        jobs = [Attempt(f"r/{k}", 1) for k in range(3)]
        encoder.begin(jobs[0])
        encoder.ahead(jobs[0])
        first = await encoder.store_outputs(jobs[0])  # of which nothing was known
        for job in jobs[1:]:
            encoder.begin(job)
            encoder.ahead(job)
        views = {view.attempt: view for view in (await encoder.fake_instance.leases("pool")).leases}
        while len(views) < 3:  # the run's limit ends it
            views = {view.attempt: view for view in (await encoder.fake_instance.leases("pool")).leases}
        assert (views[jobs[1]].state, views[jobs[1]].lease.nbytes) == ("writing", first.nbytes)
        alike = await encoder.store_outputs(jobs[1])
        assert alike.lease == views[jobs[1]].lease
        encoder.context.attempts.active[jobs[2]].values["another"] = torch.zeros(2048)
        other = await encoder.store_outputs(jobs[2])
        assert other.lease != views[jobs[2]].lease
        assert other.nbytes > first.nbytes
        await encoder.fake_instance.until("pool", 3)
        views = {view.attempt: view for view in (await encoder.fake_instance.leases("pool")).leases}
        assert [(views[job].lease, views[job].state) for job in jobs] == [
            (stored.lease, "sealed") for stored in (first, alike, other)
        ]

    run_transfers(body)


def test_what_was_stored_is_reported_before_it_is_sealed_and_sealed_before_the_process_ends(
    run_transfers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        encoder = await open_transfer("encoder-0")
        go_on, seal = asyncio.Event(), pool_module.BufferPool.seal

        async def slow(self: Any, message: SealBlock) -> Any:
            await go_on.wait()
            return await seal(self, message)

        monkeypatch.setattr(pool_module.BufferPool, "seal", slow)
        encoder.begin()
        encoder.fake_instance.tell(StoreOutputs(W, FAR))
        stored = (await encoder.fake_instance.inbox.next(StageOutputsStored)).stored
        stopping = asyncio.create_task(encoder.transfer.stopping())
        await asyncio.sleep(0)
        assert not stopping.done(), "it waits for the seal"
        go_on.set()
        await stopping
        (view,) = (await encoder.fake_instance.leases("pool")).leases
        assert (view.lease, view.state) == (stored.lease, "sealed")
        encoder.fake_instance.tell(StoreOutputs(W, FAR))
        stored = (await encoder.fake_instance.inbox.next(StageOutputsStored)).stored
        await encoder.fake_instance.release(stored.lease)  # which nobody needs any more
        await encoder.transfer.stopping()

    run_transfers(body)


def test_a_checkpoint_is_stored_beside_the_run_and_loaded_with_the_inputs(run_transfers: Any) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        encoder, denoiser = await open_transfer("encoder-0"), await open_transfer("denoiser-0")
        encoder.begin()
        source = await encoder.store_outputs()
        denoiser.begin()
        item = denoiser.context.attempts.active[W]
        saved = {"step": 3, "run": {"latents": torch.rand(64, 64)}}
        item.snapshot = Snapshot(3, saved, StreamEvent())
        denoiser.fake_instance.tell(StoreCheckpoint(W))
        while not (reports := denoiser.context.reporter.pending):
            await denoiser.fake_instance.leases("pool")
        (report,) = reports
        assert isinstance(report, CheckpointStored)
        assert (report.attempt, report.step, item.snapshot) == (W, 3, None)
        views = {view.lease: view.state for view in (await denoiser.fake_instance.leases("pool")).leases}
        assert views[report.stored.lease] == "sealed"

        async def loaded(checkpoint: StoredPayload) -> dict[str, Any] | None:
            denoiser.begin(W, nothing=True)
            denoiser.fake_instance.tell(LoadInputs(W, source, None, FAR, checkpoint))
            await denoiser.fake_instance.inbox.next(RunStage)
            assert same(denoiser.values(), VALUES)
            return denoiser.context.attempts.active[W].resume

        resume = await loaded(report.stored)
        assert resume is not None
        assert torch.equal(resume["run"]["latents"], saved["run"]["latents"])  # type: ignore[index]
        # Its block is another's by now, or its pool has ended: the denoise begins at the beginning.
        assert await loaded(msgspec.structs.replace(report.stored, checksum=1)) is None
        gone = msgspec.structs.replace(report.stored.lease, pool_generation=0)
        assert await loaded(msgspec.structs.replace(report.stored, lease=gone)) is None

    run_transfers(body)


def test_a_checkpoint_is_left_out_or_released_when_it_is_of_no_use(run_transfers: Any) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        denoiser = await open_transfer("denoiser-0")

        async def store(values: dict[str, object], **changes: Any) -> None:
            denoiser.begin()
            item = denoiser.context.attempts.active[W]
            item.phase, item.returned = Phase.STORING, changes.pop("returned", True)
            item.cancelled, item.snapshot = True, Snapshot(3, values, StreamEvent())
            denoiser.fake_instance.tell(StoreCheckpoint(W, returns=True))

        # One that another instance goes on with is reported before its end.
        await store({"latents": torch.rand(8)})
        assert await denoiser.fake_instance.inbox.next(StageReturned) == StageReturned(W, 0)
        (report,) = denoiser.context.reporter.pending
        assert isinstance(report, CheckpointStored)
        await denoiser.fake_instance.release(report.stored.lease)
        for values in ({"latents": torch.rand(1 << 22)}, {"latents": object()}, {f"{k:0100}": 0 for k in range(2000)}):
            await store(values)  # type: ignore[arg-type]
            await denoiser.fake_instance.inbox.next(StageReturned)
        await store({"latents": torch.rand(8)}, returned=False)
        await denoiser.fake_instance.inbox.next(StageCancelled)
        await denoiser.fake_instance.until("pool", 0)
        assert len(denoiser.context.reporter.pending) == 1

    run_transfers(body)


def test_a_full_pool_is_waited_for(run_transfers: Any) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        encoder = await open_transfer("encoder-0")
        occupied = await encoder.fake_instance.lease("pool", 1 << 20, attempt=Attempt("x/0", 1))
        encoder.begin()
        encoder.fake_instance.tell(StoreOutputs(W, FAR))
        await encoder.fake_instance.until_busy(1)
        await encoder.fake_instance.release(occupied)
        assert (await encoder.fake_instance.inbox.next(StageOutputsStored)).attempt == W

    run_transfers(body, pool_size="2MiB")


def test_a_preview_is_stored_if_there_is_a_block_for_it_now(run_transfers: Any) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        denoiser, decoder = await open_transfer("denoiser-0"), await open_transfer("decoder-0")
        context, fake_instance = denoiser.context, denoiser.fake_instance
        first, second = preview_attempt(W, 3), preview_attempt(W, 5)
        reports = asyncio.create_task(context.reporter.run(fake_instance.inbox.put))
        context.reporter.resume()

        def store(preview: Attempt) -> None:
            context.attempts.previews[preview] = PreviewValues(dict(VALUES), StreamEvent())
            context.pass_on(fake_instance, StorePreview(preview))

        store(first)
        report = await fake_instance.inbox.next(PreviewStored)
        assert report.preview == first
        decoder.begin(first, nothing=True)
        decoder.fake_instance.tell(LoadInputs(first, report.stored, None, FAR))
        await decoder.fake_instance.inbox.next(RunStage)
        assert same(decoder.values(first), VALUES)
        await fake_instance.release(report.stored.lease)
        occupied = await fake_instance.lease("pool", 1 << 20, attempt=Attempt("x/0", 1))
        store(second)
        while second in context.attempts.previews:
            await fake_instance.leases("pool")
        assert not context.reporter.pending
        denoiser.begin(W)
        await fake_instance.release(occupied)
        await denoiser.store_outputs()  # it does not wait behind the preview that was left out
        assert not fake_instance.inbox.of(PreviewStored)[1:]
        reports.cancel()

    run_transfers(body, pool_size="2MiB")


def test_waiting_for_memory_ends_with_the_deadline_or_when_it_is_stopped(run_transfers: Any) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        encoder = await open_transfer("encoder-0")
        await encoder.fake_instance.lease("pool", 1 << 20, attempt=Attempt("x/0", 1))
        encoder.begin()
        late = await encoder.fails(StoreOutputs(W, time.monotonic() + 0.1))
        assert "has no block of" in late.error
        assert late.retryable
        encoder.fake_instance.tell(StoreOutputs(W, FAR))
        await encoder.fake_instance.until_busy(1)
        stopped = await encoder.fails(CancelAttempt(W))
        assert stopped.error == "cancelled"
        await encoder.fake_instance.until_busy(0)
        encoder.fake_instance.tell(CancelAttempt(W))
        await encoder.fake_instance.until("pool", 1)

    run_transfers(body, pool_size="2MiB")


def test_what_can_never_be_stored_is_no_use_to_try_again(run_transfers: Any) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        encoder = await open_transfer("encoder-0")
        encoder.begin(latents=torch.zeros(1 << 20))
        too_big = await encoder.fails(StoreOutputs(W, FAR))
        assert "raise [transfer] pool_size" in too_big.error
        assert not too_big.retryable
        encoder.begin(callback=print)
        odd = await encoder.fails(StoreOutputs(W, FAR))
        assert "callback" in odd.error
        assert not odd.retryable
        await encoder.fake_instance.until("pool", 0)

    run_transfers(body, pool_size="4MiB")


def test_damaged_bytes_are_never_loaded(run_transfers: Any) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        encoder, decoder = await open_transfer("denoiser-0"), await open_transfer("decoder-0")
        encoder.begin()
        stored = await encoder.store_outputs()
        block = await encoder.transfer._mapped.block(stored.lease, stored.nbytes)
        block[100] ^= 1
        decoder.begin(W, untouched=True)
        failed = await decoder.fails(LoadInputs(W, stored, None, FAR))
        assert "damaged" in failed.reason
        assert failed.source_gone
        assert decoder.values() == {"untouched": True}

    run_transfers(body)


def test_injected_faults_damage_what_is_mapped_too(run_transfers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULTS, "flip:1")

    async def body(h: Any, open_transfer: Any) -> None:
        encoder = await open_transfer("encoder-0")
        encoder.begin()
        stored = await encoder.store_outputs()
        assert (await encoder.fails(LoadInputs(W, stored, None, FAR))).source_gone

    run_transfers(body)


def test_a_block_of_an_earlier_pool_is_gone_and_its_memory_is_not_read(run_transfers: Any) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        encoder = await open_transfer("encoder-0")
        encoder.begin()
        stored = await encoder.store_outputs()
        await h.kill("pool")
        await h.component("pool", build, generation=4)
        # The old memory is still there, since this very process made it: only the generation tells.
        newer = LeaseRef("pool", 4, stored.lease.lease_id, stored.lease.offset, stored.lease.nbytes)
        failed = await encoder.fails(LoadInputs(W, StoredPayload(newer, *rest(stored)), None, FAR))
        assert failed.source_gone
        failed = await encoder.fails(LoadInputs(W, stored, None, FAR))
        assert failed.source_gone
        assert "generation 4" in failed.reason
        again = await encoder.store_outputs()
        assert again.lease.pool_generation == 4

    run_transfers(body)


def rest(stored: StoredPayload) -> tuple[bytes, int, int]:
    return stored.manifest, stored.checksum, stored.nbytes


def test_stored_outputs_outlive_the_pool(run_transfers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "POOL_ANSWER_S", 0.2)

    async def body(h: Any, open_transfer: Any) -> None:
        encoder = await open_transfer("encoder-0")
        await h.kill("pool")
        encoder.begin()
        encoder.fake_instance.tell(StoreOutputs(W, FAR))
        await encoder.fake_instance.until_busy(1)
        await h.component("pool", build, generation=4)
        assert (await encoder.fake_instance.inbox.next(StageOutputsStored)).stored.lease.pool_generation == 4
        await encoder.fake_instance.until("pool", 1)

    run_transfers(body)


def arenas() -> set[str]:
    """The inodes of the arenas that this process has mapped; those of earlier tests may go at any time."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in maps if "triptych-arena" in line}


def test_the_memory_of_a_dead_pool_is_let_go_of_before_there_is_another(run_transfers: Any) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        before = arenas()
        await h.process("pool")
        await open_transfer("encoder-0")
        (mapped,) = arenas() - before
        await h.end("pool")
        while mapped in await asyncio.to_thread(arenas):  # the run's limit ends it
            pass

    run_transfers(body, pools=())


def test_it_waits_for_a_pool_that_starts_later(run_transfers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "POOL_ANSWER_S", 0.05)

    async def body(h: Any, open_transfer: Any) -> None:
        starting = asyncio.ensure_future(open_transfer("encoder-0"))
        client = FakeInstance("test", None, None)
        await h.start(client)
        found = await client.reference("encoder-0").ask(Inspect(), Inspection, timeout_s=5)
        assert found.actors[-1].detail == "waiting for pool"
        await h.component("pool", build, generation=3)
        encoder = await starting
        encoder.begin()
        await encoder.store_outputs()

    run_transfers(body, pools=())


def test_a_block_whose_answer_was_lost_is_released(run_transfers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        encoder = await open_transfer("encoder-0")
        lease = pool_module.BufferPool.lease
        go_on = asyncio.Event()

        async def slow(self: Any, message: LeaseBlock) -> Any:
            answer = await lease(self, message)
            await go_on.wait()
            return answer

        monkeypatch.setattr(pool_module.BufferPool, "lease", slow)
        monkeypatch.setattr(client, "POOL_ANSWER_S", 0.05)
        encoder.begin()
        with pytest.raises(BusError):
            await encoder.transfer._client.lease(W, 4096)
        go_on.set()
        await encoder.fake_instance.until("pool", 1)
        encoder.transfer._client.undo(W)
        await encoder.fake_instance.until("pool", 0)
        encoder.transfer._client.undo(W)

    run_transfers(body)


def test_a_block_is_released_however_long_the_pool_does_not_answer(
    run_transfers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        encoder = await open_transfer("encoder-0")
        encoder.begin()
        leases = [(await encoder.store_outputs()).lease]
        leases.append(await encoder.fake_instance.lease("pool", 4096, attempt=Attempt("r/1", 1)))
        release = pool_module.BufferPool.release
        tried, go_on = asyncio.Event(), asyncio.Event()
        pauses: list[int] = []

        async def stalled(self: Any, message: ReleaseBlocks) -> Any:
            await go_on.wait()
            return await release(self, message)

        def pause(attempt: int) -> float:
            pauses.append(attempt)
            if attempt == 8:
                tried.set()
            return 0.0

        monkeypatch.setattr(pool_module.BufferPool, "release", stalled)
        monkeypatch.setattr(client, "POOL_ANSWER_S", 0.02)
        monkeypatch.setattr(client, "backoff_s", pause)
        for lease in leases:
            encoder.transfer._client.release(lease)
        await tried.wait()
        go_on.set()
        await encoder.fake_instance.until("pool", 0)
        assert pauses[:9] == list(range(9))
        await h.kill("pool")  # a pool that has ended holds nothing: nobody goes on asking
        encoder.transfer._client.release(leases[0])
        await h.component("pool", build, generation=4)
        while encoder.transfer._client._unreleased:
            await encoder.fake_instance.until("pool", 0)

    run_transfers(body)


APART = {"pools": ("pool-encoder", "pool-denoiser"), "engine": "mooncake", "backend": "shm"}


def test_what_lies_in_another_pool_is_pulled_into_the_own_one(run_transfers: Any) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        encoder, denoiser = await open_transfer("encoder-0"), await open_transfer("denoiser-0")
        encoder.begin()
        stored = await encoder.store_outputs()
        target = await denoiser.fake_instance.lease("pool-denoiser", stored.nbytes, incoming=True)
        denoiser.begin(W, nothing=True)
        denoiser.fake_instance.tell(LoadInputs(W, stored, target, FAR))
        await denoiser.fake_instance.inbox.next(RunStage)
        assert same(denoiser.values(), VALUES)
        await denoiser.fake_instance.until("pool-denoiser", 0)
        await denoiser.fake_instance.until("pool-encoder", 1)

    run_transfers(body, **APART)


def test_a_checkpoint_in_another_pool_is_pulled_or_left_out(run_transfers: Any) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        encoder, denoiser = await open_transfer("encoder-0"), await open_transfer("denoiser-0")
        encoder.begin()
        stored = await encoder.store_outputs()

        async def resumed(checkpoint: StoredPayload) -> dict[str, object] | None:
            target = await denoiser.fake_instance.lease("pool-denoiser", stored.nbytes, incoming=True)
            denoiser.begin(W, nothing=True)
            denoiser.fake_instance.tell(LoadInputs(W, stored, target, FAR, checkpoint))
            await denoiser.fake_instance.inbox.next(RunStage)
            assert same(denoiser.values(), VALUES)
            await denoiser.fake_instance.until("pool-denoiser", 0)
            return denoiser.context.attempts.active[W].resume

        resume = await resumed(stored)
        assert resume is not None
        assert same(resume, VALUES)
        gone = msgspec.structs.replace(stored.lease, pool_generation=0)
        assert await resumed(msgspec.structs.replace(stored, lease=gone)) is None
        assert await resumed(msgspec.structs.replace(stored, nbytes=1 << 40)) is None, "it fits into no pool"

    run_transfers(body, **APART)


def test_a_target_is_released_whatever_happens(run_transfers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "POOL_ANSWER_S", 1.0)

    async def body(h: Any, open_transfer: Any) -> None:
        encoder, denoiser = await open_transfer("encoder-0"), await open_transfer("denoiser-0")
        encoder.begin()
        stored = await encoder.store_outputs()
        denoiser.begin(W, nothing=True)
        await h.kill("pool-encoder")
        target = await denoiser.fake_instance.lease("pool-denoiser", stored.nbytes, incoming=True)
        failed = await denoiser.fails(LoadInputs(W, stored, target, FAR))
        assert not failed.source_gone
        await denoiser.fake_instance.until("pool-denoiser", 0)
        await h.component("pool-encoder", build, generation=4)
        target = await denoiser.fake_instance.lease("pool-denoiser", stored.nbytes, incoming=True)
        assert (await denoiser.fails(LoadInputs(W, stored, target, FAR))).source_gone
        await denoiser.fake_instance.until("pool-denoiser", 0)
        failed = await denoiser.fails(LoadInputs(W, stored, None, FAR))
        assert "has no block for it" in failed.reason

    run_transfers(body, **APART)


@pytest.mark.parametrize(("faults", "gone"), [("flip:1", True), ("short:1", True)])
def test_bytes_that_arrive_damaged_are_fetched_again_before_the_source_is_blamed(
    run_transfers: Any, monkeypatch: pytest.MonkeyPatch, faults: str, gone: bool
) -> None:
    monkeypatch.setenv(FAULTS, faults)

    async def body(h: Any, open_transfer: Any) -> None:
        encoder, denoiser = await open_transfer("encoder-0"), await open_transfer("denoiser-0")
        encoder.begin()
        stored = await encoder.store_outputs()
        target = await denoiser.fake_instance.lease("pool-denoiser", stored.nbytes, incoming=True)
        denoiser.begin(W, nothing=True)
        failed = await denoiser.fails(LoadInputs(W, stored, target, FAR))
        assert failed.source_gone is gone
        backend = h.actors["pool-denoiser"]._store.backend
        assert max(backend.injected.values()) == 2
        await denoiser.fake_instance.until("pool-denoiser", 0)

    run_transfers(body, **APART)


def test_a_device_without_free_memory_fails_the_transfer_and_not_the_process(
    run_transfers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    async def body(h: Any, open_transfer: Any) -> None:
        encoder, denoiser = await open_transfer("encoder-0"), await open_transfer("denoiser-0")
        encoder.begin()
        stored = await encoder.store_outputs()
        denoiser.begin(W, untouched=True)
        for module in (denoiser.transfer._device, encoder.transfer._device):
            monkeypatch.setattr(module, "_load", out_of_memory)
            monkeypatch.setattr(module, "_store", out_of_memory)
        failed = await denoiser.fails(LoadInputs(W, stored, None, FAR))
        assert "cpu has too little memory for it: OutOfMemoryError: CUDA out of memory" in failed.reason
        assert not failed.source_gone
        assert denoiser.values() == {"untouched": True}
        assert (await encoder.fails(StoreOutputs(W, FAR))).retryable
        monkeypatch.undo()
        denoiser.fake_instance.tell(LoadInputs(W, stored, None, FAR))
        await denoiser.fake_instance.inbox.next(RunStage)
        assert same(denoiser.values(), VALUES)

    run_transfers(body)


def test_outputs_are_packed_after_the_stage_that_makes_them(
    run_transfers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = []

    class Ready(StreamEvent):
        def synchronize(self) -> None:
            log.append("ready")

    def packed(values: dict[str, object]) -> Any:
        log.append("packed")
        return pack(values)

    monkeypatch.setattr(streams, "pack", packed)

    async def body(h: Any, open_transfer: Any) -> None:
        encoder = await open_transfer("encoder-0")
        encoder.begin()
        encoder.context.attempts.active[W].ready = Ready()
        await encoder.store_outputs()
        assert log[:2] == ["ready", "packed"]

    run_transfers(body)


def test_on_a_gpu_it_says_whether_the_pool_is_pinned_and_why_not(run_transfers: Any) -> None:
    async def body(h: Any, open_transfer: Any) -> None:
        transfer = (await open_transfer("encoder-0")).transfer
        assert transfer.stats() == {"transfers": 0, "waiting_for_store": 0}
        transfer.component = msgspec.structs.replace(transfer.component, device="cuda:0")
        transfer._pin_failure = "cudaHostRegister: 801"
        assert transfer.stats() == {
            "transfers": 0,
            "waiting_for_store": 0,
            "pool_pinned": False,
            "pin_failure": "cudaHostRegister: 801",
        }

    run_transfers(body)
