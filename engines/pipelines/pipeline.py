"""The stages of a pipeline that one process serves, whichever way the pipeline is cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, cast

import diffusers
import torch
import transformers
from msgspec.structs import replace

from triptych.engines.model_options import DEFAULTS, ModelOptions
from triptych.engines.parameters.aliases import conflicting_names, to_pipeline_names
from triptych.engines.parameters.alternatives import resolve_classes
from triptych.engines.parameters.lora import (
    LORA,
    LORA_SCALE,
    LoraChoice,
    LoraFile,
    check_lora,
    choose_loras,
    lora_parameters,
)
from triptych.engines.parameters.schema import REPLACES, Signature, names
from triptych.engines.parameters.serving_config import load_index
from triptych.engines.parameters.validation import ParameterError, check_scalars, check_task
from triptych.engines.partition.compatibility import explain_missing_class
from triptych.engines.partition.strategy import PartitionStrategy, lora_class, strategy_for, strategy_in_process
from triptych.engines.pipelines.classic import load_classic
from triptych.engines.pipelines.dtype_conversion import DTYPE, convert_dtype
from triptych.engines.pipelines.modular import load_modular
from triptych.engines.pipelines.monolithic import load_monolithic
from triptych.engines.pipelines.random_state import SEED, GlobalRngGuard
from triptych.engines.pipelines.stepping import Denoising
from triptych.engines.stages import InputError, ModelError, Stage
from triptych.engines.weights.adapters import Adapters
from triptych.engines.weights.offload import ModelOffloader, Offload
from triptych.engines.weights.placement import Placement
from triptych.engines.weights.quantization import Quantization
from triptych.engines.weights.read_ahead import ReadProgress

__all__ = ["InputError", "ModelError", "StagePipeline"]

# The seed makes the generator; n images are n requests.
_NOT_ACCEPTED: Final = frozenset({"generator", "num_images_per_prompt", "num_videos_per_prompt"})


class StageRunner(Protocol):
    """What a way to cut a pipeline makes of a model."""

    pipeline: Any
    """Of diffusers, with stubs of what is not loaded; no run changes it."""
    components: frozenset[str]
    """Names of what is loaded."""
    inputs: frozenset[str]
    """Names of all inputs that the whole pipeline takes."""
    signature: Signature
    """Of the whole pipeline, the public part."""

    def encode(self, inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Run the encoder."""

    def seed_independent(self, payload: Mapping[str, object]) -> bool:
        """Whether a payload from `encode` has nothing that was drawn from the generator."""

    def rebind(self, payload: Mapping[str, object], inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Make the payload of one request that of another, which the encoder makes the same of."""

    def denoise(self, payload: Mapping[str, object]) -> Denoising:
        """Prepare a run of the denoiser."""

    def decode(self, payload: Mapping[str, object]) -> dict[str, object]:
        """Run the decoder."""


class StagePipeline:
    """One, two or all three stages of a pipeline, with the weights that those need.

    Not safe for threads: all calls are made by the one thread that owns the device.

    Attributes:
        stages: Those that it has, in order.
        strategy: How the pipeline is cut.
        accepted: Names of the inputs that a request to the whole pipeline may give.
        signature: What of them is public, and what the pipeline makes.
        components: Names of the components that are loaded here.
        placement: How their weights are held, and how many bytes they take.
        seedless: Whether what `encode` made last would be the same for every seed, but for the generator in it.
    """

    def __init__(
        self,
        stages: tuple[Stage, ...],
        strategy: PartitionStrategy,
        runner: StageRunner,
        placement: Placement,
        offloader: ModelOffloader | None,
    ) -> None:
        self.stages = stages
        self.strategy = strategy
        self.components = runner.components
        self.placement = placement
        self.seed_independent = False
        self._adapters = placement.adapters
        self._offloader = offloader
        more = lora_parameters([file.name for file in self._adapters.files])
        encodes = {*runner.signature.encodes, *(names(more) if self._adapters.encodes else ())}
        self.signature = replace(
            runner.signature,
            parameters=tuple(sorted((*runner.signature.parameters, *more), key=lambda parameter: parameter.name)),
            encodes=tuple(sorted(encodes)),
        )
        self.accepted = (runner.inputs | names(self.signature.parameters)) - _NOT_ACCEPTED
        self._runner = runner

    @classmethod
    def load(
        cls,
        model: Path,
        stages: tuple[Stage, ...],
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str = Quantization.NONE,
        offload: str = Offload.NONE,
        adapters: tuple[LoraFile, ...] = (),
        options: ModelOptions = DEFAULTS,
        progress: ReadProgress | None = None,
    ) -> StagePipeline:
        """Load the stages of a model.

        Args:
            model: A folder in the diffusers layout (`model_index.json`); nothing is ever downloaded.
            stages: Which stages, any order, at least one.
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
        stages = tuple(stage for stage in Stage if stage in stages)
        try:
            read = Adapters.read(model, adapters, lora_class(load_index(model)) if adapters else None)
            placement = Placement(dtype, device, Quantization(quantization), Offload(offload), read, options, progress)
            return cls._loaded(model, stages, placement)
        except (ModelError, AttributeError, ImportError) as error:
            # Of a class that a library does not have, that library says less than the index and the configuration.
            if unknown := explain_missing_class(model, options, str(error)):
                raise ModelError(unknown) from error
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"The model {model} cannot be loaded: {type(error).__name__}: {error}") from error

    @classmethod
    def _loaded(cls, model: Path, stages: tuple[Stage, ...], placement: Placement) -> StagePipeline:
        strategy = strategy_in_process(strategy_for(model, placement.options), stages)
        loaders: dict[PartitionStrategy, Callable[[Path, tuple[Stage, ...], Placement], StageRunner]] = {
            PartitionStrategy.MODULAR: load_modular,
            PartitionStrategy.CLASSIC: load_classic,
            PartitionStrategy.MONOLITHIC: load_monolithic,
        }
        runner = loaders[strategy](model, stages, placement)
        offloader = placement.finish({name: getattr(runner.pipeline, name) for name in runner.components})
        return cls(stages, strategy, runner, placement, offloader)

    def encode(self, inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Run the encoder.

        Args:
            inputs: Of the whole request, by name; all in `accepted`. Images are `PIL.Image.Image`, or lists of it;
                what `signature` lists as `tensors` are tensors, each an input by its name, of any shape and dtype that
                the pipeline takes.
                Names left out get the pipeline's defaults. "lora" and "lora_scale" choose an adapter.
            seed: Of the noise; the same seed makes the same image.

        Returns:
            The values that the denoiser and the decoder take.

        Raises:
            InputError: There is a name that the pipeline does not take, two for one thing that differ, a value of the
                wrong kind, no such adapter, or inputs that are for none of its tasks.
        """
        self._require(Stage.ENCODER)
        meant = self._placed(self._meant(inputs))
        choice = choose_loras(inputs, self._adapters.files)
        self._adapters.activate(choice)
        try:
            with GlobalRngGuard(seed, Stage.ENCODER) as rng:
                payload = self._runner.encode(meant, seed)
        finally:
            self._offload()
        self.seed_independent = self._runner.seed_independent(payload) and not rng.was_used
        return {**payload, **self._label(seed, choice)}

    def rebind(self, payload: Mapping[str, object], inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Make of one request's payload that of another: what `encode` would return, without an encoder.

        Args:
            payload: From `encode` of a request that has the same values for all `signature.encodes`, and for all
                inputs that are images; where that was not `seed_independent`, also the same seed. It is not changed.
            inputs: Of the other request, as for `encode`; images may be left out.
            seed: Of the other request.
        """
        values = {name: value for name, value in payload.items() if name not in (LORA, LORA_SCALE)}
        chosen = _chosen(choose_loras(inputs, self._adapters.files))
        return {**self._runner.rebind(values, self._meant(inputs), seed), SEED: seed, **chosen}

    def denoise(self, payload: Mapping[str, object]) -> Denoising:
        """Prepare a run of the denoiser; it starts with its first `advance`.

        Args:
            payload: From `encode`; it is not changed, so that it can be run again.
        """
        self._require(Stage.DENOISER)
        values, seed, choice = self._open(payload)
        denoising = self._runner.denoise(values)
        rng = GlobalRngGuard(seed, Stage.DENOISER)
        denoising.surround(lambda: self._adapters.activate(choice), rng, self._offload, self._label(seed, choice))
        return denoising

    def decode(self, payload: Mapping[str, object]) -> dict[str, object]:
        """Run the decoder.

        Args:
            payload: From `Denoising.result`; it is not changed.

        Returns:
            "images": a list of `PIL.Image.Image`; or "videos": float32 arrays [video, frame, height, width, 3] in
            0..1, or images. Where the family makes sound, "audio", "audios" or "sound": [batch, channels, samples] in
            -1..1, and "sampling_rate" in Hz. Of a request with `output_type="latent"`, "latents" alone, and
            "audio_latents" where the family has some, which are tensors: as diffusers returns them.
        """
        self._require(Stage.DECODER)
        values, seed, choice = self._open(payload)
        self._adapters.activate(choice)
        try:
            with GlobalRngGuard(seed, Stage.DECODER):
                return self._runner.decode(values)
        finally:
            self._offload()

    def to_host(self) -> None:
        """Move the weights from the device to pinned memory of the host, where they are of no use until `to_device`."""
        self._move(lambda tensor: tensor.to("cpu").pin_memory() if tensor.is_cuda else tensor)

    def to_device(self) -> None:
        """Bring the weights back; raises what torch raises where there is no room."""
        self._move(lambda tensor: tensor.to(self.placement.device))

    def _move(self, moved: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in sorted(self.components):
            module = getattr(self._runner.pipeline, name)
            if isinstance(module, torch.nn.Module):
                module._apply(moved)  # type: ignore[no-untyped-call]

    def _label(self, seed: int, choice: tuple[LoraChoice, ...]) -> dict[str, object]:
        """What crosses beside the values of the pipeline."""
        return {DTYPE: self.placement.dtype, SEED: seed, **_chosen(choice)}

    def _open(self, payload: Mapping[str, object]) -> tuple[dict[str, object], int, tuple[LoraChoice, ...]]:
        """Take a payload apart again, in the dtype of this process: its values, the seed and the adapter."""
        values = convert_dtype(payload, self.placement.dtype)
        seed, names, scales = (values.pop(key, None) for key in (SEED, LORA, LORA_SCALE))
        paired = zip(cast("list[str]", names or []), cast("list[float]", scales or []), strict=True)
        choice = tuple(LoraChoice(name, scale) for name, scale in paired)
        return values, cast(int, seed), choice

    def _offload(self) -> None:
        if self._offloader is not None:
            self._offloader.unload()

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
        if different := conflicting_names(inputs, parameters):
            raise InputError(f"{different[0]} and {different[1]} are the same to this pipeline, but differ.")
        try:
            check_scalars(inputs, parameters)
            replaced = {REPLACES[name]: "" for name in REPLACES.keys() & inputs.keys()}
            check_task({**inputs, **replaced}, self.signature.tasks)
            inputs = resolve_classes(inputs, parameters)
            check_lora(inputs, [file.name for file in self._adapters.files])
        except ParameterError as error:
            raise InputError(str(error)) from error
        return to_pipeline_names(self._runner.inputs, inputs, parameters)

    @property
    def alpha(self) -> bool:
        """Whether its VAE takes images with an alpha channel: four channels in place of three."""
        config = getattr(getattr(self._runner.pipeline, "vae", None), "config", {})
        return 4 in (config.get("in_channels"), config.get("input_channels"))

    def _require(self, stage: Stage) -> None:
        if stage not in self.stages:
            raise RuntimeError(f"The {stage} was not loaded here, only: {', '.join(self.stages)}.")


def _chosen(choices: tuple[LoraChoice, ...]) -> dict[str, object]:
    if not choices:
        return {}
    return {LORA: [choice.name for choice in choices], LORA_SCALE: [choice.scale for choice in choices]}
