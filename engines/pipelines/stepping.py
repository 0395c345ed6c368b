"""Run a denoise block one step at a time, many of them in turn, on one thread.

A denoise block runs its whole loop in one call. Here that call runs in a greenlet: a call stack of its own that can
be left and entered again. The loop's `loop_step` is replaced, on a copy of the block, by one that first goes back to
whoever called `advance`; where there are no blocks, a scheduler's `step` does that. Nothing is copied or run twice, so
the result is that of an undisturbed run, bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import greenlet
import torch

from triptych.engines.pipelines.component_settings import remove_guider_hooks


class RunCancelledError(BaseException):
    """Thrown into a denoise block to unwind it.

    Not an `Exception`, because blocks log each of those with a traceback at every level.
    """


class Denoising:
    """A denoise that has been prepared and runs as it is told to, all of it on the thread of the first `advance`.

    Args:
        work: The whole run, which calls `pause` between any two steps and returns the values for the decoder.

    Attributes:
        total_steps: How many steps there are; None before the first, and for families that step by chunks.
        step: How many are done.
        cancelled: Whether `cancel` ended it.
    """

    def __init__(self, work: Callable[[], dict[str, object]]) -> None:
        self.total_steps: int | None = None
        self.step = 0
        self.cancelled = False
        self._before: Callable[[], object] = _nothing
        self._after: Callable[[], object] = _nothing
        self._during: AbstractContextManager[object] = contextlib.nullcontext()
        self._also: dict[str, object] = {}
        self._thread: int | None = None
        self._result: dict[str, object] | None = None
        self._over = False
        self._greenlet: Any = greenlet.greenlet(lambda: self._run(work))

    def surround(
        self,
        before: Callable[[], object],
        during: AbstractContextManager[object],
        after: Callable[[], object],
        also: Mapping[str, object],
    ) -> None:
        """Say what is due around this run, before it has begun.

        Args:
            before: Called before each step, when another run may have been at the same weights.
            during: Entered for each step.
            after: Called once, when the run is over, however it ended.
            also: Values of the result beside those of the run.
        """
        self._before, self._during, self._after, self._also = before, during, after, dict(also)

    def advance(self) -> bool:
        """Run exactly one step; the first also prepares the loop, the last also ends the block.

        Returns:
            False when that was the last step, or there is none left.

        Raises:
            Exception: Whatever the block raises, with its traceback. There is no step left then.
        """
        if self._over:
            return False
        self._check_thread()
        # For good, not for this call: a block holds `no_grad` open from one step to the next, and what it puts back
        # at its end is what it found at its start. With several blocks in turn that would switch gradients on in the
        # middle of another's run. If the thread never has gradients on, there is nothing wrong to put back.
        torch.set_grad_enabled(False)
        self._greenlet.parent = greenlet.getcurrent()
        try:
            self._before()
            with self._during:
                self._greenlet.switch()
        except BaseException:
            self._release()
            raise
        if self._greenlet.dead:
            self._release()
        return not self._over

    def cancel(self) -> None:
        """Unwind the block and let go of everything it holds; does nothing where the run is over."""
        if self._over:
            return
        self._check_thread()
        self.cancelled = True
        self._greenlet.parent = greenlet.getcurrent()
        try:
            self._greenlet.throw(RunCancelledError())
        except RunCancelledError:
            pass  # Thrown before the first step it comes straight back, as there is nothing to unwind.
        finally:
            self._release()

    def result(self) -> dict[str, object]:
        """Return the values that cross to the decoder.

        Raises:
            RuntimeError: The run is not over, was cancelled or failed.
        """
        if self._result is None:
            raise RuntimeError(f"There is no result: {self.step} of {self.total_steps} steps have been run.")
        return {**self._result, **self._also}

    def pause(self) -> None:
        """Go back to whoever called `advance`, from inside the run.

        Raises:
            RunCancelledError: `cancel` was called meanwhile.
        """
        greenlet.getcurrent().parent.switch()

    def _run(self, work: Callable[[], dict[str, object]]) -> None:
        try:
            self._result = work()
        except RunCancelledError:
            return

    def _check_thread(self) -> None:
        thread = threading.get_ident()
        self._thread = self._thread or thread
        if thread != self._thread:
            raise RuntimeError("A denoising runs on the one thread that it was begun on.")

    def _release(self) -> None:
        # One that never ran still holds the copy of the block, the private pipeline and the state.
        self._over = True
        self._greenlet = None
        after, self._before, self._after = self._after, _nothing, _nothing
        after()


def _nothing() -> None:
    """What is due around a run where nothing is."""


class BlockDenoising(Denoising):
    """A run of the denoiser's blocks.

    Args:
        block: `SequentialPipelineBlocks`; used as a copy.
        components: The pipeline private to this request.
        state: Its `PipelineState`.
        finish: Makes the result of the state after the run.
    """

    def __init__(self, block: Any, components: Any, state: Any, finish: Callable[[Any], dict[str, object]]) -> None:
        block = copy.deepcopy(block)
        for loop in _loops(block):
            loop.loop_step = self._stepping(loop.loop_step)
            # The setting of a pipeline does not reach its inner loops.
            loop.set_progress_bar_config(disable=True)

        def work() -> dict[str, object]:
            try:
                return finish(block(components, state)[1])
            except Exception:
                # What a guider puts on a model for one forward must not stay there for other requests.
                remove_guider_hooks(components)
                raise
            finally:
                # Each holds its loop and this, with the result: not to wait for the collector.
                for loop in _loops(block):
                    del loop.loop_step

        super().__init__(work)

    def _stepping(self, loop_step: Callable[..., Any]) -> Callable[..., Any]:
        before = None

        def paused_step(components: Any, block_state: Any, **position: Any) -> Any:
            nonlocal before
            if before is None:
                before = self.step
                steps = _count(block_state, position)
                self.total_steps = None if steps is None else before + steps
            if self.step:
                self.pause()
            result = loop_step(components, block_state, **position)
            self.step += 1
            return result

        return paused_step


def _loops(block: Any) -> Iterator[Any]:
    if hasattr(block, "loop_step"):
        yield block
    for inner in block.sub_blocks.values():
        yield from _loops(inner)


def _count(block_state: Any, position: dict[str, Any]) -> int | None:
    if "t" in position:
        return len(block_state.timesteps)
    if "sigma" in position:
        return len(block_state.sigmas) - 1
    return None
