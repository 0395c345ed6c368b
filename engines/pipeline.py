"""The panels of a pipeline that one process serves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import diffusers
import torch
import transformers
from diffusers.modular_pipelines.modular_pipeline import PipelineState

from engines.guidance import GUIDANCE_SCALE, has_guider, private
from engines.loading import check_geometry, load_components, make_shadows
from engines.panels import ModelError, Panel
from engines.split import KWARGS_MAPPING, Split, crossing, joined, load_split
from engines.stepping import Denoising

__all__ = ["InputError", "ModelError", "PanelPipeline"]

GENERATOR: Final = "generator"
# The seed makes the generator; n pictures are n requests.
_NOT_ACCEPTED: Final = frozenset({GENERATOR, "num_images_per_prompt", "num_videos_per_prompt"})


class InputError(ValueError):
    """A request names an input that the pipeline does not take."""


class PanelPipeline:
    """One, two or all three panels of a pipeline, with the weights that those need.

    Not safe for threads: all calls are made by the one thread that owns the device.

    Attributes:
        panels: Those that it has, in order.
        accepted: Names of the inputs that a request to the whole pipeline may give.
        components: Names of the components that are loaded here.
    """

    def __init__(self, panels: tuple[Panel, ...], split: Split, pipeline: Any, components: frozenset[str]) -> None:
        self.panels = panels
        self.components = components
        self._split = split
        self._pipeline = pipeline
        names = {declared.name for declared in split.blocks.inputs if declared.name}
        self._takes_generator = GENERATOR in names
        scale = {GUIDANCE_SCALE} if has_guider(pipeline) else set()
        self.accepted = frozenset((names | scale) - _NOT_ACCEPTED)

    @classmethod
    def load(cls, model: Path, panels: tuple[Panel, ...], *, dtype: torch.dtype, device: torch.device) -> PanelPipeline:
        """Load the panels of a model.

        Args:
            model: A folder in the diffusers layout (`model_index.json`); nothing is ever downloaded.
            panels: Which panels, any order, at least one.
            dtype: What weights are converted to.
            device: Where they are put.

        Raises:
            ModelError: The model cannot be served; the sentence says why.
        """
        # Bars of progress would be lines without end in the log of a server.
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        split = load_split(model)
        panels = tuple(panel for panel in Panel if panel in panels)
        pipeline = split.pipeline(joined(split.parts[panel] for panel in panels))
        loaded = load_components(pipeline, split, dtype, device)
        make_shadows(pipeline, split, dtype, device)
        check_geometry(pipeline, split)
        return cls(panels, split, pipeline, loaded)

    def encode(self, inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Run the encoder.

        Args:
            inputs: Of the whole request, by name; all in `accepted`. Names left out get the pipeline's defaults.
            seed: Of the noise; the same seed makes the same picture.

        Returns:
            The values that the denoiser and the decoder take, and `KWARGS_MAPPING`.

        Raises:
            InputError: There is a name that the pipeline does not take.
        """
        unknown = sorted(inputs.keys() - self.accepted)
        if unknown:
            raise InputError(f"The pipeline takes no {', '.join(unknown)}.")
        state = PipelineState()
        for declared in self._split.blocks.inputs:
            if declared.name:
                state.set(declared.name, inputs.get(declared.name, declared.default), declared.kwargs_type)
        if self._takes_generator:
            # On the CPU, because only there does a seed make the same noise on every device.
            state.set(GENERATOR, torch.Generator("cpu").manual_seed(seed))
        scale = cast("float | None", inputs.get(GUIDANCE_SCALE))
        state = self._run(Panel.ENCODER, private(self._pipeline, scale, encodes=True), state)
        crosses = self._crossing(state, Panel.DENOISER, Panel.DECODER)
        # No block takes it as an input where a guider has it.
        return crosses if scale is None else {**crosses, GUIDANCE_SCALE: scale}

    def denoise(self, state: Mapping[str, object]) -> Denoising:
        """Prepare a run of the denoiser; it starts with its first `advance`.

        Args:
            state: From `encode`; it is not changed, so that it can be run again.
        """
        self._require(Panel.DENOISER)
        pipeline = private(self._pipeline, cast("float | None", state.get(GUIDANCE_SCALE)))
        return Denoising(
            self._split.parts[Panel.DENOISER],
            pipeline,
            _restore(state),
            lambda after: self._crossing(after, Panel.DECODER),
        )

    def decode(self, state: Mapping[str, object]) -> dict[str, object]:
        """Run the decoder.

        Args:
            state: From `Denoising.result`; it is not changed.

        Returns:
            "images": a list of `PIL.Image.Image`; or "videos": float32 arrays [video, frame, height, width, 3] in
            0..1, and "audio" where the family makes it.
        """
        after = self._run(Panel.DECODER, private(self._pipeline), _restore(state))
        return {name: after.get(name) for name in self._split.outputs if after.get(name) is not None}

    def _require(self, panel: Panel) -> None:
        if panel not in self.panels:
            raise RuntimeError(f"The {panel} was not loaded here, only: {', '.join(self.panels)}.")

    def _run(self, panel: Panel, pipeline: Any, state: Any) -> Any:
        self._require(panel)
        with torch.no_grad():
            _, state = self._split.parts[panel](pipeline, state)
        return state

    def _crossing(self, state: Any, *later: Panel) -> dict[str, object]:
        return crossing(state.values, state.kwargs_mapping, [self._split.parts[panel] for panel in later])


def _restore(values: Mapping[str, object]) -> Any:
    """Make a `PipelineState` of values that crossed, with a generator of its own."""
    values = dict(values)
    groups = cast("dict[str, list[str]]", values.pop(KWARGS_MAPPING, {}))
    generator = values.get(GENERATOR)
    if isinstance(generator, torch.Generator):
        values[GENERATOR] = generator.clone_state()
    return PipelineState(values=values, kwargs_mapping={group: list(names) for group, names in groups.items()})
