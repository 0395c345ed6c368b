"""Run the blocks of a modular pipeline's denoiser one step at a time.

On a copy of the blocks, the `loop_step` of each loop is replaced by one that pauses before every step but the first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from triptych.engines.partition.loop_state import block_problem
from triptych.engines.pipelines.component_settings import remove_guider_hooks
from triptych.engines.steps.checkpoint import (
    CheckpointError,
    Mark,
    changed,
    component_names,
    freeze,
    freeze_attributes,
    mark_each,
    own_components,
    thaw,
    thaw_attributes,
)
from triptych.engines.steps.denoising import Denoising


@dataclass(frozen=True)
class _Marks:
    """What there was when the first loop was entered."""

    block: Mapping[str, Mark]
    state: Mapping[str, Mark]
    own: Mapping[str, Mapping[str, Mark]]


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
            loop.loop_step = self._stepping(type(loop), loop.loop_step)
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
        self._state = state
        self._block_state: Any = None
        self._marks: _Marks | None = None
        self._loops_entered = 0
        self._steps_inside = 0

    def _stepping(self, cls: type, loop_step: Callable[..., Any]) -> Callable[..., Any]:
        before = None

        def paused_step(components: Any, block_state: Any, **position: Any) -> Any:
            nonlocal before
            if before is None:
                before = self.step
                self.cannot_resume = self.cannot_resume or block_problem(cls)
                steps = _count(block_state, position)
                self.total_steps = None if steps is None else before + steps
            if self._steps_inside:
                self.cannot_resume = "A step of this run is a loop itself, which cannot be skipped."
            if block_state is not self._block_state:
                self._enter_loop(block_state)
            resuming = self._saved is not None
            if self._skips(self._thaw):
                self.step += 1
                return components, block_state
            if self.step and not resuming:
                self.pause()
            self._steps_inside += 1
            result = loop_step(components, block_state, **position)
            self._steps_inside -= 1
            self.step += 1
            return result

        return paused_step

    def _enter_loop(self, block_state: Any) -> None:
        self._block_state = block_state
        self._loops_entered += 1
        if self._marks is None:
            own = {name: mark_each(vars(part)) for name, part in own_components(self.pipeline).items()}
            self._marks = _Marks(mark_each(vars(block_state)), mark_each(self._state.values), own)

    def _freeze(self) -> dict[str, object]:
        """Return what is no longer as it was when the first loop was entered."""
        names, marks = component_names(self.pipeline), self._marks
        assert marks is not None  # noqa: S101 - a pause is inside of a loop
        # What a later loop was given follows from the loops before it, so that all of it is saved.
        again = self._loops_entered > 1
        block = {name: value for name, value in vars(self._block_state).items() if name != "progress_bar"}
        own = own_components(self.pipeline)
        return {
            "block": freeze(block if again else changed(marks.block, block), names, "the block's state"),
            "state": freeze(changed(marks.state, self._state.values), names, "the pipeline's state"),
            "components": {
                name: freeze_attributes(part, names, name, names=None if again else _changed(marks.own, name, part))
                for name, part in own.items()
            },
        }

    def _thaw(self, saved: Mapping[str, Any]) -> None:
        thaw_attributes(saved["block"], self._block_state, self.pipeline)
        self._state.values.update(
            {name: thaw(value, self._state.values.get(name), self.pipeline) for name, value in saved["state"].items()}
        )
        own = own_components(self.pipeline)
        if saved["components"].keys() != own.keys():
            raise CheckpointError(f"The snapshot is of a pipeline with {', '.join(saved['components'])}.")
        for name, part in own.items():
            thaw_attributes(saved["components"][name], part, self.pipeline)

    def _release(self) -> None:
        super()._release()
        self._state = self._block_state = self._marks = None


def _changed(marks: Mapping[str, Mapping[str, Mark]], name: str, part: Any) -> Collection[str]:
    return changed(marks.get(name, {}), vars(part)).keys()


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
