"""The panels of a pipeline that one process serves, whichever way the pipeline is cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import diffusers
import torch
import transformers

from engines.aliases import conflict, in_words_of
from engines.checks import CardError, check_scalars
from engines.classic import load_classic
from engines.modular import load_modular
from engines.panels import ModelError, Panel
from engines.parameters import Signature, names
from engines.routes import Route, route_for
from engines.stepping import Denoising
from engines.whole import load_whole

__all__ = ["InputError", "ModelError", "PanelPipeline"]

# The seed makes the generator; n pictures are n requests.
_NOT_ACCEPTED: Final = frozenset({"generator", "num_images_per_prompt", "num_videos_per_prompt"})


class InputError(ValueError):
    """A request names an input that the pipeline does not take, or gives one a value that it cannot have."""


class Parts(Protocol):
    """What a way to cut a pipeline makes of a model."""

    pipeline: Any
    """Of diffusers, with shadows of what is not loaded; no run changes it."""
    components: frozenset[str]
    """Names of what is loaded."""
    inputs: frozenset[str]
    """Names of all inputs that the whole pipeline takes."""
    signature: Signature
    """Of the whole pipeline, the public part."""

    def encode(self, inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Run the encoder."""

    def denoise(self, state: Mapping[str, object]) -> Denoising:
        """Prepare a run of the denoiser."""

    def decode(self, state: Mapping[str, object]) -> dict[str, object]:
        """Run the decoder."""


_LOADERS: Final[Mapping[Route, Callable[[Path, tuple[Panel, ...], torch.dtype, torch.device], Parts]]] = {
    Route.MODULAR: load_modular,
    Route.CLASSIC: load_classic,
    Route.MONOLITHIC: load_whole,
}


class PanelPipeline:
    """One, two or all three panels of a pipeline, with the weights that those need.

    Not safe for threads: all calls are made by the one thread that owns the device.

    Attributes:
        panels: Those that it has, in order.
        route: How the pipeline is cut.
        accepted: Names of the inputs that a request to the whole pipeline may give.
        signature: What of them is public, and what the pipeline makes.
        components: Names of the components that are loaded here.
    """

    def __init__(self, panels: tuple[Panel, ...], route: Route, parts: Parts) -> None:
        self.panels = panels
        self.route = route
        self.components = parts.components
        self.signature = parts.signature
        self.accepted = (parts.inputs | names(parts.signature.parameters)) - _NOT_ACCEPTED
        self._parts = parts

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
        panels = tuple(panel for panel in Panel if panel in panels)
        route = route_for(model)
        return cls(panels, route, _LOADERS[route](model, panels, dtype, device))

    def encode(self, inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Run the encoder.

        Args:
            inputs: Of the whole request, by name; all in `accepted`. Pictures are `PIL.Image.Image`, or lists of it.
                Names left out get the pipeline's defaults.
            seed: Of the noise; the same seed makes the same picture.

        Returns:
            The values that the denoiser and the decoder take.

        Raises:
            InputError: There is a name that the pipeline does not take, two for one thing that differ, or a value of
                the wrong kind.
        """
        self._require(Panel.ENCODER)
        return self._parts.encode(self._meant(inputs), seed)

    def denoise(self, state: Mapping[str, object]) -> Denoising:
        """Prepare a run of the denoiser; it starts with its first `advance`.

        Args:
            state: From `encode`; it is not changed, so that it can be run again.
        """
        self._require(Panel.DENOISER)
        return self._parts.denoise(state)

    def decode(self, state: Mapping[str, object]) -> dict[str, object]:
        """Run the decoder.

        Args:
            state: From `Denoising.result`; it is not changed.

        Returns:
            "images": a list of `PIL.Image.Image`; or "videos": float32 arrays [video, frame, height, width, 3] in
            0..1, or pictures. Where the family makes sound, "audio", "audios" or "sound": [batch, channels, samples] in
            -1..1, and "sampling_rate" in Hz.
        """
        self._require(Panel.DECODER)
        return self._parts.decode(state)

    def _meant(self, inputs: Mapping[str, object]) -> dict[str, object]:
        """Check inputs, and give them the names that the pipeline has for them."""
        unknown = sorted(inputs.keys() - self.accepted)
        if unknown:
            raise InputError(f"The pipeline takes no {', '.join(unknown)}.")
        parameters = self.signature.parameters
        if different := conflict(inputs, parameters):
            raise InputError(f"{different[0]} and {different[1]} are the same to this pipeline, but differ.")
        try:
            check_scalars(inputs, parameters)
        except CardError as error:
            raise InputError(str(error)) from error
        return in_words_of(self._parts.inputs, inputs, parameters)

    @property
    def alpha(self) -> bool:
        """Whether its VAE takes pictures with an alpha channel: four channels in place of three."""
        config = getattr(getattr(self._parts.pipeline, "vae", None), "config", {})
        return 4 in (config.get("in_channels"), config.get("input_channels"))

    def _require(self, panel: Panel) -> None:
        if panel not in self.panels:
            raise RuntimeError(f"The {panel} was not loaded here, only: {', '.join(self.panels)}.")
