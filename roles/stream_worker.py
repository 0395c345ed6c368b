"""The stream worker: owns the device's compute stream, the one thread that launches work on it, and the model.

Panels run in the order in which they are told. A denoise runs one step at a time, so that it can be stopped and
watched between two of them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

import msgspec
import torch

from triptych.actors import Actor, Component, StartDelayed, StartFailure, Topology
from triptych.actors.actor import LOADING, READY
from triptych.actors.errors import describe
from triptych.bus import MailboxFull, Message, current_traceparent
from triptych.engines.model_version import model_version
from triptych.engines.panels import ModelError, Panel
from triptych.engines.pipeline import PanelPipeline
from triptych.engines.placing import NoRoomError
from triptych.engines.read_progress import ReadProgress
from triptych.engines.streams import DeviceStream, StreamEvent
from triptych.roles import devices
from triptych.roles.messages.device import (
    CancelPanel,
    PanelCancelled,
    PanelFailed,
    PanelFinished,
    PanelStarted,
    PanelStepped,
    RunPanel,
    TurnWeights,
    WeightsTurned,
)
from triptych.roles.messages.work import Pictures, Renewal, Tensors, Work
from triptych.roles.resolve import has_files, resolve
from triptych.roles.uploads import UPLOADS, UploadStore
from triptych.roles.weights import load_panels, weights_facts
from triptych.roles.workspace import Premises

P = ParamSpec("P")
T = TypeVar("T")

OVERDUE_HEARTBEATS = 8.0
"""A call to the device that takes this many heartbeat timeouts is taken for hung."""
PROGRESS_EVERY_S = 1.0
PROGRESS_LOG_EVERY_S = 10.0


class FilesChanged(StartDelayed):
    """What was loaded is not of the version that was told to the head: this process has to start anew."""


class _Stopped(Exception):  # noqa: N818  not an error
    """The work was to be stopped."""


@dataclass(slots=True)
class Job:
    """A panel to run."""

    work: Work
    panel: Panel
    traceparent: str
    cancelled: bool = False


class StreamWorker(Actor):
    """The second actor of a role process."""

    def __init__(self, component: Component, topology: Topology, premises: Premises) -> None:
        super().__init__(f"{component.name}.stream")
        self.component = component
        self.topology = topology
        self.model = topology.model_of(component)
        self.premises = premises
        self.uploads = UploadStore(topology.state_dir / UPLOADS)
        self.panels_run = 0
        self.first_s: dict[str, float] = {}
        """Seconds of the first run of each panel: compilers and kernels are warmed up in it."""
        self._queue: deque[Job | TurnWeights] = deque()
        self._wake = asyncio.Event()
        self._current: Job | None = None
        self._call_began: float | None = None
        self._load_began: float | None = None
        self._reading = ReadProgress()
        self._start_timeout_s = topology.supervision.start_timeout_s
        self._bound_s = OVERDUE_HEARTBEATS * topology.supervision.heartbeat_timeout_s
        self._stream: DeviceStream | None = None
        self._pipeline: PanelPipeline | None = None
        self._shared = False
        self._after_loading = 0
        self._out_of_memory = 0

    async def started(self) -> None:
        """Load the model on the device thread, off the loop.

        Raises:
            StartFailure: the model cannot be served, or the device is not there.
            StartDelayed: the folder of the model is away, or others fill the card.

        """
        began = time.monotonic()
        device = await asyncio.to_thread(devices.usable_device, self.component)
        self._stream = DeviceStream(device, "compute")
        self._shared = devices.shares_card(self.component, self.topology.components, torch.cuda.device_count())
        self.start_s["device"] = time.monotonic() - began
        version = await asyncio.to_thread(model_version, self.model.files)
        if not self.topology.starts_asleep(self.component):
            self.start_s["weights"] = await self._bring(self._stream, version)
        self.premises.model_found(version, str(device))
        self.spawn(self._serve(self._stream), name="panels")

    async def _bring(self, stream: DeviceStream, version: str) -> float:
        """Load the weights, which are to be of that version, or bring them back; returns the seconds of it.

        Raises:
            StartFailure, StartDelayed: as `started`.

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
            raise FilesChanged("the files of the model changed while they were read, or while it slept")
        self.premises.model_loaded(loaded.signature, loaded.placement.held_bytes)
        panels = [panel.value for panel in loaded.panels]
        facts: dict[str, object] = {
            "panels": panels,
            "route": loaded.route.value,
            "device": str(stream.device),
            "model": version,
        }
        facts |= {"read_bytes": self._reading.total, "seconds": round(seconds, 3)}
        self.log.info("model loaded", **facts, **weights_facts(loaded.placement))
        return seconds

    def _from_host(self, pipeline: PanelPipeline) -> None:
        """Bring weights back to the card. Raises StartDelayed where others fill it just now."""
        try:
            pipeline.to_device()
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            pipeline.to_host()
            raise StartDelayed(f"{self.component.device} has no room for the weights: {describe(error)}") from error

    async def _turn(self, message: TurnWeights, stream: DeviceStream) -> None:
        """Bring the weights, or let go of them. Raises StartFailure and FilesChanged, which end the process."""
        began, trouble = time.monotonic(), ""
        if message.awake and not self.premises.awake:
            try:
                await self._bring(stream, self.premises.model)
            except FilesChanged:
                raise
            except StartDelayed as delay:
                self._load_began, trouble = None, str(delay)
                self.log.warning("not woken", reason=trouble)
        elif self.premises.awake and not message.awake:
            self.premises.awake = False
            await stream.run(self._let_go, stream.device)
            self.log.info("weights let go", seconds=round(time.monotonic() - began, 3))
        self.set_state(READY)
        self._tell(WeightsTurned(self.premises.awake, time.monotonic() - began, trouble))

    def _let_go(self, device: torch.device) -> None:
        """Free the memory of the weights: from a card plain ones go to the host, all others are read again."""
        plain = self.component.offload == "none" and self.component.quantization == "none"
        if self._pipeline is not None and device.type == "cuda" and plain:
            self._pipeline.to_host()
        else:
            self._pipeline = None
        devices.free_memory(device)
        devices.trim_host()

    def facts(self) -> dict[str, int | float | str | bool]:
        """What it runs, what waits, which components it has loaded, and what it takes of a card."""
        return {
            "device": str(self._stream.device) if self._stream else self.component.device,
            "running": str(self._current.work) if self._current else "",
            "queued": len(self._queue),
            "panels_run": self.panels_run,
            "components": ", ".join(sorted(self._pipeline.components)) if self._pipeline else "",
            "weights_read_bytes": self._reading.read,
            "weights_total_bytes": self._reading.total,
            "awake": self.premises.awake,
            **{f"first_{panel}_s": seconds for panel, seconds in self.first_s.items()},
            **(devices.memory_facts(self._stream.device) if self._pipeline and self._stream else {}),
        }

    def overdue(self) -> str | None:
        """Say so when loading the model or one call to the device takes far longer than any should."""
        if self._load_began is not None and time.monotonic() - self._load_began > self._start_timeout_s:
            return f"loading the model takes more than {self._start_timeout_s:g} s"
        if self._call_began is None or self._current is None:
            return None
        seconds = time.monotonic() - self._call_began
        bound_s = self._bound_s
        if self._current.panel.value not in self.first_s:  # it may compile
            bound_s = max(bound_s, self._start_timeout_s)
        if seconds < bound_s:
            return None
        return f"a step of {self._current.work} ({self._current.panel}) runs since {seconds:.0f} s"

    async def run_panel(self, message: RunPanel) -> None:
        """Queue a panel."""
        self._queue.append(Job(message.work, message.panel, current_traceparent.get()))
        self._wake.set()

    async def turn_weights(self, message: TurnWeights) -> None:
        """Bring the weights, or let go of them, when what was told before has been done."""
        self._queue.append(message)
        self._wake.set()

    async def cancel_panel(self, message: CancelPanel) -> None:
        """Stop a panel before its next step, or take it out of the queue; one that is not here has ended already."""
        if self._current and self._current.work == message.work:
            self._current.cancelled = True
            return
        for job in self._queue:
            if isinstance(job, Job) and job.work == message.work:
                self._queue.remove(job)
                self._tell(PanelCancelled(job.work))
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
            self.set_state(LOADING, f"{self._reading}")
            if logged is None or now - logged >= PROGRESS_LOG_EVERY_S:
                logged = now
                self.log.info("loading", read_bytes=read, total_bytes=total, seconds=round(now - began, 1))

    async def _loaded(self, stream: DeviceStream) -> PanelPipeline:
        """Load the model. Raises StartFailure, and StartDelayed where others fill the card just now."""
        try:
            return await stream.run(self._load, stream.device)
        except NoRoomError as error:
            failure = StartFailure if error.needed > error.total else StartDelayed
            raise failure(str(error)) from error
        except ModelError as error:
            raise StartFailure(str(error)) from error
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            raise StartDelayed(f"{stream.device} has no room beside the weights: {describe(error)}") from error

    def _load(self, device: torch.device) -> PanelPipeline:
        component, model = self.component, self.model
        dtype = getattr(torch, component.dtype)
        if device.type == "cuda":
            devices.use_exact_kernels()
        pipeline = load_panels(component, model, device, self._reading)
        if device.type == "cuda":
            devices.warm_up(device, dtype)
        self._after_loading = devices.free_memory(device)
        return pipeline

    async def _serve(self, stream: DeviceStream) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                job = self._queue.popleft()
                if isinstance(job, TurnWeights):
                    await self._turn(job, stream)
                    continue
                if self._pipeline is None or not self.premises.awake:
                    raise RuntimeError(f"{job.work} is to be run without weights")
                self._current = job
                current_traceparent.set(job.traceparent)
                outcome = await self._run(job, stream, self._pipeline)
                self._current = None
                self._tell(outcome)
                if isinstance(outcome, PanelFailed) and outcome.device_lost:
                    return  # nothing more is launched; the instance reports it and ends the process

    async def _run(self, job: Job, stream: DeviceStream, pipeline: PanelPipeline) -> Message:
        self._tell(PanelStarted(job.work, job.panel))
        began = time.monotonic()
        try:
            seedless = await self._compute(job, stream, pipeline)
        except _Stopped:
            return PanelCancelled(job.work)
        except Exception as error:
            self.log.warning("panel failed", work=str(job.work), panel=job.panel.value, exc_info=error)
            lost, full = devices.is_device_lost(error), devices.is_out_of_memory(error)
            at_fault = devices.is_at_fault(error) and not (lost or full)
            certain = devices.is_certain(error) or devices.is_misfit(error)
            why = (
                f"parts of the model {self.model.name or self.model.path.name} do not fit each other: {describe(error)}"
                if devices.is_misfit(error)
                else describe(error)
            )
            failed = PanelFailed(job.work, job.panel, why, at_fault, lost, certain and not (lost or full))
            devices.forget(error)
            return msgspec.structs.replace(failed, device_lost=await self._is_full(stream)) if full else failed
        self.panels_run += 1
        self._out_of_memory = 0
        seconds = time.monotonic() - began
        if job.panel.value not in self.first_s:
            self.first_s[job.panel.value] = seconds
            self.log.info("first call", panel=job.panel.value, seconds=round(seconds, 2))
        return PanelFinished(job.work, job.panel, seconds, seedless)

    async def _is_full(self, stream: DeviceStream) -> bool:
        """Free what a stage has left that ran out of memory; returns whether only the end of the process frees more."""
        self._out_of_memory += 1
        allocated = await stream.run(devices.free_memory, stream.device)
        facts = {"allocated": allocated, "after_loading": self._after_loading, "in_a_row": self._out_of_memory}
        self.log.warning("out of memory on the device", **facts)
        return devices.ends_the_process(**facts)

    async def _compute(self, job: Job, stream: DeviceStream, pipeline: PanelPipeline) -> bool:
        """Put the panel's outputs in the place of its inputs; returns whether they are the same for every seed."""
        held = self.premises.workspace.get(job.work)
        if held.ready is not None:
            stream.wait(held.ready, held.values)
        if job.panel is Panel.ENCODER:
            inputs = await self._inputs(held.values, pipeline)
            values = await self._call(stream, pipeline.encode, inputs, held.seed)
        elif job.panel is Panel.DENOISER:
            if held.renewal is not None:
                held.values = await self._renewed(held.values, held.renewal, stream, pipeline)
            values = await self._denoise(job, stream, pipeline, held.values)
        else:
            values = await self._call(stream, pipeline.decode, held.values)
        # The panel has ended when the device says so: its seconds are then true, and its inputs can be dropped.
        end = stream.record()
        await self._call(stream, end.synchronize)
        if devices.gives_back(job.panel, self.component, shared=self._shared):
            await self._call(stream, devices.give_back, stream.device)
        if job.cancelled:
            raise _Stopped
        self.premises.workspace.replace(job.work, values, end)
        return job.panel is Panel.ENCODER and pipeline.seedless

    async def _renewed(
        self, values: dict[str, object], renewal: Renewal, stream: DeviceStream, pipeline: PanelPipeline
    ) -> dict[str, object]:
        """Make loaded values, which an encoder made for another request, those of this one."""
        # The encoder has seen to the files: they need not be read again.
        plain = {name: value for name, value in renewal.inputs.items() if not isinstance(value, Pictures | Tensors)}
        inputs = await self._inputs(plain, pipeline)
        return await self._call(stream, pipeline.renew, values, inputs, renewal.seed)

    async def _inputs(self, given: Mapping[str, object], pipeline: PanelPipeline) -> dict[str, object]:
        """Give the inputs of a request as the pipeline takes them; only files are worth another thread."""
        read = partial(resolve, given, self.uploads, pipeline.signature, alpha=pipeline.alpha)
        return await asyncio.to_thread(read) if has_files(given) else read()

    async def _denoise(
        self, job: Job, stream: DeviceStream, pipeline: PanelPipeline, values: dict[str, object]
    ) -> dict[str, object]:
        denoising = await self._call(stream, pipeline.denoise, values)
        launched: deque[tuple[int, int | None, StreamEvent]] = deque()
        more = True
        while more:
            more = await self._call(stream, denoising.advance)
            launched.append((denoising.step, denoising.total_steps, stream.record()))
            # One step is launched ahead, so that the device has work while the host waits for the step before.
            ahead = 1 if more else 0
            while launched and (len(launched) > ahead or launched[0][2].passed):
                step, total_steps, end = launched.popleft()
                await self._call(stream, end.synchronize)
                self._progress(job.work, step, total_steps)
            if more and job.cancelled:
                await self._call(stream, denoising.cancel)
                raise _Stopped
        return denoising.result()

    async def _call(self, stream: DeviceStream, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        self._call_began = time.monotonic()
        try:
            return await stream.run(function, *args, **kwargs)
        finally:
            self._call_began = None

    def _progress(self, work: Work, step: int, total_steps: int | None) -> None:
        try:
            self._tell(PanelStepped(work, step, total_steps or 0))
        except MailboxFull:  # the next step says how far it has come
            self.log.debug("progress not told", work=str(work), step=step)

    def _tell(self, message: Message) -> None:
        self.reference(self.component.name).tell(message)
