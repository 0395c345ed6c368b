"""The transfer actor: brings stored tensors and uploads in, puts outputs into blocks, saves finished media.

It has a device stream of its own, so that the next attempt's tensors arrive while the present one computes. Each
thing it is told to do is a task, which ends with exactly one message: to the stream worker, or to the head, the report
of the attempt's end.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeVar

import torch
from msgspec.structs import replace

from triptych.actors import Actor, Component, Topology
from triptych.actors.child_state import ChildState
from triptych.actors.errors import describe, shorten
from triptych.backoff import backoff_s
from triptych.bus import BusError, Message, RemoteError
from triptych.engines.codec.checksum import ChecksumMismatchError
from triptych.engines.codec.codec import CodecError, Packed
from triptych.engines.memory.arena import Arena, ArenaError
from triptych.engines.memory.streams import DeviceStream, LoadedPayload
from triptych.engines.parameters.media import FRAMES_PER_S
from triptych.engines.stages import Stage
from triptych.engines.transfer import FaultRates
from triptych.roles.media.artifacts import ArtifactError
from triptych.roles.media.decoded import MediaError, nsfw_flag, to_media
from triptych.roles.media.files import is_transient
from triptych.roles.media.metadata import file_metadata
from triptych.roles.media.uploads import UploadError
from triptych.roles.media.writers import default_format, encode
from triptych.roles.messages.common import Attempt, LeaseRef, StoredPayload
from triptych.roles.messages.pool import ReleaseBlocks
from triptych.roles.messages.stages import PreviewStored, StageFinished, StageOutputsStored
from triptych.roles.messages.worker import (
    CancelAttempt,
    FetchUploads,
    LoadInputs,
    SaveArtifact,
    StoreCheckpoint,
    StoreOutputs,
    StorePreview,
)
from triptych.roles.metrics import TRANSFER_FAILURES, TRANSFERS
from triptych.roles.pool.client import FAULTS, RESUMED, LeaseGoneError, PoolClient, PoolMapping, pool_full_reason
from triptych.roles.worker import devices
from triptych.roles.worker.attempts import ActiveAttempt, NextStep, PreviewValues, Snapshot
from triptych.roles.worker.process_context import ProcessContext
from triptych.roles.worker.store_client import StoreClient

T = TypeVar("T")

MAX_CHECKPOINT_MANIFEST: Final = 128 * 1024
"""Bytes; the head sends it in one message with the manifest of the encoder's output."""
FULL_PAUSE_S: Final = 0.1
"""Longest pause before a full pool is asked again: well within the time for which it keeps a place in its queue."""


class TransferFailedError(Exception):
    """A transfer has failed."""

    def __init__(
        self, reason: str, *, source_gone: bool = False, retryable: bool = True, invalid_request: bool = False
    ) -> None:
        super().__init__(reason)
        self.source_gone = source_gone
        self.retryable = retryable
        self.invalid_request = invalid_request


class TransferActor(Actor):
    """The third actor of a role process."""

    def __init__(self, component: Component, topology: Topology, context: ProcessContext) -> None:
        super().__init__(f"{component.name}.transfer")
        self.component = component
        self.context = context
        self.stores = StoreClient(self, component, topology)
        self._client = PoolClient(self, component.pool, component.name)
        self._stops: dict[Attempt, asyncio.Event] = {}
        self._ahead: dict[Attempt, asyncio.Task[None]] = {}
        """Leases that are asked for while the outputs are computed."""
        self._usual_nbytes = 0
        """Size of the last outputs: the next ones mostly have the same."""
        self._checkpoints: dict[Attempt, asyncio.Task[None]] = {}
        """The checkpoint of each attempt that is put into a block at present."""
        self._waiting_for_store: dict[Attempt, str] = {}
        """Attempts that wait for space on a disk or for the store to answer, and the problem of each."""
        self._stream: DeviceStream | None = None
        self._mapping: PoolMapping | None = None
        self._pinned = False
        self._pin_failure = ""
        self._faults = FaultRates.parse(os.environ.get(FAULTS, ""))
        self._pull_s = topology.transfer.pull_timeout_s
        self._chance = random.Random(component.name)  # noqa: S311  for drills
        for transfer in TRANSFERS:  # from 0, so that the first failure already shows as an increase
            TRANSFER_FAILURES.labels(transfer)

    async def started(self) -> None:
        """Map the pool's memory, once the pool is there.

        Raises:
            StartError: the device is not there.

        """
        device = await asyncio.to_thread(devices.usable_device, self.component)
        self._stream = stream = DeviceStream(device, "transfer")

        async def adopt(arena: Arena) -> None:
            await stream.run(_pin, arena, stream.device)
            self._pinned = arena.pinned
            self._pin_failure = arena.pin_failure
            log = self.log.warning if arena.pin_failure else self.log.info
            log("pool mapped", nbytes=arena.nbytes, **self._pin_stats())

        async def retire(arena: Arena) -> None:
            await stream.run(_unmap, arena, stream)

        self.spawn(self.stores.prune_copies(), name="prune copies")
        if self.component.pool:
            self._mapping = PoolMapping(self, self._client, adopt, retire)
            self.set_state(ChildState.LOADING, f"waiting for {self.component.pool}")
            await self._until_mapped(self._mapping)
            self.context.lease_ahead = self._lease_ahead
        self.context.pool_mapped()

    async def stopping(self) -> None:
        """Seal what has been stored."""
        await self._client.all_sealed()

    def stats(self) -> dict[str, int | float | str | bool]:
        """How many transfers are under way, and on a GPU whether they go without a copy in between."""
        return {"transfers": len(self._stops), "waiting_for_store": len(self._waiting_for_store), **self._pin_stats()}

    async def store_outputs(self, message: StoreOutputs) -> None:
        """Put the attempt's values into a block."""
        self._begin("store", message.attempt, lambda stop: self._store_outputs(message, stop))

    async def store_preview(self, message: StorePreview) -> None:
        """Put a preview into a block, and tell the head."""
        self.spawn(self._store_preview(message.preview), name=f"preview {message.preview}")

    async def fetch_uploads(self, message: FetchUploads) -> None:
        """Bring the uploads of an attempt to this host."""
        nbytes = sum(upload.nbytes for upload in message.uploads)
        self._begin("fetch", message.attempt, lambda stop: self._fetch_uploads(message, stop), nbytes)

    async def load_inputs(self, message: LoadInputs) -> None:
        """Fetch, verify and load stored tensors."""
        self._begin("load", message.attempt, lambda stop: self._load(message, stop), message.source.nbytes)

    async def save_artifact(self, message: SaveArtifact) -> None:
        """Write the attempt's image or video to the artifact store."""
        self._begin("save", message.attempt, lambda stop: self._save(message, stop))

    async def store_checkpoint(self, message: StoreCheckpoint) -> None:
        """Put what a denoise has made so far into a block, after the one before; the denoise goes on meanwhile."""
        attempt, before = message.attempt, self._checkpoints.get(message.attempt)
        task = self.spawn(self._store_checkpoint(message, before), name=f"checkpoint {attempt}")
        self._checkpoints[attempt] = task

    async def cancel_attempt(self, message: CancelAttempt) -> None:
        """End what is being done for an attempt where it can be ended; one that is not here is on its way on."""
        if stop := self._stops.get(message.attempt):
            stop.set()

    # -- one task for each thing told

    def _begin(
        self, verb: str, attempt: Attempt, task: Callable[[asyncio.Event], Awaitable[Message]], nbytes: int = 0
    ) -> None:
        self._stops[attempt] = stop = asyncio.Event()
        if self.context.attempts.active[attempt].cancelled:
            stop.set()
        self.spawn(self._reply(verb, attempt, task(stop), nbytes), name=str(attempt))

    async def _reply(self, verb: str, attempt: Attempt, task: Awaitable[Message], nbytes: int) -> None:
        failed = self.context.attempts.transfer_failed
        try:
            with self.context.timeline.measure("transfer", verb, attempt, nbytes=nbytes) as measured:
                answer = await task
                measured.nbytes = measured.nbytes or _nbytes(answer)
        except TransferFailedError as problem:
            self.log.warning("transfer failed", attempt=str(attempt), reason=str(problem))
            answer = failed(
                attempt,
                shorten(str(problem)),
                source_gone=problem.source_gone,
                retryable=problem.retryable,
                invalid_request=problem.invalid_request,
            )
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            self.log.warning("out of memory on the device during a transfer", attempt=str(attempt), exc_info=error)
            answer = failed(attempt, f"{self._device.device} has too little memory for it: {describe(error)}")
            devices.clear_frames(error)
            await self._device.run(devices.free_memory, self._device.device)
        finally:
            # Where this task was cancelled, its thread may still be writing.
            self._stops.pop(attempt).set()
        self.context.pass_on(self, answer)
        if isinstance(answer, StageOutputsStored):
            # The next stage does not wait for it: whatever becomes of this process, the block is the job's from now on.
            stored = answer.stored
            self._client.seal(stored.lease, stored.checksum, stored.nbytes)

    async def _store_checkpoint(self, message: StoreCheckpoint, before: asyncio.Task[None] | None) -> None:
        """Store a checkpoint, or leave it out; the last one of an attempt ends the attempt."""
        attempt = message.attempt
        if before is not None:
            await asyncio.wait({before})
        # Without a checkpoint that is on its way, the attempt may have ended.
        item = self.context.attempts.active.get(attempt)
        snapshot = item.snapshot if item is not None else None
        if item is not None and snapshot is not None:
            stored = await self._try_checkpoint(attempt, snapshot)
            if item.snapshot is snapshot:
                item.snapshot = None
            for follows in self.context.attempts.checkpoint_ended(attempt, stored=stored):
                self.context.pass_on(self, follows)
        if self._checkpoints.get(attempt) is asyncio.current_task():
            del self._checkpoints[attempt]
        if message.returns:
            self.context.pass_on(self, self.context.attempts.handed_over(attempt))

    async def _try_checkpoint(self, attempt: Attempt, snapshot: Snapshot) -> bool:
        """Store a checkpoint and report it; return whether that was possible. Nothing waits for it."""
        facts = {"attempt": str(attempt), "step": snapshot.step}
        try:
            with self.context.timeline.measure("transfer", "checkpoint", attempt) as measured:
                stored = await self._store_if_free(attempt, snapshot)
                measured.nbytes = stored.nbytes
        except (TransferFailedError, CodecError, BusError, LeaseGoneError, ArenaError) as error:
            self.log.info("checkpoint left out", reason=str(error), **facts)
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            self.log.warning("checkpoint left out", exc_info=error, **facts)
            devices.clear_frames(error)
        else:
            follows = self.context.attempts.checkpointed(attempt, snapshot.step, stored)
            if isinstance(follows, ReleaseBlocks):
                self._client.release(stored.lease)
            else:
                self.context.reporter.add(follows)
                return True
        return False

    async def _store_if_free(self, attempt: Attempt, made: Snapshot | PreviewValues) -> StoredPayload:
        """Put a checkpoint or a preview into a block that is free now; nothing waits for it."""
        packed, _ = await self._device.pack(made.values, None, made.ready)
        if len(packed.manifest) > MAX_CHECKPOINT_MANIFEST:
            raise TransferFailedError(f"its manifest takes {len(packed.manifest)} bytes")
        lease = await self._client.lease_checkpoint(attempt, packed.nbytes)
        if not isinstance(lease, LeaseRef):
            raise TransferFailedError(pool_full_reason(self._client.pool, lease))
        try:
            block = await self._mapped.block(lease, packed.nbytes)
            checksum = await self._device.store(packed, block, made.ready)
        except BaseException:
            self._client.release(lease)
            raise
        self._client.seal(lease, checksum, packed.nbytes)
        await self._client.all_sealed()
        return StoredPayload(lease, packed.manifest, checksum, packed.nbytes)

    async def _store_outputs(self, message: StoreOutputs, stop: asyncio.Event) -> StageOutputsStored:
        attempt, item = message.attempt, self.context.attempts.active[message.attempt]
        if ahead := self._ahead.get(attempt):
            await asyncio.wait((ahead,))
        stored = await self._store(item, _Retry(message.deadline, stop))
        self._usual_nbytes = stored.nbytes
        return self.context.attempts.stored(attempt, stored)

    async def _store(self, item: ActiveAttempt, retry: _Retry) -> StoredPayload:
        """Put the attempt's values into the block that was leased ahead, or else into one of their size."""
        packed, checksum = await self._pack(item)
        ahead, item.block = item.block, None
        if ahead is not None:
            if checksum is not None:
                return StoredPayload(ahead, packed.manifest, checksum, packed.nbytes)
            self._client.release(ahead)
        while True:
            retry.check()
            lease = await self._lease(item.attempt, packed.nbytes, retry)
            try:
                block = await self._mapped.block(lease, packed.nbytes)
                checksum = await self._device.store(packed, block, item.ready)
            except (BusError, LeaseGoneError, ArenaError) as error:
                # The pool has ended or does not answer; the values are still here, for its successor.
                self._client.release(lease)
                await retry.wait(f"{self._client.pool}: {error}")
                continue
            return StoredPayload(lease, packed.manifest, checksum, packed.nbytes)

    async def _pack(self, item: ActiveAttempt) -> tuple[Packed, int | None]:
        """Pack the attempt's values, into the block that was leased ahead if there is one and it is of their size."""
        block: torch.Tensor | None = None
        if item.block is not None:
            with contextlib.suppress(BusError, LeaseGoneError, ArenaError):  # its pool has ended
                block = await self._mapped.block(item.block, item.block.nbytes)
        try:
            return await self._device.pack(item.values, block, item.ready)
        except CodecError as error:
            raise TransferFailedError(str(error), retryable=False) from error

    def _lease_ahead(self, item: ActiveAttempt) -> None:
        """Lease a block of the size of the last outputs for those that are nearly computed."""
        attempt = item.attempt
        if self._usual_nbytes and item.stages[-1] is not Stage.DECODER:
            asking = self.spawn(self._have_block(attempt, self._usual_nbytes), name=f"lease ahead {attempt}")
            self._ahead[attempt] = asking
            asking.add_done_callback(lambda _: self._ahead.pop(attempt))

    async def _have_block(self, attempt: Attempt, nbytes: int) -> None:
        lease = await self._client.lease_ahead(attempt, nbytes)
        item = self.context.attempts.active.get(attempt)
        if item is not None:
            item.block = lease
        elif lease is not None:
            self._client.release(lease)

    async def _store_preview(self, preview: Attempt) -> None:
        """Store a preview and tell the head, or leave it out."""
        made = self.context.attempts.previews[preview]
        try:
            with self.context.timeline.measure("transfer", "preview", preview) as measured:
                stored = await self._store_if_free(preview, made)
                measured.nbytes = stored.nbytes
        except (TransferFailedError, CodecError, BusError, LeaseGoneError, ArenaError) as error:
            self.log.info("preview left out", attempt=str(preview), reason=str(error))
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            self.log.warning("preview left out", attempt=str(preview), exc_info=error)
            devices.clear_frames(error)
        else:
            self.context.reporter.add(PreviewStored(preview, stored))
        finally:
            del self.context.attempts.previews[preview]

    async def _lease(
        self, attempt: Attempt, nbytes: int, retry: _Retry, *, incoming: bool = False, number: int = 0
    ) -> LeaseRef:
        while True:
            try:
                answer = await self._client.lease(attempt, nbytes, incoming=incoming, number=number)
            except RemoteError as error:
                raise TransferFailedError(f"{self._client.pool} gives no block: {error.detail}") from error
            except BusError as error:
                problem, longest_s = f"{self._client.pool} does not answer: {error}", math.inf
            else:
                if isinstance(answer, LeaseRef):
                    return answer
                problem = pool_full_reason(self._client.pool, answer)
                if answer.needed > answer.largest:
                    raise TransferFailedError(problem, retryable=False)
                longest_s = FULL_PAUSE_S
            try:
                await retry.wait(problem, longest_s)
            except TransferFailedError:
                self._client.undo(attempt, number)
                raise

    async def _load(self, message: LoadInputs, stop: asyncio.Event) -> NextStep:
        source, retry = message.source, _Retry(message.deadline, stop)
        try:
            try:
                loaded = await self._fetch(message, retry)
            except ChecksumMismatchError as error:
                if source.lease.pool == self._client.pool:
                    raise
                self.log.warning("fetched again", attempt=str(message.attempt), error=str(error))
                loaded = await self._fetch(message, retry)
            if not loaded.event.passed:
                await self._device.run(loaded.event.synchronize)
        except (ChecksumMismatchError, CodecError) as error:
            raise TransferFailedError(str(error), source_gone=True) from error
        finally:
            if message.target is not None:
                self._client.release(message.target)
        item = self.context.attempts.active[message.attempt]
        item.values, item.ready = loaded.values, loaded.event
        if message.checkpoint is not None and not stop.is_set():
            await self._load_checkpoint(item, message.checkpoint, retry)
        return self.context.attempts.loaded(message.attempt, time.monotonic())

    async def _load_checkpoint(self, item: ActiveAttempt, checkpoint: StoredPayload, retry: _Retry) -> None:
        """Load what an earlier attempt has made; if it is gone or damaged, the denoise begins at the beginning."""
        lease = checkpoint.lease
        try:
            if lease.pool != self._client.pool:  # of a denoiser on another host
                lease = await self._lease(item.attempt, checkpoint.nbytes, retry, incoming=True, number=RESUMED)
                await self._copy(item.attempt, checkpoint, lease, retry)
            block = await self._mapped.block(lease, checkpoint.nbytes)
            loaded = await self._device.load(checkpoint.manifest, block, checkpoint.checksum)
            if not loaded.event.passed:
                await self._device.run(loaded.event.synchronize)
        except (
            ChecksumMismatchError, CodecError, BusError, LeaseGoneError, ArenaError, TransferFailedError
        ) as error:  # fmt: skip
            self.log.warning("checkpoint not loaded", attempt=str(item.attempt), reason=str(error))
        else:
            item.resume, item.ready = loaded.values, loaded.event
        finally:
            if lease is not checkpoint.lease:
                self._client.release(lease)

    async def _fetch(self, message: LoadInputs, retry: _Retry) -> LoadedPayload:
        lease = await self._pull(message, retry)
        block = await self._block(lease, message.source.nbytes, retry)
        pulled = lease is not message.source.lease
        if not pulled:  # so nothing could be damaged on the way
            self._faults.damage(block.numpy(), self._chance)
        return await self._device.load(message.source.manifest, block, message.source.checksum, pulled=pulled)

    async def _pull(self, message: LoadInputs, retry: _Retry) -> LeaseRef:
        """Have the bytes in the own pool; returns the block that they are in."""
        retry.check()
        source, target = message.source, message.target
        if source.lease.pool == self._client.pool:
            return source.lease
        if target is None:
            raise TransferFailedError(
                f"{self.component.name} does not map {source.lease.pool}, and has no block for it"
            )
        await self._copy(message.attempt, source, target, retry)
        return target

    async def _copy(self, attempt: Attempt, source: StoredPayload, target: LeaseRef, retry: _Retry) -> None:
        """Have the own pool copy the bytes of another one into `target`. Raises TransferFailedError."""
        try:
            await self._client.pull(attempt, source.lease, target, source.nbytes, min(self._pull_s, retry.left_s))
        except RemoteError as error:
            raise TransferFailedError(error.detail, source_gone=error.code == "source_gone") from error
        except BusError as error:
            raise TransferFailedError(f"{self._client.pool} does not answer: {error}") from error

    async def _block(self, lease: LeaseRef, nbytes: int, retry: _Retry) -> torch.Tensor:
        while True:
            try:
                return await self._mapped.block(lease, nbytes)
            except LeaseGoneError as error:
                raise TransferFailedError(str(error), source_gone=True) from error
            except (BusError, ArenaError) as error:
                await retry.wait(f"{self._client.pool}: {error}")

    async def _save(self, message: SaveArtifact, stop: asyncio.Event) -> StageFinished:
        values = self.context.attempts.active[message.attempt].values
        retry = _Retry(message.deadline, stop)
        try:
            output_format, data = await asyncio.to_thread(self._encode, message, values, stop)
            job_id, check = message.attempt.job_id, retry.check
            # Its inputs stay in their pool meanwhile.
            artifact = await self._once_stored(
                message.attempt, retry, lambda: self.stores.save(job_id, output_format, data, check)
            )
            artifact = replace(artifact, nsfw_content_detected=nsfw_flag(values))
        except (ArtifactError, MediaError) as error:
            raise TransferFailedError(str(error), retryable=False) from error
        except OSError as error:
            raise TransferFailedError(f"the result cannot be written to {self.stores.location}: {error}") from error
        return self.context.attempts.saved(message.attempt, artifact)

    async def _fetch_uploads(self, message: FetchUploads, stop: asyncio.Event) -> NextStep:
        retry = _Retry(message.deadline, stop)
        try:
            for upload in message.uploads:
                fetch = partial(self.stores.fetch, upload, bytearray(), retry.check)
                await self._once_stored(message.attempt, retry, fetch)
        except UploadError as error:
            raise TransferFailedError(str(error), retryable=False, invalid_request=True) from error
        except OSError as error:
            raise TransferFailedError(f"an upload cannot be brought to this host: {error}") from error
        return self.context.attempts.loaded(message.attempt, time.monotonic())

    async def _once_stored(self, attempt: Attempt, retry: _Retry, transfer: Callable[[], Awaitable[T]]) -> T:
        """Save or fetch a file, once the disk has space and the store answers."""
        try:
            while True:
                retry.check()
                try:
                    return await transfer()
                except OSError as error:
                    if not is_transient(error):
                        raise
                    problem = f"waiting for {self.stores.location} ({error.strerror})"
                self._note_waiting(attempt, problem)
                await retry.wait(problem)
        finally:
            self._note_waiting(attempt, "")

    def _note_waiting(self, attempt: Attempt, problem: str) -> None:
        """Say once that work waits for a disk or the store, and once that none does any more."""
        if problem:
            self._waiting_for_store[attempt] = problem
        else:
            self._waiting_for_store.pop(attempt, None)
        before, self.context.trouble = self.context.trouble, next(iter(self._waiting_for_store.values()), "")
        if self.context.trouble and not before:
            self.log.warning("disk is full, or the store does not answer", problem=problem)
        elif before and not self.context.trouble:
            self.log.info("nothing waits for a disk or the store any more")

    # -- inside

    def _pin_stats(self) -> dict[str, str | bool]:
        if not self.component.on_gpu:
            return {}
        return {"pool_pinned": self._pinned} | ({"pin_failure": self._pin_failure} if self._pin_failure else {})

    @property
    def _device(self) -> DeviceStream:
        if self._stream is None:
            raise RuntimeError(f"{self.name} has not started")
        return self._stream

    @property
    def _mapped(self) -> PoolMapping:
        if self._mapping is None:
            raise TransferFailedError(f"{self.component.name} has no pool", retryable=False)
        return self._mapping

    async def _until_mapped(self, mapping: PoolMapping) -> None:
        tries = 0
        while True:
            try:
                await mapping.open()
            except (BusError, ArenaError) as error:
                self.log.info("pool not mapped yet", pool=self._client.pool, error=str(error))
            else:
                return
            await asyncio.sleep(backoff_s(tries))
            tries += 1

    def _encode(self, message: SaveArtifact, values: dict[str, object], stop: asyncio.Event) -> tuple[str, bytes]:
        def check() -> None:
            _raise_if_stopped(stop)

        media = to_media(values, check)
        output_format = message.output.format or default_format(media)
        # A head that accepted the request before any instance had come did not know the pipeline's own rate.
        fps = message.output.fps or self.context.signature.fps or FRAMES_PER_S
        provenance, parameters = message.provenance, self.context.signature.parameters
        metadata = file_metadata(provenance, media, parameters) if provenance else None
        return output_format, encode(
            media, output_format, fps, check, quality=message.output.quality, metadata=metadata
        )


class _Retry:
    """Waiting that ends at the attempt's deadline, or when it is to be stopped."""

    def __init__(self, deadline: float, stop: asyncio.Event) -> None:
        self._deadline = deadline
        self._stop = stop
        self._waits = 0

    @property
    def left_s(self) -> float:
        """Seconds to the deadline, never negative."""
        return max(self._deadline - time.monotonic(), 0.0)

    def check(self) -> None:
        """Raise TransferFailedError when the attempt is to be stopped."""
        _raise_if_stopped(self._stop)

    async def wait(self, problem: str, longest_s: float = math.inf) -> None:
        """Pause before the next try. Raises TransferFailedError, saying `problem`, when there is to be none."""
        self.check()
        if not self.left_s:
            raise TransferFailedError(problem)
        pause = min(backoff_s(self._waits), self.left_s, longest_s)
        self._waits += 1
        try:
            async with asyncio.timeout(pause):
                await self._stop.wait()
        except TimeoutError:  # the pause is over
            return
        self.check()


def _nbytes(message: Message) -> int:
    """Return the bytes that a finished transfer has written."""
    if isinstance(message, StageOutputsStored):
        return message.stored.nbytes
    return message.artifact.nbytes if isinstance(message, StageFinished) else 0


def _raise_if_stopped(stop: asyncio.Event) -> None:
    if stop.is_set():
        raise TransferFailedError("cancelled")


def _pin(arena: Arena, device: torch.device) -> None:
    if device.type == "cuda":
        arena.pin()


def _unmap(arena: Arena, stream: DeviceStream) -> None:
    stream.record().synchronize()  # no copy may be under way when the mapping is taken from the device
    arena.close()
