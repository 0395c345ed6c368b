"""The stream worker: owns the device's compute stream, the one thread that launches work on it, and the model.

Stages run in the order in which they are told. A denoise runs one step at a time, so that it can be stopped and
watched between two of them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import ParamSpec, TypeVar

import torch

from triptych.actors import Actor, Component, StartDelayedError, StartError, Topology
from triptych.actors.child_state import ChildState
from triptych.actors.errors import describe
from triptych.bus import MailboxFullError, Message
from triptych.engines.memory.streams import DeviceStream, StreamEvent
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import ModelError, Stage
from triptych.engines.weights.model_version import model_version
from triptych.engines.weights.placement import OutOfDeviceMemoryError
from triptych.engines.weights.read_ahead import ReadProgress
from triptych.roles.media.uploads import UPLOADS, UploadStore
from triptych.roles.messages.common import Attempt, Images, Rebind, Tensors
from triptych.roles.messages.stages import InstanceWakeChanged, StageFailed
from triptych.roles.messages.worker import (
    CancelAttempt,
    DeviceLost,
    RunStage,
    SetWeightsLoaded,
)
from triptych.roles.worker import devices
from triptych.roles.worker.attempts import ActiveAttempt, NextStep
from triptych.roles.worker.inputs import has_files, resolve_inputs
from triptych.roles.worker.model_loading import load_stages, weights_stats
from triptych.roles.worker.process_context import ProcessContext

P = ParamSpec("P")
T = TypeVar("T")

OVERDUE_HEARTBEATS = 8.0
"""A call to the device that takes this many heartbeat timeouts is taken for hung."""
PROGRESS_EVERY_S = 1.0
PROGRESS_LOG_EVERY_S = 10.0


class ModelChangedError(StartDelayedError):
    """What was loaded is not of the version that was told to the head: this process has to start anew."""


class _StoppedError(Exception):
    """The attempt was to be stopped."""


class StreamWorker(Actor):
    """The second actor of a role process."""

    def __init__(self, component: Component, topology: Topology, context: ProcessContext) -> None:
        super().__init__(f"{component.name}.stream")
        self.component = component
        self.topology = topology
        self.model = topology.model_of(component)
        self.context = context
        self.uploads = UploadStore(topology.state_dir / UPLOADS)
        self.stages_run = 0
        self.first_s: dict[str, float] = {}
        """Seconds of the first run of each stage: compilers and kernels are warmed up in it."""
        self._queue: deque[RunStage | SetWeightsLoaded] = deque()
        self._wake = asyncio.Event()
        self._current: RunStage | None = None
        self._call_began: float | None = None
        self._load_began: float | None = None
        self._reading = ReadProgress()
        self._start_timeout_s = topology.supervision.start_timeout_s
        self._bound_s = OVERDUE_HEARTBEATS * topology.supervision.heartbeat_timeout_s
        self._stream: DeviceStream | None = None
        self._pipeline: StagePipeline | None = None
        self._shared = False
        self._after_loading = 0
        self._out_of_memory = 0
        self._device_lost = ""
        """Why nothing can be computed any more."""

    async def started(self) -> None:
        """Load the model on the device thread, off the loop.

        Raises:
            StartError: the model cannot be served, or the device is not there.
            StartDelayedError: the folder of the model is away, or others fill the GPU.

        """
        began = time.monotonic()
        device = await asyncio.to_thread(devices.usable_device, self.component)
        self._stream = DeviceStream(device, "compute")
        self._shared = devices.shares_gpu(self.component, self.topology.components, torch.cuda.device_count())
        self.start_s["device"] = time.monotonic() - began
        version = await asyncio.to_thread(model_version, self.model.files)
        if not self.topology.starts_asleep(self.component):
            self.start_s["weights"] = await self._bring(self._stream, version)
        self.context.model_known(version, str(device))
        self.spawn(self._serve(self._stream), name="stages")

    async def _bring(self, stream: DeviceStream, version: str) -> float:
        """Load the weights, which are to be of that version, or bring them back; returns the seconds of it.

        Raises:
            StartError, StartDelayedError: as `started`.

        """
        self._load_began = time.monotonic()
        if self._pipeline is None:
            self._reading = ReadProgress()
            telling = self.spawn(self._tell_progress(), name="progress")
            try:
                loaded = self._pipeline = await self._loaded(stream)
            finally:
                telling.cancel()
        else:
            loaded = self._pipeline
            await stream.run(self._from_host, loaded)
        seconds, self._load_began = time.monotonic() - self._load_began, None
        if version != await asyncio.to_thread(model_version, self.model.files):
            raise ModelChangedError("the files of the model changed while they were read, or while it slept")
        self.context.model_loaded(loaded.signature, loaded.placement.held_bytes)
        stages = [stage.value for stage in loaded.stages]
        facts: dict[str, object] = {
            "stages": stages,
            "route": loaded.strategy.value,
            "device": str(stream.device),
            "model": version,
        }
        facts |= {"read_bytes": self._reading.total, "seconds": round(seconds, 3)}
        self.log.info("model loaded", **facts, **weights_stats(loaded.placement))
        return seconds

    def _from_host(self, pipeline: StagePipeline) -> None:
        """Bring weights back to the GPU. Raises StartDelayedError where others fill it just now."""
        try:
            pipeline.to_device()
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            pipeline.to_host()
            raise StartDelayedError(
                f"{self.component.device} has too little memory for the weights: {describe(error)}"
            ) from error

    async def _set_weights_loaded(self, message: SetWeightsLoaded, stream: DeviceStream) -> None:
        """Bring the weights, or let go of them. Raises StartError and FilesChanged, which end the process."""
        began, trouble = time.monotonic(), ""
        if message.awake and not self.context.awake:
            try:
                await self._bring(stream, self.context.model)
            except ModelChangedError:
                raise
            except StartDelayedError as delay:
                self._load_began, trouble = None, str(delay)
                self.log.warning("not woken", reason=trouble)
        elif self.context.awake and not message.awake:
            self.context.awake = False
            await stream.run(self._let_go, stream.device)
            self.log.info("weights let go", seconds=round(time.monotonic() - began, 3))
        self.set_state(ChildState.READY)
        here, seconds = self.context, time.monotonic() - began
        self._pass_on(InstanceWakeChanged(here.awake, here.signature, here.weights, seconds, trouble))

    def _let_go(self, device: torch.device) -> None:
        """Free the memory of the weights: from a GPU plain ones go to the host, all others are read again."""
        plain = self.component.offload == "none" and self.component.quantization == "none"
        if self._pipeline is not None and device.type == "cuda" and plain:
            self._pipeline.to_host()
        else:
            self._pipeline = None
        devices.free_memory(device)
        devices.trim_host()

    def stats(self) -> dict[str, int | float | str | bool]:
        """What it runs, what waits, which components it has loaded, and what it takes of a GPU."""
        return {
            "device": str(self._stream.device) if self._stream else self.component.device,
            "running": str(self._current.attempt) if self._current else "",
            "queued": len(self._queue),
            "panels_run": self.stages_run,
            "components": ", ".join(sorted(self._pipeline.components)) if self._pipeline else "",
            "weights_read_bytes": self._reading.read,
            "weights_total_bytes": self._reading.total,
            "awake": self.context.awake,
            **{f"first_{stage}_s": seconds for stage, seconds in self.first_s.items()},
            **(devices.memory_stats(self._stream.device) if self._pipeline and self._stream else {}),
        }

    def watchdog(self) -> str | None:
        """Say so when loading the model or one call to the device takes far longer than any should."""
        if self._load_began is not None and time.monotonic() - self._load_began > self._start_timeout_s:
            return f"loading the model takes more than {self._start_timeout_s:g} s"
        if self._call_began is None or self._current is None:
            return None
        seconds = time.monotonic() - self._call_began
        bound_s = self._bound_s
        if self._current.stage.value not in self.first_s:  # it may compile
            bound_s = max(bound_s, self._start_timeout_s)
        if seconds < bound_s:
            return None
        return f"a step of {self._current.attempt} ({self._current.stage}) runs since {seconds:.0f} s"

    async def run_stage(self, message: RunStage) -> None:
        """Queue a stage."""
        if self.context.attempts.active[message.attempt].cancelled:  # its CancelAttempt has overtaken it
            self._pass_on(self.context.attempts.stopped(message.attempt))
        else:
            self._enqueue(message)

    async def set_weights_loaded(self, message: SetWeightsLoaded) -> None:
        """Bring the weights, or let go of them, when what was told before has been done."""
        self._enqueue(message)

    async def cancel_attempt(self, message: CancelAttempt) -> None:
        """Take an attempt out of the queue; the one that computes sees for itself that it is cancelled."""
        for queued in self._queue:
            if isinstance(queued, RunStage) and queued.attempt == message.attempt:
                self._queue.remove(queued)
                self._pass_on(self.context.attempts.stopped(queued.attempt))
                return

    async def _tell_progress(self) -> None:
        """Say how much of the weights has been read: each second as the state, and to the log once in a while."""
        began = time.monotonic()
        logged: float | None = None
        while True:
            await asyncio.sleep(PROGRESS_EVERY_S)
            read, total, now = self._reading.read, self._reading.total, time.monotonic()
            if not total:
                continue
            self.set_state(ChildState.LOADING, f"{self._reading}")
            if logged is None or now - logged >= PROGRESS_LOG_EVERY_S:
                logged = now
                self.log.info("loading", read_bytes=read, total_bytes=total, seconds=round(now - began, 1))

    async def _loaded(self, stream: DeviceStream) -> StagePipeline:
        """Load the model. Raises StartError, and StartDelayedError where others fill the GPU just now."""
        try:
            return await stream.run(self._load, stream.device)
        except OutOfDeviceMemoryError as error:
            failure = StartError if error.needed > error.total else StartDelayedError
            raise failure(str(error)) from error
        except ModelError as error:
            raise StartError(str(error)) from error
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            raise StartDelayedError(
                f"{stream.device} has too little memory beside the weights: {describe(error)}"
            ) from error

    def _load(self, device: torch.device) -> StagePipeline:
        component, model = self.component, self.model
        dtype = getattr(torch, component.dtype)
        if device.type == "cuda":
            devices.use_exact_kernels()
        pipeline = load_stages(component, model, device, self._reading)
        if device.type == "cuda":
            devices.warm_up(device, dtype)
        self._after_loading = devices.free_memory(device)
        return pipeline

    async def _serve(self, stream: DeviceStream) -> None:
        """Schedule, run, pass on; for ever, or until the device is lost."""
        while not self._device_lost:
            work = await self._next()
            if isinstance(work, SetWeightsLoaded):
                await self._set_weights_loaded(work, stream)
            else:
                self._pass_on(await self._run(work, stream))
        # Nothing more is launched; the instance reports why and ends the process.
        self._pass_on(DeviceLost(self._device_lost))

    async def _next(self) -> RunStage | SetWeightsLoaded:
        """Decide what runs next: what was told first."""
        while not self._queue:
            self._wake.clear()
            await self._wake.wait()
        return self._queue.popleft()

    def _enqueue(self, work: RunStage | SetWeightsLoaded) -> None:
        self._queue.append(work)
        self._wake.set()

    def _pass_on(self, message: Message) -> None:
        if isinstance(message, RunStage):
            self._enqueue(message)
        else:
            self.context.pass_on(self, message)

    async def _run(self, work: RunStage, stream: DeviceStream) -> NextStep | StageFailed:
        """Run a stage; returns where its attempt goes from here."""
        attempt, stage, attempts = work.attempt, work.stage, self.context.attempts
        item = attempts.active[attempt]
        if item.cancelled:
            return attempts.stopped(attempt)
        if self._pipeline is None or not self.context.awake:
            raise RuntimeError(f"{attempt} is to be run without weights")
        self._current, began = work, time.monotonic()
        self.context.reporter.add(attempts.started(attempt, stage, began))
        try:
            seed_independent = await self._compute(item, stage, stream, self._pipeline)
        except _StoppedError:
            return attempts.stopped(attempt)
        except Exception as error:
            self.log.warning("stage failed", attempt=str(attempt), stage=stage.value, exc_info=error)
            return await self._failed(attempt, error, stream)
        finally:
            self._current = None
        self.stages_run += 1
        self._out_of_memory = 0
        seconds = time.monotonic() - began
        if stage.value not in self.first_s:
            self.first_s[stage.value] = seconds
            self.log.info("first call", stage=stage.value, seconds=round(seconds, 2))
        return attempts.computed(attempt, seconds, seed_independent=seed_independent)

    async def _failed(self, attempt: Attempt, error: Exception, stream: DeviceStream) -> StageFailed:
        """Say why a stage failed, and find out whether the device is lost."""
        lost, full = devices.is_device_lost(error), devices.is_out_of_memory(error)
        mismatch = devices.is_component_mismatch(error)
        why = describe(error)
        if mismatch:
            why = f"parts of the model {self.model.name or self.model.path.name} do not fit each other: {why}"
        report = self.context.attempts.stage_failed(
            attempt,
            why,
            invalid_request=devices.is_invalid_request(error) and not (lost or full),
            deterministic=(devices.is_deterministic(error) or mismatch) and not (lost or full),
        )
        devices.clear_frames(error)
        if (await self._is_full(stream)) if full else lost:
            self._device_lost = why
        return report

    async def _is_full(self, stream: DeviceStream) -> bool:
        """Free what a stage has left that ran out of memory; returns whether only the end of the process frees more."""
        self._out_of_memory += 1
        allocated = await stream.run(devices.free_memory, stream.device)
        facts = {"allocated": allocated, "after_loading": self._after_loading, "in_a_row": self._out_of_memory}
        self.log.warning("out of memory on the device", **facts)
        return devices.must_restart(**facts)

    async def _compute(self, item: ActiveAttempt, stage: Stage, stream: DeviceStream, pipeline: StagePipeline) -> bool:
        """Put the stage's outputs in the place of its inputs; returns whether they are the same for every seed."""
        if item.ready is not None:
            stream.wait(item.ready, item.values)
        if stage is Stage.ENCODER:
            inputs = await self._inputs(item.values, pipeline)
            values = await self._call(stream, pipeline.encode, inputs, item.seed)
        elif stage is Stage.DENOISER:
            if item.rebind is not None:
                item.values = await self._rebound(item.values, item.rebind, stream, pipeline)
            values = await self._denoise(item, stream, pipeline)
        else:
            values = await self._call(stream, pipeline.decode, item.values)
        # The stage has ended when the device says so: its seconds are then true, and its inputs can be dropped.
        end = stream.record()
        await self._until(stream, end)
        if devices.releases_cached_memory(stage, self.component, shared=self._shared):
            await self._call(stream, devices.release_cached_memory, stream.device)
        if item.cancelled:
            raise _StoppedError
        item.values, item.ready = values, end
        return stage is Stage.ENCODER and pipeline.seed_independent

    async def _rebound(
        self, values: dict[str, object], rebind: Rebind, stream: DeviceStream, pipeline: StagePipeline
    ) -> dict[str, object]:
        """Adapt cached encoder outputs to this request: its seed and the inputs that only pass the encoder."""
        # The encoder has seen to the files: they need not be read again.
        plain = {name: value for name, value in rebind.inputs.items() if not isinstance(value, Images | Tensors)}
        inputs = await self._inputs(plain, pipeline)
        return await self._call(stream, pipeline.rebind, values, inputs, rebind.seed)

    async def _inputs(self, given: Mapping[str, object], pipeline: StagePipeline) -> dict[str, object]:
        """Give the inputs of a request as the pipeline takes them; only files are worth another thread."""
        read = partial(resolve_inputs, given, self.uploads, pipeline.signature, alpha=pipeline.alpha)
        return await asyncio.to_thread(read) if has_files(given) else read()

    async def _denoise(self, item: ActiveAttempt, stream: DeviceStream, pipeline: StagePipeline) -> dict[str, object]:
        denoising = await self._call(stream, pipeline.denoise, item.values)
        launched: deque[tuple[int, int | None, StreamEvent]] = deque()
        more = True
        while more:
            more = await self._call(stream, denoising.advance)
            launched.append((denoising.step, denoising.total_steps, stream.record()))
            # One step is launched ahead, so that the device has work while the host waits for the step before.
            ahead = 1 if more else 0
            while launched and (len(launched) > ahead or launched[0][2].passed):
                step, total_steps, end = launched.popleft()
                await self._until(stream, end)
                self._progress(item.attempt, step, total_steps)
            if more and item.cancelled:
                await self._call(stream, denoising.cancel)
                raise _StoppedError
        return denoising.result()

    async def _until(self, stream: DeviceStream, event: StreamEvent) -> None:
        """Wait for an event of the device; on the CPU it has passed, and no thread has to be waited for."""
        if not event.passed:
            await self._call(stream, event.synchronize)

    async def _call(self, stream: DeviceStream, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        self._call_began = time.monotonic()
        try:
            return await stream.run(function, *args, **kwargs)
        finally:
            self._call_began = None

    def _progress(self, attempt: Attempt, step: int, total_steps: int | None) -> None:
        """Note a step that is done, and tell the head if it is there and has room."""
        progress = self.context.attempts.stepped(attempt, step, total_steps or 0, time.monotonic())
        if self.context.reporter.paused:
            return
        try:
            self.reference("head").tell(progress)
        except MailboxFullError:  # the next step says how far it has come
            self.log.debug("progress not told", attempt=str(attempt), step=step)
