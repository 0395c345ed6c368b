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
from typing import Any

import greenlet
import torch

from triptych.engines.steps.denoiser_calls import CacheContextArguments, DenoiserCall, RunGreenlet


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
        batch_key: Runs whose last calls have the same key are likely to be computed together; None before the first.
    """

    def __init__(self, work: Callable[[], dict[str, object]]) -> None:
        self.total_steps: int | None = None
        self.step = 0
        self.cancelled = False
        self.pipeline: Any = None
        self.bucket = 1
        self.adapters: Hashable = ()
        self.batch_key: Hashable = None
        self._calls = 0
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
        # Turn gradients off for this thread, not just for this call: a block is inside `no_grad` from one step to the
        # next, and at its end restores the mode at its start. With alternating blocks that could turn gradients on
        # during another run. If they are never on, nothing wrong is restored.
        torch.set_grad_enabled(False)
        self._before()
        with self._during:
            yield

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
        greenlet.getcurrent().parent.switch()

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
            self._result = work()
        except RunCancelledError:
            return

    def _check_thread(self) -> None:
        thread = threading.get_ident()
        self._thread = self._thread or thread
        if thread != self._thread:
            raise RuntimeError("A denoise must run on the thread that has begun it.")

    def _release(self) -> None:
        # Drop the greenlet: even one that never ran holds the copy of the block, the private pipeline and its state.
        self._over = True
        self._greenlet = None
        self.pipeline = None
        after, self._before, self._after = self._after, _nothing, _nothing
        after()


def _nothing() -> None:
    """Do nothing."""
