"""Run a denoise one step at a time, several of them alternately, on one thread.

A denoise runs its whole loop in one call. Here that call runs in a greenlet, a call stack that can be suspended and
resumed: between two steps the work calls `Denoising.pause`, which switches back to the caller of `advance`. Nothing is
copied or run twice, so the result has the same bits as that of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import greenlet
import torch

from triptych.engines.steps.checkpoint import CheckpointError
from triptych.engines.steps.denoiser_calls import CacheContextArguments, DenoiserCall, RunGreenlet

if TYPE_CHECKING:
    from triptych.engines.steps.step_caches import StepCacheState


class RunCancelledError(BaseException):
    """Raised inside a denoise to unwind it.

    A `BaseException`, because blocks log each `Exception` with a traceback at every level.
    """


class Denoising:
    """A prepared denoise that runs step by step, always on the thread of the first `advance`.

    Args:
        work: The whole run: it calls `pause` between any two steps and returns the payload for the decoder.

    Attributes:
        total_steps: The number of steps; None before the first step, and for pipelines that step by chunks.
        step: The number of steps that are done.
        cancelled: Whether `cancel` has ended it.
        pipeline: The pipeline of the run, private to the request; None when the run has ended.
        bucket: How many calls of the denoiser are computed together, with those of other runs or padded; 1 for alone.
        adapters: The adapters of the request: only calls with the same ones are computed together.
        edits_modules: Whether the run has changed shared modules for its own calls, which are computed alone then.
        step_cache: What the step cache of the model keeps for this run; None without one.
        batch_key: Runs whose last calls have the same key are likely to be computed together; None before the first.
        cannot_resume: Why `snapshot` refuses; "" while nothing is known against it.
    """

    def __init__(self, work: Callable[[], dict[str, object]]) -> None:
        self.total_steps: int | None = None
        self.step = 0
        self.cancelled = False
        self.pipeline: Any = None
        self.bucket = 1
        self.adapters: Hashable = ()
        self.batch_key: Hashable = None
        self.edits_modules = False
        self.step_cache: StepCacheState | None = None
        self._calls = 0
        self.cannot_resume = ""
        self._kept: dict[str, tuple[Callable[[], object], Callable[[Any], object]]] = {}
        self._saved: dict[str, Any] | None = None
        self._skips_rest = False
        self._paused = False
        self._before: Callable[[], object] = _nothing
        self._after: Callable[[], object] = _nothing
        self._during: AbstractContextManager[object] = contextlib.nullcontext()
        self._also: dict[str, object] = {}
        self._thread: int | None = None
        self._result: dict[str, object] | None = None
        self._over = False
        self._greenlet: Any = RunGreenlet(lambda: self._run(work), self)

    def surround(
        self,
        before: Callable[[], object],
        during: AbstractContextManager[object],
        after: Callable[[], object],
        also: Mapping[str, object],
    ) -> None:
        """Set what is done around this run; call it before the first step.

        Args:
            before: Is called before each step or part of one, since another run may have changed the shared components.
            during: Is entered for each of them.
            after: Is called once, when the run has ended in any way.
            also: Values to add to the result.
        """
        self._before, self._during, self._after, self._also = before, during, after, dict(also)

    @property
    def over(self) -> bool:
        """Whether the run has ended, in any way."""
        return self._over

    def keep(self, name: str, save: Callable[[], object], restore: Callable[[Any], object]) -> None:
        """Add something to the snapshots of this run; call it before the first step.

        Args:
            name: Its name in a snapshot.
            save: Returns its value, of types that `engines.codec` packs, at a pause. The run must not change it later.
            restore: Is called with that value in a run that goes on, where the first step begins that it computes.
        """
        self._kept[name] = (save, restore)

    def snapshot(self) -> dict[str, object]:
        """Return all that another run of the same payload needs to go on from this pause, with the same bits.

        Returns:
            The "step" after which it goes on, and copies of what this run has changed; `engines.codec` can pack it.

        Raises:
            CheckpointError: The run is not at a pause, or is of a kind that cannot go on elsewhere (`cannot_resume`).
        """
        if not self._paused:
            raise CheckpointError("A denoise is saved only between two of its steps.")
        run = {} if self.cannot_resume else self._freeze()
        if self.cannot_resume:
            raise CheckpointError(self.cannot_resume)
        kept = {name: save() for name, (save, _) in self._kept.items()}
        where = {"step": self.step, "total_steps": self.total_steps, "bucket": self.bucket}
        return {**where, "run": run, "kept": kept}

    def resume(self, snapshot: Mapping[str, Any], *, skip_rest: bool = False) -> None:
        """Go on from a snapshot: the first `advance` skips the steps before it; call it before that.

        Args:
            snapshot: What `snapshot` of a run of the same payload has returned. It is not changed. If it does not fit
                this run, an `advance` raises `CheckpointError`.
            skip_rest: Whether to skip the steps after it, too, so that the run ends with what the snapshot had.

        Raises:
            CheckpointError: It is not a snapshot.
        """
        step, run, kept = (snapshot.get(name) for name in ("step", "run", "kept"))
        if not (type(step) is int and step > 0 and isinstance(run, dict) and isinstance(kept, dict)):
            raise CheckpointError("This is not a snapshot of a denoise.")
        self._saved, self._skips_rest = dict(snapshot), skip_rest

    def advance(self) -> bool:
        """Run one step; the first also runs what is before the loop, the last also what is after it.

        Returns:
            Whether there are more steps.

        Raises:
            Exception: Whatever the run raises; there are no more steps then.
        """
        while (call := self.proceed()) is not None:
            call.compute()
        return not self._over

    def proceed(self) -> DenoiserCall | None:
        """Run until a call of a denoiser waits, or to the end of the step.

        Returns:
            The call, whose output or error must be set before the next `proceed`; None at the end of the step, after
            which the run may be `over`.

        Raises:
            Exception: Whatever the run raises; there are no more steps then.
        """
        if self._over:
            return None
        self._check_thread()
        self._greenlet.parent = greenlet.getcurrent()
        try:
            with self.surroundings():
                waiting = self._greenlet.switch()
        except BaseException:
            self._release()
            raise
        if self._greenlet.dead:
            self._release()
        return waiting if isinstance(waiting, DenoiserCall) else None

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """Set what a computation of this run needs around it, since other runs may have computed before."""
        self.adapt()
        with self._during:
            yield

    def adapt(self) -> None:
        """Set what a computation of several runs with the same adapters needs around it."""
        # Turn gradients off for this thread, not just for this call: a block is inside `no_grad` from one step to the
        # next, and at its end restores the mode at its start. With alternating blocks that could turn gradients on
        # during another run. If they are never on, nothing wrong is restored.
        torch.set_grad_enabled(False)
        self._before()

    def cancel(self) -> None:
        """Unwind the run and release all that it holds; does nothing if the run has ended."""
        if self._over:
            return
        self._check_thread()
        self.cancelled = True
        self._greenlet.parent = greenlet.getcurrent()
        try:
            self._greenlet.throw(RunCancelledError())
        except RunCancelledError:
            pass  # before the first step there is nothing to unwind, so the error comes straight back
        finally:
            self._release()

    def result(self) -> dict[str, object]:
        """Return the payload for the decoder.

        Raises:
            RuntimeError: The run has not ended, was cancelled or has failed.
        """
        if self._result is None:
            raise RuntimeError(f"There is no result: {self.step} of {self.total_steps} steps have been run.")
        return {**self._result, **self._also}

    def pause(self) -> None:
        """Switch from inside the run to the caller of `advance`, until the next `advance`.

        Raises:
            RunCancelledError: `cancel` was called.
        """
        self._calls = 0
        self._paused = True
        try:
            greenlet.getcurrent().parent.switch()
        finally:
            self._paused = False

    def _freeze(self) -> dict[str, object]:
        """Return what this run has changed; sets `cannot_resume` if that is not known."""
        self.cannot_resume = "This kind of run cannot be saved."
        return {}

    def _skips(self, thaw: Callable[[dict[str, Any]], object]) -> bool:
        """Whether the step that begins is skipped. Where a resumed run arrives at its snapshot, first put that in.

        Raises:
            CheckpointError: The snapshot does not fit this run.
        """
        if self._saved is None:
            return self._skips_rest
        if self.step < self._saved["step"]:
            return True
        saved, self._saved = self._saved, None
        self._calls = 0  # as after the pause of the saved run: a step cache tells calls apart by their number
        other_bucket = saved.get("bucket") != self.bucket and not self._skips_rest
        if other_bucket or saved.get("total_steps") != self.total_steps or saved["kept"].keys() != self._kept.keys():
            raise CheckpointError("The snapshot is of a run of another length, in another bucket or with other caches.")
        thaw(saved["run"])
        for name, (_, restore) in self._kept.items():
            restore(saved["kept"][name])
        return self._skips_rest

    def park(
        self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], context: CacheContextArguments | None
    ) -> Any:
        """Suspend the run, from inside of it, until the output of a call of a denoiser is known; returns the output.

        Raises:
            Exception: The error of the call.
            RunCancelledError: `cancel` was called.
        """
        call = DenoiserCall(module, args, kwargs, context, self, self._calls)
        self._calls += 1
        greenlet.getcurrent().parent.switch(call)
        # Whoever advances the run may still hold the call: its tensors and its traceback must not live as long.
        output, call.output = call.output, None
        if call.error is not None:
            try:
                raise call.error
            finally:
                call.error = None
        return output

    def _run(self, work: Callable[[], dict[str, object]]) -> None:
        try:
            result = work()
        except RunCancelledError:
            return
        if self._saved is not None:
            raise CheckpointError(f"The run has ended before step {self._saved['step']} of the snapshot.")
        self._result = result

    def _check_thread(self) -> None:
        thread = threading.get_ident()
        self._thread = self._thread or thread
        if thread != self._thread:
            raise RuntimeError("A denoise must run on the thread that has begun it.")

    def _release(self) -> None:
        # Drop the greenlet: even one that never ran holds the copy of the block, the private pipeline and its state.
        self._over = True
        self._greenlet = self._saved = None
        self._kept = {}
        self.pipeline = None
        self.step_cache = None
        after, self._before, self._after = self._after, _nothing, _nothing
        after()


def _nothing() -> None:
    """Do nothing."""
