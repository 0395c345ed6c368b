"""The panels of a pipeline that one process serves, whichever way the pipeline is cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, cast

import diffusers
import torch
import transformers
from msgspec.structs import replace

from triptych.engines.adapters import Adapters
from triptych.engines.aliases import conflict, in_words_of
from triptych.engines.alternatives import with_classes
from triptych.engines.checks import CardError, check_scalars, check_task
from triptych.engines.classic import load_classic
from triptych.engines.conversion import DTYPE, converted
from triptych.engines.fitting import unknown_class
from triptych.engines.lora import LORA, LORA_SCALE, Choice, LoraFile, check_lora, choose, lora_parameters
from triptych.engines.modular import load_modular
from triptych.engines.offload import Offload, Resting
from triptych.engines.options import DEFAULTS, ModelOptions
from triptych.engines.panels import InputError, ModelError, Panel
from triptych.engines.parameters import IN_PLACE_OF, Signature, names
from triptych.engines.placing import Placement
from triptych.engines.quantization import Quantization
from triptych.engines.read_progress import ReadProgress
from triptych.engines.routes import Route, route_for, where
from triptych.engines.seeds import SEED, GlobalRng
from triptych.engines.stepping import Denoising
from triptych.engines.whole import load_whole

__all__ = ["InputError", "ModelError", "PanelPipeline"]

# The seed makes the generator; n pictures are n requests.
_NOT_ACCEPTED: Final = frozenset({"generator", "num_images_per_prompt", "num_videos_per_prompt"})


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

    def seedless(self, state: Mapping[str, object]) -> bool:
        """Whether a state from `encode` has nothing that was drawn from the generator."""

    def renew(self, state: Mapping[str, object], inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Make the state of one request that of another, which the encoder makes the same of."""

    def denoise(self, state: Mapping[str, object]) -> Denoising:
        """Prepare a run of the denoiser."""

    def decode(self, state: Mapping[str, object]) -> dict[str, object]:
        """Run the decoder."""


class PanelPipeline:
    """One, two or all three panels of a pipeline, with the weights that those need.

    Not safe for threads: all calls are made by the one thread that owns the device.

    Attributes:
        panels: Those that it has, in order.
        route: How the pipeline is cut.
        accepted: Names of the inputs that a request to the whole pipeline may give.
        signature: What of them is public, and what the pipeline makes.
        components: Names of the components that are loaded here.
        placement: How their weights are held, and how many bytes they take.
        seedless: Whether what `encode` made last would be the same for every seed, but for the generator in it.
    """

    def __init__(
        self, panels: tuple[Panel, ...], route: Route, parts: Parts, placement: Placement, resting: Resting | None
    ) -> None:
        self.panels = panels
        self.route = route
        self.components = parts.components
        self.placement = placement
        self.seedless = False
        self._adapters = placement.adapters
        self._resting = resting
        more = lora_parameters([file.name for file in self._adapters.files])
        encodes = {*parts.signature.encodes, *(names(more) if self._adapters.encodes else ())}
        self.signature = replace(
            parts.signature,
            parameters=tuple(sorted((*parts.signature.parameters, *more), key=lambda parameter: parameter.name)),
            encodes=tuple(sorted(encodes)),
        )
        self.accepted = (parts.inputs | names(self.signature.parameters)) - _NOT_ACCEPTED
        self._parts = parts

    @classmethod
    def load(
        cls,
        model: Path,
        panels: tuple[Panel, ...],
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str = Quantization.NONE,
        offload: str = Offload.NONE,
        adapters: tuple[LoraFile, ...] = (),
        options: ModelOptions = DEFAULTS,
        progress: ReadProgress | None = None,
    ) -> PanelPipeline:
        """Load the panels of a model.

        Args:
            model: A folder in the diffusers layout (`model_index.json`); nothing is ever downloaded.
            panels: Which panels, any order, at least one.
            dtype: What weights are converted to.
            device: Where they compute.
            quantization: What weights of linear layers are held as, a `Quantization`; autoencoders and vocoders as
                they are.
            offload: What rests in the memory of the host, an `Offload`.
            adapters: LoRA files that requests may choose of, of distinct names.
            options: How it is read and cut.
            progress: Told what is read; any thread may look at it.

        Raises:
            ModelError: The model cannot be served; the sentence says why.
        """
        # Bars of progress would be lines without end in the log of a server.
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        panels = tuple(panel for panel in Panel if panel in panels)
        try:
            read = Adapters.read(model, adapters)
            placement = Placement(dtype, device, Quantization(quantization), Offload(offload), read, options, progress)
            return cls._loaded(model, panels, placement)
        except (ModelError, AttributeError, ImportError) as error:
            # Of a class that a library does not have, that library says less than the index and the configuration.
            if unknown := unknown_class(model, options, str(error)):
                raise ModelError(unknown) from error
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"The model {model} cannot be loaded: {type(error).__name__}: {error}") from error

    @classmethod
    def _loaded(cls, model: Path, panels: tuple[Panel, ...], placement: Placement) -> PanelPipeline:
        route = where(route_for(model, placement.options), panels)
        loaders: dict[Route, Callable[[Path, tuple[Panel, ...], Placement], Parts]] = {
            Route.MODULAR: load_modular,
            Route.CLASSIC: load_classic,
            Route.MONOLITHIC: load_whole,
        }
        parts = loaders[route](model, panels, placement)
        resting = placement.finish({name: getattr(parts.pipeline, name) for name in parts.components})
        return cls(panels, route, parts, placement, resting)

    def encode(self, inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Run the encoder.

        Args:
            inputs: Of the whole request, by name; all in `accepted`. Pictures are `PIL.Image.Image`, or lists of it;
                what `signature` lists as `tensors` are tensors, each an input by its name, of any shape and dtype that
                the pipeline takes.
                Names left out get the pipeline's defaults. "lora" and "lora_scale" choose an adapter.
            seed: Of the noise; the same seed makes the same picture.

        Returns:
            The values that the denoiser and the decoder take.

        Raises:
            InputError: There is a name that the pipeline does not take, two for one thing that differ, a value of the
                wrong kind, no such adapter, or inputs that are for none of its tasks.
        """
        self._require(Panel.ENCODER)
        meant = self._placed(self._meant(inputs))
        choice = choose(inputs, self._adapters.files)
        self._adapters.activate(choice)
        try:
            with GlobalRng(seed, Panel.ENCODER) as rng:
                state = self._parts.encode(meant, seed)
        finally:
            self._rest()
        self.seedless = self._parts.seedless(state) and not rng.touched
        return {**state, **self._label(seed, choice)}

    def renew(self, state: Mapping[str, object], inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Make of one request's state that of another: what `encode` would return, without an encoder.

        Args:
            state: From `encode` of a request that has the same values for all `signature.encodes`, and for all
                inputs that are pictures; where that was not `seedless`, also the same seed. It is not changed.
            inputs: Of the other request, as for `encode`; pictures may be left out.
            seed: Of the other request.
        """
        values = {name: value for name, value in state.items() if name not in (LORA, LORA_SCALE)}
        chosen = _chosen(choose(inputs, self._adapters.files))
        return {**self._parts.renew(values, self._meant(inputs), seed), SEED: seed, **chosen}

    def denoise(self, state: Mapping[str, object]) -> Denoising:
        """Prepare a run of the denoiser; it starts with its first `advance`.

        Args:
            state: From `encode`; it is not changed, so that it can be run again.
        """
        self._require(Panel.DENOISER)
        values, seed, choice = self._open(state)
        denoising = self._parts.denoise(values)
        rng = GlobalRng(seed, Panel.DENOISER)
        denoising.surround(lambda: self._adapters.activate(choice), rng, self._rest, self._label(seed, choice))
        return denoising

    def decode(self, state: Mapping[str, object]) -> dict[str, object]:
        """Run the decoder.

        Args:
            state: From `Denoising.result`; it is not changed.

        Returns:
            "images": a list of `PIL.Image.Image`; or "videos": float32 arrays [video, frame, height, width, 3] in
            0..1, or pictures. Where the family makes sound, "audio", "audios" or "sound": [batch, channels, samples] in
            -1..1, and "sampling_rate" in Hz. Of a request with `output_type="latent"`, "latents" alone, and
            "audio_latents" where the family has some, which are tensors: as diffusers returns them.
        """
        self._require(Panel.DECODER)
        values, seed, choice = self._open(state)
        self._adapters.activate(choice)
        try:
            with GlobalRng(seed, Panel.DECODER):
                return self._parts.decode(values)
        finally:
            self._rest()

    def to_host(self) -> None:
        """Move the weights from the device to pinned memory of the host, where they are of no use until `to_device`."""
        self._move(lambda tensor: tensor.to("cpu").pin_memory() if tensor.is_cuda else tensor)

    def to_device(self) -> None:
        """Bring the weights back; raises what torch raises where there is no room."""
        self._move(lambda tensor: tensor.to(self.placement.device))

    def _move(self, moved: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in sorted(self.components):
            module = getattr(self._parts.pipeline, name)
            if isinstance(module, torch.nn.Module):
                module._apply(moved)  # type: ignore[no-untyped-call]

    def _label(self, seed: int, choice: tuple[Choice, ...]) -> dict[str, object]:
        """What crosses beside the values of the pipeline."""
        return {DTYPE: self.placement.dtype, SEED: seed, **_chosen(choice)}

    def _open(self, state: Mapping[str, object]) -> tuple[dict[str, object], int, tuple[Choice, ...]]:
        """Take a state apart again, in the dtype of this process: its values, the seed and the adapter."""
        values = converted(state, self.placement.dtype)
        seed, names, scales = (values.pop(key, None) for key in (SEED, LORA, LORA_SCALE))
        paired = zip(cast("list[str]", names or []), cast("list[float]", scales or []), strict=True)
        choice = tuple(Choice(name, scale) for name, scale in paired)
        return values, cast(int, seed), choice

    def _rest(self) -> None:
        if self._resting is not None:
            self._resting.rest()

    def _placed(self, inputs: Mapping[str, object]) -> dict[str, object]:
        """Bring tensors among inputs to the device that computes."""
        device = self.placement.device
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}

    def _meant(self, inputs: Mapping[str, object]) -> dict[str, object]:
        """Check inputs, and give them the names that the pipeline has for them."""
        unknown = sorted(inputs.keys() - self.accepted)
        if unknown:
            raise InputError(f"The pipeline takes no {', '.join(unknown)}.")
        parameters = self.signature.parameters
        left_out = {each.name for each in parameters if inputs.get(each.name) is None and not each.nullable}
        inputs = {name: value for name, value in inputs.items() if name not in left_out}
        if different := conflict(inputs, parameters):
            raise InputError(f"{different[0]} and {different[1]} are the same to this pipeline, but differ.")
        try:
            check_scalars(inputs, parameters)
            replaced = {IN_PLACE_OF[name]: "" for name in IN_PLACE_OF.keys() & inputs.keys()}
            check_task({**inputs, **replaced}, self.signature.tasks)
            inputs = with_classes(inputs, parameters)
            check_lora(inputs, [file.name for file in self._adapters.files])
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


def _chosen(choices: tuple[Choice, ...]) -> dict[str, object]:
    if not choices:
        return {}
    return {LORA: [choice.name for choice in choices], LORA_SCALE: [choice.scale for choice in choices]}
