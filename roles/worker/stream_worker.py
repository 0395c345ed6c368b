"""The stream worker: owns the device's compute stream, the one thread that launches work on it, and the model.

Its loop schedules, runs and postprocesses: the step scheduler chooses among the runs that the process holds, those
take one step together, and what came of the step is passed on. So a run can be stopped, watched and overtaken between
two steps.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar, cast

import torch
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from triptych.actors import Actor, Component, StartDelayedError, StartError, Topology
from triptych.actors.child_state import ChildState
from triptych.actors.errors import describe
from triptych.bus import Message
from triptych.engines.memory.streams import DeviceStream, StreamEvent
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import ModelError, Stage
from triptych.engines.steps.checkpoint import CheckpointError
from triptych.engines.steps.denoising import Denoising
from triptych.engines.steps.executor import StepExecutor, StepRound
from triptych.engines.weights.model_version import model_version
from triptych.engines.weights.placement import OutOfDeviceMemoryError
from triptych.engines.weights.read_ahead import ReadProgress
from triptych.roles.media.video_input import no_check
from triptych.roles.messages.common import Attempt, Images, Rebind, Tensors
from triptych.roles.messages.stages import InstanceWakeChanged, StageFailed
from triptych.roles.messages.worker import (
    CancelAttempt,
    DeviceLost,
    RunStage,
    SetWeightsLoaded,
    StoreCheckpoint,
    StorePreview,
)
from triptych.roles.previews import preview_attempt, preview_steps
from triptych.roles.worker import devices
from triptych.roles.worker.attempts import PreviewValues, Snapshot
from triptych.roles.worker.inputs import has_files, resolve_inputs
from triptych.roles.worker.model_loading import load_stages, weights_stats
from triptych.roles.worker.process_context import ProcessContext
from triptych.roles.worker.stage_run import Round, RunStep, StageRun
from triptych.roles.worker.step_scheduler import StepScheduler
from triptych.roles.worker.store_client import upload_store

P = ParamSpec("P")
T = TypeVar("T")

OVERDUE_HEARTBEATS = 8.0
"""A call to the device that takes this many heartbeat timeouts is taken for hung."""
SHORT_STEPS_S = 0.1
"""Steps of a run that has the device to itself are taken in one call to its thread, for so long; see `_alone_s`."""
MAX_READERS = 4
"""Runs whose files are read at a time."""
PROGRESS_EVERY_S = 1.0
PROGRESS_LOG_EVERY_S = 10.0


class ModelChangedError(StartDelayedError):
    """What was loaded is not of the version that was told to the head: this process has to start anew."""


class StreamWorker(Actor):
    """The second actor of a role process."""

    def __init__(self, component: Component, topology: Topology, context: ProcessContext) -> None:
        super().__init__(f"{component.name}.stream")
        self.component = component
        self.topology = topology
        self.model = topology.model_of(component)
        self.context = context
        self.uploads = upload_store(component, topology)
        self.stages_run = 0
        self.largest_batch = 0
        """Most denoises that took a step together."""
        self.first_s: dict[str, float] = {}
        """Seconds of the first run of each stage: compilers and kernels are warmed up in it."""
        self._runs: dict[Attempt, StageRun] = {}
        """All that have not ended."""
        self._scheduler = StepScheduler(component.policy, component.max_batch)
        """Those among them that have a step to take."""
        self._executor = StepExecutor()
        self._readers = ThreadPoolExecutor(MAX_READERS, thread_name_prefix="inputs")
        self._weights_changes: deque[SetWeightsLoaded] = deque()
        self._wake = asyncio.Event()
        self._interrupted = False
        self._current: tuple[StageRun, ...] = ()
        """Those that the present call to the device is for."""
        self._round_ended = 0.0
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
        version = await self._version_on_disk()
        if not self.topology.starts_asleep(self.component):
            self.start_s["weights"] = await self._bring(self._stream, version)
        self.context.model_known(version, str(device))
        self.spawn(self._serve(self._stream), name="stages")

    async def _version_on_disk(self) -> str:
        return await asyncio.to_thread(model_version, self.model.files, by_content=len(self.topology.hosts) > 1)

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
        if version != await self._version_on_disk():
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
            "running": ", ".join(str(run.attempt) for run in self._current),
            "queued": sum(run.began is None for run in self._runs.values()),
            "stages_run": self.stages_run,
            "largest_batch": self.largest_batch,
            "components": ", ".join(sorted(self._pipeline.components)) if self._pipeline else "",
            "weights_read_bytes": self._reading.read,
            "weights_total_bytes": self._reading.total,
            "awake": self.context.awake,
            **(self._pipeline.step_cache.stats() if self._pipeline and self._pipeline.step_cache else {}),
            **{f"first_{stage}_s": seconds for stage, seconds in self.first_s.items()},
            **(devices.memory_stats(self._stream.device) if self._pipeline and self._stream else {}),
        }

    def metrics(self) -> Iterable[Metric]:
        """Return how many runs it holds, and the memory of its GPU."""
        runs = GaugeMetricFamily("triptych_instance_runs", "Stages that an instance holds, by state.", labels=["state"])
        waiting = sum(run.began is None for run in self._runs.values())
        runs.add_metric(["waiting"], waiting)
        runs.add_metric(["running"], len(self._runs) - waiting)
        memory = GaugeMetricFamily("triptych_device_memory_bytes", "Memory of the GPU.", labels=["kind"])
        for name, nbytes in (devices.memory_stats(self._stream.device) if self._stream else {}).items():
            memory.add_metric([name.removeprefix("device_").removesuffix("_bytes")], float(nbytes))
        return [runs, memory]

    def watchdog(self) -> str | None:
        """Say so when loading the model or one call to the device takes far longer than any should."""
        if self._load_began is not None and time.monotonic() - self._load_began > self._start_timeout_s:
            return f"loading the model takes more than {self._start_timeout_s:g} s"
        if self._call_began is None or not self._current:
            return None
        seconds, stage = time.monotonic() - self._call_began, self._current[0].stage
        bound_s = self._bound_s
        if stage.value not in self.first_s:  # it may compile
            bound_s = max(bound_s, self._start_timeout_s)
        if seconds < bound_s:
            return None
        attempts = ", ".join(str(run.attempt) for run in self._current)
        return f"a step of {attempts} ({stage}) runs since {seconds:.0f} s"

    async def run_stage(self, message: RunStage) -> None:
        """Hold a run until the scheduler has chosen it for each of its steps."""
        item = self.context.attempts.active[message.attempt]
        if item.cancelled:  # its CancelAttempt has overtaken it
            self._pass_on(self.context.attempts.stopped(message.attempt))
            return
        run = self._runs[message.attempt] = StageRun(item, message.stage)
        if run.stage is Stage.ENCODER and self._pipeline is not None and has_files(item.values):
            self.spawn(self._read_files(run, self._pipeline), name=f"files of {message.attempt}")
        else:
            self._schedule_run(run)

    async def _read_files(self, run: StageRun, pipeline: StagePipeline) -> None:
        """Read the files of a run and schedule it then: a video takes up to minutes, and others compute meanwhile."""
        read = partial(self._resolve, run.item.values, pipeline, run.check)
        try:
            with self.context.timeline.measure("transfer", "read", run.attempt):
                run.inputs = await asyncio.get_running_loop().run_in_executor(self._readers, read)
        except Exception as error:  # noqa: BLE001 - it ends this run alone, in its turn
            run.unreadable = error
        except asyncio.CancelledError:
            run.left = True
            raise
        if not run.left:
            self._schedule_run(run)

    def _schedule_run(self, run: StageRun) -> None:
        self._scheduler.add(run.item)
        self._interrupted = True
        self._wake.set()

    async def set_weights_loaded(self, message: SetWeightsLoaded) -> None:
        """Load the weights, or release them, once no run is held; the instance takes none meanwhile."""
        self._weights_changes.append(message)
        self._interrupted = True
        self._wake.set()

    async def cancel_attempt(self, message: CancelAttempt) -> None:
        """Stop a run that waits; one that has begun is stopped before the next step."""
        run = self._runs.get(message.attempt)
        if run is not None and (run.began is None or self._device_lost):
            self._leave(run)
            self._pass_on(self.context.attempts.stopped(run.attempt))

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
        """Schedule, run, postprocess; for ever, or until the device is lost."""
        launched: deque[Round] = deque()
        while runs := await self._schedule(stream):
            launched += await self._run(runs, stream)
            await self._store_checkpoints(launched[-1], stream)
            await self._store_previews(launched[-1], stream)
            # Every run that goes on is between two steps here, on the host; the device may still compute the last.
            # One round is launched ahead, so that the device has work while the host waits for the one before.
            ahead = 1 if launched[-1].all_go_on else 0
            while launched and (len(launched) > ahead or launched[0].end.passed):
                await self._postprocess(launched.popleft(), stream)
        # Nothing more is launched; the instance reports why and ends the process.
        for run in [run for run in self._runs.values() if run.item.cancelled]:
            self._leave(run)
            self._pass_on(self.context.attempts.stopped(run.attempt))
        self._pass_on(DeviceLost(self._device_lost))

    async def _schedule(self, stream: DeviceStream) -> tuple[StageRun, ...]:
        """Stop what is cancelled and return the runs that take the next step; none if the device is lost."""
        while not self._device_lost:
            for run in [run for run in self._runs.values() if run.item.cancelled]:
                await self._stop(run, stream)
            if chosen := self._scheduler.next(time.monotonic()):
                return tuple(self._runs[attempt] for attempt in chosen)
            if self._weights_changes:
                await self._set_weights_loaded(self._weights_changes.popleft(), stream)
                continue
            self._wake.clear()
            await self._wake.wait()
        return ()

    async def _stop(self, run: StageRun, stream: DeviceStream) -> None:
        """End a cancelled run, and free what it holds at once; one that another instance goes on with is saved."""
        snapshot: Snapshot | None = None
        if run.denoising is not None:
            try:
                if run.item.returned and self.component.checkpoint_s:
                    snapshot = await self._snapshot(run, run.denoising, stream)
                await self._call(stream, run.denoising.cancel)
            except Exception as error:  # noqa: BLE001 - what unwinding raises ends this run alone
                await self._fail([(run, error)], stream)
                return
        self._leave(run)
        attempts = self.context.attempts
        self._pass_on(attempts.interrupted(run.attempt, snapshot) if snapshot else attempts.stopped(run.attempt))

    async def _store_checkpoints(self, round_: Round, stream: DeviceStream) -> None:
        """Save the runs whose last snapshot is long ago, unless that is still on its way, and those to be parked."""
        every_s, now = self.component.checkpoint_s, time.monotonic()
        if not every_s:
            return
        due = {step.run.attempt for step in round_.steps if step.more and now - step.run.saved_at >= every_s}
        for run in [run for run in self._runs.values() if run.attempt in due or run.item.parking]:
            item, denoising = run.item, run.denoising
            if denoising is None or not denoising.step or item.snapshot is not None or item.cancelled:
                continue
            run.saved_at = now
            if (snapshot := await self._snapshot(run, denoising, stream)) is not None:
                item.snapshot = snapshot
                self._pass_on(StoreCheckpoint(run.attempt))
            elif not denoising.over:
                item.parking = False  # it cannot go on elsewhere

    async def _snapshot(self, run: StageRun, denoising: Denoising, stream: DeviceStream) -> Snapshot | None:
        """Save a run that is between two steps; None if it is not, or is of a kind that cannot be saved."""
        if not denoising.step or denoising.over or denoising.cannot_resume:
            return None
        try:
            values = await self._call(stream, denoising.snapshot)
        except CheckpointError as error:
            self.log.info("no checkpoint", attempt=str(run.attempt), reason=str(error))
            return None
        return Snapshot(denoising.step, values, stream.record())

    async def _run(self, runs: tuple[StageRun, ...], stream: DeviceStream) -> list[Round]:
        """Launch one step of each of the runs: a step of a denoise, or a whole encode or decode.

        Short steps of denoises that nothing else waits for are taken several at a time, each of them a round.
        """
        pipeline, self._current = self._pipeline, runs
        if pipeline is None or not self.context.awake:
            raise RuntimeError(f"{runs[0].attempt} is to be run without weights")
        steps: dict[StageRun, RunStep] = {}
        for run in runs:
            if run.began is None:
                run.began = run.saved_at = time.monotonic()
                started = self.context.attempts.started(run.attempt, run.stage, run.began)
                asyncio.get_running_loop().call_soon(self.context.tell_head, started)  # once the stage computes
                try:
                    await self._begin(run, stream, pipeline)
                except Exception as error:  # noqa: BLE001 - it ends this run alone, and is reported as its failure
                    steps[run] = RunStep(run, more=False, error=error)
        began, earlier = time.monotonic(), list[Round]()
        prepared = [(run, run.denoising) for run in runs if run not in steps and run.denoising is not None]
        if prepared:
            earlier, last = await self._advance(prepared, stream)
            began = (earlier[-1].ended if earlier else None) or began
            for (run, denoising), result in zip(prepared, last.results, strict=True):
                resumes, run.resumes = run.resumes, False
                if resumes and isinstance(result.error, CheckpointError):
                    steps[run] = await self._begin_again(run, result.error, stream, pipeline)
                    continue
                steps[run] = RunStep(run, result.more, denoising.step, denoising.total_steps, result.error)
                self._scheduler.stepped(run.attempt, denoising.step, denoising.total_steps, denoising.batch_key)
        for run in runs:
            step = steps.setdefault(run, RunStep(run, more=False))
            if not step.more:
                self._scheduler.remove(run.attempt)
        self._current = ()
        return [*earlier, Round(tuple(steps[run] for run in runs), began, stream.record())]

    async def _advance(
        self, prepared: list[tuple[StageRun, Denoising]], stream: DeviceStream
    ) -> tuple[list[Round], StepRound]:
        """Take one step of each denoise, or several; returns the rounds before the last, and the last."""
        denoisings = [denoising for _, denoising in prepared]
        self.largest_batch = max(self.largest_batch, len(denoisings))
        self._interrupted, began, earlier = False, time.monotonic(), list[Round]()
        alone_s = self._alone_s([run for run, _ in prepared], stream)
        *before, last = await self._call(stream, self._executor.advance_for, denoisings, alone_s, self._is_interrupted)
        for taken in before:
            done = zip(prepared, taken.steps, strict=True)
            steps = tuple(RunStep(run, True, step, denoising.total_steps) for (run, denoising), step in done)
            earlier.append(Round(steps, began, StreamEvent(), taken.ended))
            began = taken.ended
        return earlier, last

    def _alone_s(self, runs: list[StageRun], stream: DeviceStream) -> float:
        """Return for how long these runs may take steps before anything else is looked at; 0 for one step.

        On a GPU a round is launched ahead instead: the host must not get further ahead of the device.
        """
        if stream.device.type != "cpu" or len(self._runs) > len(runs) or self._weights_changes:
            return 0.0
        if any(run.resumes or run.item.previews for run in runs):
            return 0.0
        # A checkpoint is made between two calls: work after it is lost with the process.
        return min(SHORT_STEPS_S, self.component.checkpoint_s / 4 or SHORT_STEPS_S)

    def _is_interrupted(self) -> bool:
        """Whether a run or a change of the weights has come, or a run is to stop; any thread may ask."""
        return self._interrupted or any(run.item.cancelled or run.item.parking for run in self._current)

    async def _begin(self, run: StageRun, stream: DeviceStream, pipeline: StagePipeline) -> None:
        """Prepare a denoise, or compute an encode or a decode."""
        item = run.item
        if item.ready is not None:
            stream.wait(item.ready, item.values)
        if run.stage is Stage.ENCODER:
            if run.unreadable is not None:
                raise run.unreadable
            inputs, run.inputs = run.inputs, None
            if inputs is None:
                inputs = self._resolve(item.values, pipeline, run.check)
            self.context.lease_ahead(item)
            run.outputs = await self._call(stream, pipeline.encode, inputs, item.seed)
            run.seed_independent = pipeline.seed_independent
        elif run.stage is Stage.DENOISER:
            if item.rebind is not None:
                item.values = await self._rebound(item.values, item.rebind, stream, pipeline)
            run.denoising = await self._prepared(run, stream, pipeline)
        else:
            run.outputs = await self._call(stream, pipeline.decode, item.values)

    async def _prepared(self, run: StageRun, stream: DeviceStream, pipeline: StagePipeline) -> Denoising:
        """Prepare a denoise, from its checkpoint if it has one."""
        item, resume = run.item, run.item.resume
        item.resume = None
        if resume is not None:
            if item.ready is not None:
                stream.wait(item.ready, resume)
            try:
                denoising = await self._call(stream, pipeline.denoise, item.values, item.hints.bucket, resume)
            except CheckpointError as error:
                self.log.warning("checkpoint not used", attempt=str(run.attempt), reason=str(error))
            else:
                run.resumes, item.resumed_from = True, cast(int, resume["step"])
                return denoising
        return await self._call(stream, pipeline.denoise, item.values, item.hints.bucket)

    async def _begin_again(
        self, run: StageRun, error: CheckpointError, stream: DeviceStream, pipeline: StagePipeline
    ) -> RunStep:
        """Prepare a denoise from its beginning, whose checkpoint was of another run."""
        self.log.warning("checkpoint not used", attempt=str(run.attempt), reason=str(error))
        run.item.resumed_from = 0
        try:
            run.denoising = await self._prepared(run, stream, pipeline)
        except Exception as failure:  # noqa: BLE001 - it ends this run alone, and is reported as its failure
            return RunStep(run, more=False, error=failure)
        return RunStep(run, more=True)

    async def _store_previews(self, round_: Round, stream: DeviceStream) -> None:
        """Have stored, for a decoder, what the denoises of a round are that are to be shown after this step."""
        for each in round_.steps:
            item = each.run.item
            if each.more and not item.cancelled and each.step in preview_steps(each.total_steps or 0, item.previews):
                try:
                    await self._store_preview(each.run, stream)
                except CheckpointError as error:
                    item.previews = 0
                    self.log.info("no previews", attempt=str(item.attempt), reason=str(error))
                except Exception as error:
                    item.previews = 0
                    self.log.warning("no previews", attempt=str(item.attempt), exc_info=error)
                    devices.clear_frames(error)

    async def _store_preview(self, run: StageRun, stream: DeviceStream) -> None:
        """Pass on what a denoise between two steps is so far; raises whatever the pipeline raises."""
        if run.denoising is None or self._pipeline is None:
            return
        with self.context.timeline.measure("compute", "preview", run.attempt):
            snapshot = await self._call(stream, run.denoising.snapshot)
            values = await self._call(stream, self._pipeline.preview, run.item.values, snapshot)
        preview = preview_attempt(run.attempt, run.denoising.step)
        self.context.attempts.previews[preview] = PreviewValues(values, stream.record())
        self._pass_on(StorePreview(preview))

    async def _postprocess(self, round_: Round, stream: DeviceStream) -> None:
        """Wait until the device has done a round, tell how far its runs are, and pass on those that have ended."""
        self._current = tuple(each.run for each in round_.steps)
        late: Exception | None = None
        try:
            await self._until(stream, round_.end)
        except Exception as error:  # noqa: BLE001 - what the device raises late ends the runs of the round
            late = error
        now, first = round_.ended or time.monotonic(), round_.steps[0]
        if first.run.stage is Stage.DENOISER:
            began = max(round_.began, self._round_ended)
            self._scheduler.ran(round_.attempts, now - began)
            self.context.timeline.span(
                "compute",
                "step",
                began,
                *round_.attempts,
                ended=now,
                step=first.step,
                total_steps=first.total_steps or 0,
            )
        self._round_ended = now
        failed: list[tuple[StageRun, Exception]] = []
        for each in round_.steps:
            if self._runs.get(each.run.attempt) is not each.run:
                continue  # it was stopped while a later round was chosen, or has failed in it
            if (raised := each.error or late) is not None:
                failed.append((each.run, raised))
                continue
            if each.run.stage is Stage.DENOISER:
                self._progress(each.run.attempt, each.step, each.total_steps)
            if not each.more:
                await self._finish(each.run, round_.end, stream)
        if failed:
            await self._fail(failed, stream)
        self._current = ()

    async def _finish(self, run: StageRun, end: StreamEvent, stream: DeviceStream) -> None:
        """Put a run's outputs in the place of its inputs, and pass its attempt on."""
        if devices.releases_cached_memory(run.stage, self.component, shared=self._shared):
            await self._call(stream, devices.release_cached_memory, stream.device)
        self._leave(run)
        item, attempts = run.item, self.context.attempts
        if item.cancelled and not item.parking:
            self._pass_on(attempts.stopped(run.attempt))
            return
        item.values, item.ready = run.result(), end
        self.stages_run += 1
        self._out_of_memory = 0
        seconds = time.monotonic() - (run.began or 0.0)
        if run.stage.value not in self.first_s:
            self.first_s[run.stage.value] = seconds
            self.log.info("first call", stage=run.stage.value, seconds=round(seconds, 2))
        self._pass_on(attempts.computed(run.attempt, seconds, seed_independent=run.seed_independent))

    def _leave(self, run: StageRun) -> None:
        if run.began is not None:
            self.context.timeline.span("stage", run.stage.value, run.began, run.attempt)
        run.left = True
        self._scheduler.remove(run.attempt)
        del self._runs[run.attempt]

    def _pass_on(self, message: Message) -> None:
        self.context.pass_on(self, message)

    async def _fail(self, failed: list[tuple[StageRun, Exception]], stream: DeviceStream) -> None:
        """Report why runs of one round failed, and find out whether the device is lost."""
        full = lost = ""
        for run, error in failed:
            self._leave(run)
            self.log.warning("stage failed", attempt=str(run.attempt), stage=run.stage.value, exc_info=error)
            why = describe(error)
            if devices.is_component_mismatch(error):
                why = f"parts of the model {self.model.name or self.model.path.name} do not fit each other: {why}"
            full = full or (why if devices.is_out_of_memory(error) else "")
            lost = lost or (why if devices.is_device_lost(error) else "")
            self._pass_on(self._report(run, error, why))
            devices.clear_frames(error)
            run.denoising = None
        if lost or (full and await self._is_full(stream)):
            self._device_lost = lost or full

    def _report(self, run: StageRun, error: Exception, why: str) -> StageFailed:
        passing = devices.is_device_lost(error) or devices.is_out_of_memory(error)
        certain = devices.is_deterministic(error) or devices.is_component_mismatch(error)
        return self.context.attempts.stage_failed(
            run.attempt,
            why,
            invalid_request=devices.is_invalid_request(error) and not passing,
            deterministic=certain and not passing,
        )

    async def _is_full(self, stream: DeviceStream) -> bool:
        """Free what a stage has left that ran out of memory; returns whether only the end of the process frees more."""
        self._out_of_memory += 1
        allocated = await stream.run(devices.free_memory, stream.device)
        facts = {"allocated": allocated, "after_loading": self._after_loading, "in_a_row": self._out_of_memory}
        self.log.warning("out of memory on the device", **facts)
        if any(run.began is not None for run in self._runs.values()):
            facts["allocated"] = 0  # what the others hold is no leak
        return devices.must_restart(**facts)

    async def _rebound(
        self, values: dict[str, object], rebind: Rebind, stream: DeviceStream, pipeline: StagePipeline
    ) -> dict[str, object]:
        """Adapt cached encoder outputs to this request: its seed and the inputs that only pass the encoder."""
        # The encoder has seen to the files: they need not be read again.
        plain = {name: value for name, value in rebind.inputs.items() if not isinstance(value, Images | Tensors)}
        inputs = self._resolve(plain, pipeline, no_check)
        return await self._call(stream, pipeline.rebind, values, inputs, rebind.seed)

    def _resolve(
        self, given: Mapping[str, object], pipeline: StagePipeline, check: Callable[[], None]
    ) -> dict[str, object]:
        """Return the inputs of a request as the pipeline takes them; only files need another thread."""
        return resolve_inputs(given, self.uploads, pipeline.signature, alpha=pipeline.alpha, check=check)

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
        """Note a step that is done, and tell the head."""
        progress = self.context.attempts.stepped(attempt, step, total_steps or 0, time.monotonic())
        if step + 1 == total_steps:
            self.context.lease_ahead(self.context.attempts.active[attempt])
        self.context.tell_head(progress)
