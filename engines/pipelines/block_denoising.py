"""Run the blocks of a modular pipeline's denoiser one step at a time.

On a copy of the blocks, the `loop_step` of each loop is replaced by one that pauses before every step but the first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from triptych.engines.pipelines.component_settings import remove_guider_hooks
from triptych.engines.steps.denoising import Denoising


class BlockDenoising(Denoising):
    """A run of the denoiser's blocks.

    Args:
        block: The blocks, `SequentialPipelineBlocks`; they are copied.
        components: The pipeline, private to the request.
        state: The `PipelineState` of the request.
        finish: Makes the result from the state after the run.
    """

    def __init__(self, block: Any, components: Any, state: Any, finish: Callable[[Any], dict[str, object]]) -> None:
        block = copy.deepcopy(block)
        for loop in _loops(block):
            loop.loop_step = self._stepping(loop.loop_step)
            # The setting of the pipeline does not apply to inner loops.
            loop.set_progress_bar_config(disable=True)

        def work() -> dict[str, object]:
            try:
                return finish(block(components, state)[1])
            except Exception:
                # Hooks that a guider adds to a model for one forward must not stay for other requests.
                remove_guider_hooks(components)
                raise
            finally:
                # Break the reference cycle: each method holds its loop and this run with its result.
                for loop in _loops(block):
                    del loop.loop_step

        super().__init__(work)
        self.pipeline = components

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
