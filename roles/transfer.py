"""The transfer actor: brings staged tensors in, puts outputs into slots, writes finished media.

It has a device stream of its own, so that the next work's tensors arrive behind the present work's compute. Each
thing it is told to do is a task, answered to the instance with exactly one message.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final

import torch
from msgspec.structs import replace

from triptych.actors import Actor, Component, Topology
from triptych.actors.errors import describe, shorten
from triptych.bus import BusError, Message, RemoteFailure
from triptych.engines.arena import Arena, ArenaError
from triptych.engines.checksum import ChecksumMismatch
from triptych.engines.codec import CodecError, Packed, pack
from triptych.engines.media import FRAMES_PER_S
from triptych.engines.streams import DeviceStream, Loaded
from triptych.engines.transfer import Faults
from triptych.roles import devices
from triptych.roles.artifacts import ARTIFACTS, ArtifactError, ArtifactStore
from triptych.roles.files import is_full
from triptych.roles.media import MediaError, media_of, nsfw_of
from triptych.roles.messages.device import (
    ArtifactSaved,
    CancelState,
    LoadState,
    SaveArtifact,
    StageState,
    StateFailed,
    StateLoaded,
    StateStaged,
)
from triptych.roles.messages.work import Artifact, LeaseRef, Staged, Work
from triptych.roles.pool_client import FAULTS, LeaseGone, Mapping, PoolClient, why_full
from triptych.roles.reporter import LONGEST_PAUSE_S, pause_s
from triptych.roles.workspace import Premises
from triptych.roles.writers import encode, suits

FULL_PAUSE_S: Final = 0.1
"""Longest pause before a full pool is asked again: well within the time for which it keeps the place in its line."""


class TransferProblem(Exception):  # noqa: N818  becomes a StateFailed
    """A transfer that came to nothing."""

    def __init__(self, reason: str, *, source_gone: bool = False, retryable: bool = True) -> None:
        super().__init__(reason)
        self.source_gone = source_gone
        self.retryable = retryable


class TransferActor(Actor):
    """The third actor of a role process."""

    def __init__(self, component: Component, topology: Topology, premises: Premises) -> None:
        super().__init__(f"{component.name}.transfer")
        self.component = component
        self.premises = premises
        self.store = ArtifactStore(topology.state_dir / ARTIFACTS)
        self._client = PoolClient(self, component.pool, component.name)
        self._stops: dict[Work, asyncio.Event] = {}
        self._unwritten: dict[Work, str] = {}
        """What waits for the disk to have room, and why."""
        self._stream: DeviceStream | None = None
        self._mapping: Mapping | None = None
        self._pinned = False
        self._pin_failure = ""
        self._faults = Faults.parse(os.environ.get(FAULTS, ""))
        self._pull_s = topology.transfer.pull_timeout_s
        self._chance = random.Random(component.name)  # noqa: S311  for drills

    async def started(self) -> None:
        """Map the pool's memory, once the pool is there.

        Raises:
            StartFailure: the device is not there.

        """
        device = await asyncio.to_thread(devices.usable_device, self.component)
        self._stream = stream = DeviceStream(device, "transfer")

        async def adopt(arena: Arena) -> None:
            await stream.run(_adopt, arena, stream.device)
            self._pinned = arena.pinned
            self._pin_failure = arena.pin_failure
            log = self.log.warning if arena.pin_failure else self.log.info
            log("pool mapped", nbytes=arena.nbytes, **self._pin_facts())

        async def retire(arena: Arena) -> None:
            await stream.run(_retire, arena, stream)

        if self.component.pool:
            self._mapping = Mapping(self, self._client, adopt, retire)
            self.set_state("loading", f"waiting for {self.component.pool}")
            await self._until_mapped(self._mapping)
        self.premises.pool_mapped()

    def facts(self) -> dict[str, int | float | str | bool]:
        """How many transfers are under way, and on a card whether they go without a copy in between."""
        return {"transfers": len(self._stops), "waiting_for_disk": len(self._unwritten), **self._pin_facts()}

    async def stage_state(self, message: StageState) -> None:
        """Put the workspace's values into a slot."""
        self._begin(message.work, lambda stop: self._stage(message, stop))

    async def load_state(self, message: LoadState) -> None:
        """Fetch, verify and load staged tensors."""
        self._begin(message.work, lambda stop: self._load(message, stop))

    async def save_artifact(self, message: SaveArtifact) -> None:
        """Write the workspace's media to the artifact store."""
        self._begin(message.work, lambda stop: self._save(message, stop))

    async def cancel_state(self, message: CancelState) -> None:
        """End what is being done for a work where it can be ended; it has ended already when it is not here."""
        if stop := self._stops.get(message.work):
            stop.set()

    # -- one task for each thing told

    def _begin(self, work: Work, task: Callable[[asyncio.Event], Awaitable[Message]]) -> None:
        self._stops[work] = stop = asyncio.Event()
        self.spawn(self._answer(work, task(stop)), name=str(work))

    async def _answer(self, work: Work, task: Awaitable[Message]) -> None:
        try:
            answer = await task
        except TransferProblem as problem:
            self.log.warning("transfer failed", work=str(work), reason=str(problem))
            answer = StateFailed(work, shorten(str(problem)), problem.source_gone, problem.retryable)
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            self.log.warning("no room on the device for a transfer", work=str(work), exc_info=error)
            answer = StateFailed(work, f"{self._device.device} has no room for it: {describe(error)}")
            devices.forget(error)
            await self._device.run(devices.free_memory, self._device.device)
        finally:
            # Where this task was cancelled, its thread may still be writing.
            self._stops.pop(work).set()
        self.reference(self.component.name).tell(answer)

    async def _stage(self, message: StageState, stop: asyncio.Event) -> StateStaged:
        began = time.monotonic()
        work, held = message.work, self.premises.workspace.get(message.work)
        if held.ready is not None:  # to pack may copy on this stream
            self._device.wait(held.ready, held.values)
        try:
            packed = await self._device.run(pack, held.values)
        except CodecError as error:
            raise TransferProblem(str(error), retryable=False) from error
        patience = _Patience(message.deadline, stop)
        while True:
            patience.check()
            lease = await self._lease(work, packed.nbytes, patience)
            try:
                checksum = await self._fill(lease, packed, work)
            except (BusError, LeaseGone, ArenaError) as error:
                # The pool has ended or does not answer; the values are still here, for its successor.
                self._client.release(lease)
                await patience.wait(f"{self._client.pool}: {error}")
                continue
            staged = Staged(lease, packed.manifest, checksum, packed.nbytes)
            return StateStaged(work, staged, time.monotonic() - began)

    async def _lease(self, work: Work, nbytes: int, patience: _Patience) -> LeaseRef:
        while True:
            try:
                answer = await self._client.lease(work, nbytes)
            except RemoteFailure as error:
                raise TransferProblem(f"{self._client.pool} gives no slot: {error.detail}") from error
            except BusError as error:
                problem, longest_s = f"{self._client.pool} does not answer: {error}", LONGEST_PAUSE_S
            else:
                if isinstance(answer, LeaseRef):
                    return answer
                problem = why_full(self._client.pool, answer)
                if answer.needed > answer.largest:
                    raise TransferProblem(problem, retryable=False)
                longest_s = FULL_PAUSE_S
            try:
                await patience.wait(problem, longest_s)
            except TransferProblem:
                self._client.settle(work)
                raise

    async def _fill(self, lease: LeaseRef, packed: Packed, work: Work) -> int:
        """Copy into the slot, hashing on the way, and seal it."""
        slot = await self._mapped.slot(lease, packed.nbytes)
        checksum = await self._device.stage(packed, slot, self.premises.workspace.get(work).ready)
        await self._client.seal(lease, checksum, packed.nbytes)
        return checksum

    async def _load(self, message: LoadState, stop: asyncio.Event) -> StateLoaded:
        began = time.monotonic()
        source, patience = message.source, _Patience(message.deadline, stop)
        try:
            try:
                loaded = await self._fetch(message, patience)
            except ChecksumMismatch as error:
                if source.lease.pool == self._client.pool:
                    raise
                self.log.warning("fetched again", work=str(message.work), error=str(error))
                loaded = await self._fetch(message, patience)
            await self._device.run(loaded.event.synchronize)
        except (ChecksumMismatch, CodecError) as error:
            raise TransferProblem(str(error), source_gone=True) from error
        finally:
            if message.target is not None:
                self._client.release(message.target)
        self.premises.workspace.replace(message.work, loaded.values, loaded.event)
        return StateLoaded(message.work, time.monotonic() - began)

    async def _fetch(self, message: LoadState, patience: _Patience) -> Loaded:
        lease = await self._bring(message, patience)
        slot = await self._slot(lease, message.source.nbytes, patience)
        pulled = lease is not message.source.lease
        if not pulled:  # so nothing could be damaged on the way
            self._faults.damage(slot.numpy(), self._chance)
        return await self._device.load(message.source.manifest, slot, message.source.checksum, pulled=pulled)

    async def _bring(self, message: LoadState, patience: _Patience) -> LeaseRef:
        """Have the bytes in the own pool; returns the slot that they are in."""
        patience.check()
        source, target = message.source, message.target
        if source.lease.pool == self._client.pool:
            return source.lease
        if target is None:
            raise TransferProblem(f"{self.component.name} does not map {source.lease.pool}, and has no slot for it")
        try:
            await self._client.pull(
                message.work, source.lease, target, source.nbytes, min(self._pull_s, patience.left_s)
            )
        except RemoteFailure as error:
            raise TransferProblem(error.detail, source_gone=error.code == "source_gone") from error
        except BusError as error:
            raise TransferProblem(f"{self._client.pool} does not answer: {error}") from error
        return target

    async def _slot(self, lease: LeaseRef, nbytes: int, patience: _Patience) -> torch.Tensor:
        while True:
            try:
                return await self._mapped.slot(lease, nbytes)
            except LeaseGone as error:
                raise TransferProblem(str(error), source_gone=True) from error
            except (BusError, ArenaError) as error:
                await patience.wait(f"{self._client.pool}: {error}")

    async def _save(self, message: SaveArtifact, stop: asyncio.Event) -> ArtifactSaved:
        values = self.premises.workspace.get(message.work).values
        try:
            output_format, data = await asyncio.to_thread(self._encode, message, values, stop)
            artifact = await self._write(message, output_format, data, stop)
            artifact = replace(artifact, nsfw_content_detected=nsfw_of(values))
        except (ArtifactError, MediaError) as error:
            raise TransferProblem(str(error), retryable=False) from error
        except OSError as error:
            raise TransferProblem(f"the result cannot be written to {self.store.folder}: {error}") from error
        finally:
            self._wait_for_disk(message.work, "")
        return ArtifactSaved(message.work, artifact)

    async def _write(self, message: SaveArtifact, output_format: str, data: bytes, stop: asyncio.Event) -> Artifact:
        """Put the artifact on the disk, once that has room; what it is made of stays in its pool meanwhile."""
        patience = _Patience(message.deadline, stop)
        while True:
            patience.check()
            try:
                return await asyncio.to_thread(self.store.save, message.work.unit_id, output_format, data)
            except OSError as error:
                if not is_full(error):
                    raise
                problem = f"results wait for room on the disk of {self.store.folder} ({error.strerror})"
            self._wait_for_disk(message.work, problem)
            await patience.wait(problem)

    def _wait_for_disk(self, work: Work, problem: str) -> None:
        """Say once that work waits for the disk, and once that none does any more."""
        if problem:
            self._unwritten[work] = problem
        else:
            self._unwritten.pop(work, None)
        before, self.premises.trouble = self.premises.trouble, next(iter(self._unwritten.values()), "")
        if self.premises.trouble and not before:
            self.log.warning("disk is full", problem=problem)
        elif before and not self.premises.trouble:
            self.log.info("no result waits for the disk any more")

    # -- inside

    def _pin_facts(self) -> dict[str, str | bool]:
        if not self.component.on_card:
            return {}
        return {"pool_pinned": self._pinned} | ({"pin_failure": self._pin_failure} if self._pin_failure else {})

    @property
    def _device(self) -> DeviceStream:
        if self._stream is None:
            raise RuntimeError(f"{self.name} has not started")
        return self._stream

    @property
    def _mapped(self) -> Mapping:
        if self._mapping is None:
            raise TransferProblem(f"{self.component.name} has no pool", retryable=False)
        return self._mapping

    async def _until_mapped(self, mapping: Mapping) -> None:
        attempt = 0
        while True:
            try:
                await mapping.open()
            except (BusError, ArenaError) as error:
                self.log.info("pool not mapped yet", pool=self._client.pool, error=str(error))
            else:
                return
            await asyncio.sleep(pause_s(attempt, random.random()))  # noqa: S311  jitter
            attempt += 1

    def _encode(self, message: SaveArtifact, values: dict[str, object], stop: asyncio.Event) -> tuple[str, bytes]:
        def check() -> None:
            _unless(stop)

        media = media_of(values, check)
        output_format = message.output.format or suits(media)
        # A head that accepted the request before any instance had come did not know the pipeline's own rate.
        fps = message.output.fps or self.premises.signature.fps or FRAMES_PER_S
        return output_format, encode(media, output_format, fps, check, quality=message.output.quality)


class _Patience:
    """Waiting that ends at the work's deadline, or when it is to be stopped."""

    def __init__(self, deadline: float, stop: asyncio.Event) -> None:
        self._deadline = deadline
        self._stop = stop
        self._waits = 0

    @property
    def left_s(self) -> float:
        """Seconds to the deadline, never negative."""
        return max(self._deadline - time.monotonic(), 0.0)

    def check(self) -> None:
        """Raise TransferProblem when the work is to be stopped."""
        _unless(self._stop)

    async def wait(self, problem: str, longest_s: float = LONGEST_PAUSE_S) -> None:
        """Pause before the next try. Raises TransferProblem, saying `problem`, when there is to be none."""
        self.check()
        if not self.left_s:
            raise TransferProblem(problem)
        pause = min(pause_s(self._waits, random.random()), self.left_s, longest_s)  # noqa: S311  jitter
        self._waits += 1
        try:
            async with asyncio.timeout(pause):
                await self._stop.wait()
        except TimeoutError:  # the pause is over
            return
        self.check()


def _unless(stop: asyncio.Event) -> None:
    if stop.is_set():
        raise TransferProblem("cancelled")


def _adopt(arena: Arena, device: torch.device) -> None:
    if device.type == "cuda":
        arena.pin()


def _retire(arena: Arena, stream: DeviceStream) -> None:
    stream.record().synchronize()  # no copy may be under way when the mapping is taken from the device
    arena.close()
