"""The stages of a pipeline that one process serves, for every partition."""

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
from triptych.engines.parameters.step_cache import CACHE, step_cache_parameters, without_cache
from triptych.engines.parameters.validation import ParameterError, check_scalars, check_task
from triptych.engines.partition.compatibility import explain_missing_class
from triptych.engines.partition.strategy import PartitionStrategy, lora_class, strategy_for, strategy_in_process
from triptych.engines.pipelines.classic import load_classic
from triptych.engines.pipelines.dtype_conversion import DTYPE, convert_dtype
from triptych.engines.pipelines.modular import load_modular
from triptych.engines.pipelines.monolithic import load_monolithic
from triptych.engines.pipelines.random_state import SEED, GlobalRngGuard
from triptych.engines.stages import InputError, ModelError, Stage
from triptych.engines.steps.checkpoint import CheckpointError
from triptych.engines.steps.denoising import Denoising
from triptych.engines.steps.step_caches import StepCache, install
from triptych.engines.weights.adapters import Adapters
from triptych.engines.weights.offload import ModelOffloader, Offload
from triptych.engines.weights.placement import Placement
from triptych.engines.weights.quantization import Quantization
from triptych.engines.weights.read_ahead import ReadProgress

__all__ = ["InputError", "ModelError", "StagePipeline"]

# The seed makes the generator; n images are n jobs.
_NOT_ACCEPTED: Final = frozenset({"generator", "num_images_per_prompt", "num_videos_per_prompt"})


class StageRunner(Protocol):
    """Runs some stages of a loaded model; each partition has one."""

    pipeline: Any
    """The diffusers pipeline, with stubs for components that are not loaded; no run changes it."""
    components: frozenset[str]
    """The names of the loaded components."""
    inputs: frozenset[str]
    """The names of all inputs of the whole pipeline."""
    signature: Signature
    """The public inputs and the outputs of the whole pipeline."""

    def encode(self, inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Run the encoder."""

    def seed_independent(self, payload: Mapping[str, object]) -> bool:
        """Whether `encode` made a payload without drawing from the generator."""

    def rebind(self, payload: Mapping[str, object], inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Adapt the encoder outputs of one request to another request with the same prompt."""

    def denoise(self, payload: Mapping[str, object], *, parks: bool = False) -> Denoising:
        """Prepare a run of the denoiser; the first `advance` starts it. `parks` is that of `request_copy`."""

    def decode(self, payload: Mapping[str, object]) -> dict[str, object]:
        """Run the decoder."""


class StagePipeline:
    """One, two or three stages of a pipeline, with the weights that they need.

    Not thread-safe: the one thread that owns the device makes all calls.

    Attributes:
        stages: The loaded stages, in order.
        strategy: How the pipeline is cut.
        accepted: The names of the inputs that a request may have.
        signature: The public inputs among them, and the outputs of the pipeline.
        components: The names of the loaded components.
        placement: How their weights are held, and how many bytes they take.
        step_cache: The step cache of the denoiser, if it is loaded here; None without one.
        seed_independent: Whether the last payload of `encode` is the same for every seed, except for its generator.
    """

    def __init__(
        self,
        stages: tuple[Stage, ...],
        strategy: PartitionStrategy,
        runner: StageRunner,
        placement: Placement,
        offloader: ModelOffloader | None,
        step_cache: StepCache | None = None,
    ) -> None:
        self.stages = stages
        self.strategy = strategy
        self.components = runner.components
        self.placement = placement
        self.step_cache = step_cache
        self.seed_independent = False
        self._adapters = placement.adapters
        self._offloader = offloader
        loras = lora_parameters([file.name for file in self._adapters.files])
        encodes = {*runner.signature.encodes, *(names(loras) if self._adapters.encodes else ())}
        more = (*loras, *step_cache_parameters(placement.options.step_cache))
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
            stages: The stages to load, in any order, at least one.
            dtype: The dtype of the weights.
            device: The device that computes.
            quantization: The format of the weights of linear layers, a `Quantization`; autoencoders and vocoders are
                not quantized.
            offload: What stays in host memory while it does not compute, an `Offload`.
            adapters: The LoRA files that requests may choose from, of distinct names.
            options: How the model is read and cut.
            progress: Is told how much has been read; any thread may read it.

        Raises:
            ModelError: The model cannot be served; the message says why.
        """
        # Progress bars would fill the log of a server.
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        stages = tuple(stage for stage in Stage if stage in stages)
        try:
            read = Adapters.read(model, adapters, lora_class(load_index(model)) if adapters else None)
            placement = Placement(dtype, device, Quantization(quantization), Offload(offload), read, options, progress)
            return cls._loaded(model, stages, placement)
        except (ModelError, AttributeError, ImportError) as error:
            # For a missing class, the index and the configuration say more than the error of the library.
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
        components = {name: getattr(runner.pipeline, name) for name in runner.components}
        # Install it before weights are offloaded, so that the hooks that bring a block's weights are the outer ones.
        step_cache = install(components, placement.options.step_cache) if Stage.DENOISER in stages else None
        return cls(stages, strategy, runner, placement, placement.finish(components), step_cache)

    def encode(self, inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Run the encoder.

        Args:
            inputs: The inputs of the request by name, all in `accepted`. Images are `PIL.Image.Image` or lists of
                them. What `signature` lists as `tensors` are tensors, each an input by
                its name, of any shape and dtype that the pipeline takes. Missing inputs have the pipeline's defaults.
                "lora" and "lora_scale" choose adapters.
            seed: The seed of the noise; the same seed makes the same image.

        Returns:
            The payload for the denoiser and the decoder.

        Raises:
            InputError: As `check_inputs`: the head accepts requests before it knows the signature of their model.
        """
        self._require(Stage.ENCODER)
        self.check_inputs(inputs)
        own = self._on_device(self._to_pipeline_inputs(inputs))
        choice = choose_loras(inputs, self._adapters.files)
        self._adapters.activate(choice)
        try:
            with GlobalRngGuard(seed, Stage.ENCODER) as rng:
                payload = self._runner.encode(own, seed)
        finally:
            self._offload()
        self.seed_independent = self._runner.seed_independent(payload) and not rng.was_used
        return {**payload, **self._label(seed, choice), **without_cache(inputs)}

    def rebind(self, payload: Mapping[str, object], inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Adapt the encoder outputs of one request to another request: return what `encode` would, without an encoder.

        Args:
            payload: The payload of a request with the same values for all of `signature.encodes` and all images, and
                with the same seed unless it was `seed_independent`. It is not changed.
            inputs: The inputs of the other request, as for `encode`; images may be missing. They are not checked:
                the head finds a cached payload only for a model whose signature it knows.
            seed: The seed of the other request.
        """
        values = {name: value for name, value in payload.items() if name not in (LORA, LORA_SCALE, CACHE)}
        chosen = _chosen(choose_loras(inputs, self._adapters.files)) | without_cache(inputs)
        return {**self._runner.rebind(values, self._to_pipeline_inputs(inputs), seed), SEED: seed, **chosen}

    def denoise(
        self, payload: Mapping[str, object], bucket: int = 1, resume: Mapping[str, object] | None = None
    ) -> Denoising:
        """Prepare a run of the denoiser; the first `advance` starts it.

        Args:
            payload: The payload of `encode`. It is not changed, so that it can be run again.
            bucket: How many calls of a denoiser module a `StepExecutor` computes together, with those of other runs or
                padded. The result depends on it in its last bits, and not on the other runs; 1 for always alone.
            resume: A `Denoising.snapshot` of a run of the same payload, here or in another process with the same
                weights: the run goes on after it, and its result has the same bits. None runs from the beginning.

        Raises:
            CheckpointError: `resume` is no snapshot; if it does not fit, the first `advance` raises it.
        """
        denoising = self._denoising(payload, bucket)
        if resume is not None:
            denoising.resume(resume)
        return denoising

    def preview(self, payload: Mapping[str, object], snapshot: Mapping[str, object]) -> dict[str, object]:
        """Return a payload for the decoder with the latents of a snapshot, as if its step had been the last.

        Args:
            payload: The payload of the denoise.
            snapshot: A `Denoising.snapshot` of it. Neither is changed.

        Raises:
            CheckpointError: The snapshot is not of a run of this payload.
        """
        denoising = self._denoising(payload, 1)
        denoising.resume(snapshot, skip_rest=True)
        while denoising.advance():
            pass
        return denoising.result()

    def _denoising(self, payload: Mapping[str, object], bucket: int) -> Denoising:
        self._require(Stage.DENOISER)
        values, seed, choice = self._open(payload)
        step_cache = self.step_cache if values.pop(CACHE, True) else None
        denoising = self._runner.denoise(values, parks=bucket > 1 or step_cache is not None)
        denoising.bucket, denoising.adapters = bucket, choice
        device, rng = self.placement.device, GlobalRngGuard(seed, Stage.DENOISER)
        denoising.surround(lambda: self._adapters.activate(choice), rng, self._offload, self._label(seed, choice))
        denoising.keep("random_state", lambda: rng.saved(device), lambda saved: rng.set(saved, device))
        denoising.keep("precision", self._precision, self._check_precision)
        if step_cache is not None:
            state = denoising.step_cache = step_cache.state()
            denoising.keep("step_cache", state.save, state.restore)
        return denoising

    def _precision(self) -> list[object]:
        placement = self.placement
        return [type(self._runner.pipeline).__name__, placement.dtype, str(placement.quantization)]

    def _check_precision(self, saved: object) -> None:
        """Raise `CheckpointError` unless a snapshot was made with weights of the same pipeline, dtype and format."""
        if saved != self._precision():
            raise CheckpointError(f"The snapshot is of {saved}; here is {self._precision()}.")

    def decode(self, payload: Mapping[str, object]) -> dict[str, object]:
        """Run the decoder.

        Args:
            payload: The result of the denoiser. It is not changed.

        Returns:
            "images": a list of `PIL.Image.Image`; or "videos": float32 arrays [video, frame, height, width, 3] in
            0..1, or images. For pipelines that make sound, "audio", "audios" or "sound": [batch, channels, samples] in
            -1..1, and "sampling_rate" in Hz. For a request with `output_type="latent"`, the tensors "latents" and, if
            the pipeline has them, "audio_latents", as diffusers returns them.
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
        """Move the weights from the device to pinned host memory, until `to_device`."""
        self._move(lambda tensor: tensor.to("cpu").pin_memory() if tensor.is_cuda else tensor)

    def to_device(self) -> None:
        """Move the weights back to the device; raises `torch.OutOfMemoryError` if they do not fit."""
        self._move(lambda tensor: tensor.to(self.placement.device))

    def _move(self, moved: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in sorted(self.components):
            module = getattr(self._runner.pipeline, name)
            if isinstance(module, torch.nn.Module):
                module._apply(moved)  # type: ignore[no-untyped-call]

    def _label(self, seed: int, choice: tuple[LoraChoice, ...]) -> dict[str, object]:
        """Return what a payload has beside the values of the pipeline."""
        return {DTYPE: self.placement.dtype, SEED: seed, **_chosen(choice)}

    def _open(self, payload: Mapping[str, object]) -> tuple[dict[str, object], int, tuple[LoraChoice, ...]]:
        """Split a payload into its values, in the dtype of this process, the seed and the adapters."""
        values = convert_dtype(payload, self.placement.dtype)
        seed, names, scales = (values.pop(key, None) for key in (SEED, LORA, LORA_SCALE))
        paired = zip(cast("list[str]", names or []), cast("list[float]", scales or []), strict=True)
        choice = tuple(LoraChoice(name, scale) for name, scale in paired)
        return values, cast(int, seed), choice

    def _offload(self) -> None:
        if self._offloader is not None:
            self._offloader.unload()

    def _on_device(self, inputs: Mapping[str, object]) -> dict[str, object]:
        """Move the tensors among inputs to the device that computes."""
        device = self.placement.device
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}

    def check_inputs(self, inputs: Mapping[str, object]) -> None:
        """Check the inputs of a request.

        Args:
            inputs: The inputs by name, as for `encode`.

        Raises:
            InputError: The pipeline does not take an input, two names of one parameter have different values, a value
                has the wrong kind, an adapter is unknown, or the inputs belong to none of the pipeline's tasks.
        """
        if unknown := sorted(inputs.keys() - self.accepted):
            raise InputError(f"The pipeline takes no {', '.join(unknown)}.")
        parameters, inputs = self.signature.parameters, self._given(inputs)
        if different := conflicting_names(inputs, parameters):
            raise InputError(f"{different[0]} and {different[1]} are the same parameter, but their values differ.")
        try:
            check_scalars(inputs, parameters)
            replaced = {REPLACES[name]: "" for name in REPLACES.keys() & inputs.keys()}
            check_task({**inputs, **replaced}, self.signature.tasks)
            check_lora(inputs, [file.name for file in self._adapters.files])
        except ParameterError as error:
            raise InputError(str(error)) from error

    def _given(self, inputs: Mapping[str, object]) -> dict[str, object]:
        """Return the inputs without those that are None, unless None is a value of theirs."""
        missing = {
            each.name for each in self.signature.parameters if inputs.get(each.name) is None and not each.nullable
        }
        return {name: value for name, value in inputs.items() if name not in missing}

    def _to_pipeline_inputs(self, inputs: Mapping[str, object]) -> dict[str, object]:
        """Return the inputs of a request under the names that the pipeline has, and with full names of classes.

        Raises:
            InputError: There is no such class, or it does not take an option.
        """
        parameters = self.signature.parameters
        try:
            resolved = resolve_classes(self._given(inputs), parameters)
        except ParameterError as error:
            raise InputError(str(error)) from error
        return to_pipeline_names(self._runner.inputs, resolved, parameters)

    @property
    def alpha(self) -> bool:
        """Whether the VAE takes images with an alpha channel: four channels instead of three."""
        config = getattr(getattr(self._runner.pipeline, "vae", None), "config", {})
        return 4 in (config.get("in_channels"), config.get("input_channels"))

    def _require(self, stage: Stage) -> None:
        if stage not in self.stages:
            raise RuntimeError(f"The {stage} was not loaded here, only: {', '.join(self.stages)}.")


def _chosen(choices: tuple[LoraChoice, ...]) -> dict[str, object]:
    if not choices:
        return {}
    return {LORA: [choice.name for choice in choices], LORA_SCALE: [choice.scale for choice in choices]}
