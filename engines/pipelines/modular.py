"""The modular partition: load and run the stages of a pipeline that diffusers has in blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from msgspec.structs import replace

from triptych.engines.parameters.aliases import public_names, with_aliases
from triptych.engines.parameters.declarations import (
    is_internal,
    latent_parameter,
    parameters_of_blocks,
    tensor_inputs_of_blocks,
    tensors_parameter,
)
from triptych.engines.parameters.media import LATENTS, frames_per_s, medium_of, wants_latents, with_sampling_rate
from triptych.engines.parameters.schema import IMAGE_KINDS, OUTPUT_TYPE, REPLACES, Signature
from triptych.engines.parameters.size_constraints import with_size_constraints
from triptych.engines.partition.blocks import (
    KWARGS_MAPPING,
    ModularPartition,
    branch_inputs,
    join_blocks,
    load_modular_partition,
    unused_inputs,
    values_needed_later,
)
from triptych.engines.partition.strategy import size_problem
from triptych.engines.pipelines.block_denoising import BlockDenoising
from triptych.engines.pipelines.component_settings import (
    OF_GUIDERS,
    OF_SCHEDULER,
    OF_VAE,
    SCHEDULER,
    VAE,
    configure,
    setting_parameters,
)
from triptych.engines.pipelines.guidance import GUIDANCE_SCALE, guidance, has_guider, request_copy, set_guidance
from triptych.engines.pipelines.random_state import GENERATOR, is_unused, seeded_generator
from triptych.engines.stages import InputError, ModelError, Stage
from triptych.engines.steps.denoising import Denoising
from triptych.engines.weights.files import read_ahead_files
from triptych.engines.weights.loading import load_component, load_stub
from triptych.engines.weights.placement import Placement
from triptych.engines.weights.read_ahead import read_ahead

NEGATIVE_PROMPT: Final = "negative_prompt"
_NEGATIVE: Final = "negative_prompt_embeds"
_PROMPT_EMBEDS: Final = "prompt_embeds"
IP_ADAPTER_FOLDER: Final = "ip_adapter"
_IP_ADAPTER_IMAGE: Final = "ip_adapter_image"
_UNDECLARED: Final = frozenset({"batch_size"})
"""Inputs that an encoder makes without declaring them (HunyuanVideo 1.5)."""


class ModularRunner:
    """Runs the blocks of some stages."""

    def __init__(self, partition: ModularPartition, pipeline: Any, components: frozenset[str]) -> None:
        self.pipeline = pipeline
        self.components = components
        self._partition = partition
        declared = parameters_of_blocks(partition.blocks, partition.required)
        unread = unused_inputs(partition.blocks) & {item.name for item in declared}
        names = {declared.name for declared in partition.blocks.inputs if declared.name} - unread
        self._takes_generator = GENERATOR in names
        guided = {GUIDANCE_SCALE} if has_guider(pipeline) else set()
        settings = setting_parameters(pipeline)
        self._settings = (guided | {setting.name for setting in settings}) - (names - guided)
        self._made = embeddings(partition.blocks_of[Stage.ENCODER])
        replaceable = {name for made in self._made.values() for name in made}
        tensors = (set(tensor_inputs_of_blocks(partition.blocks)) - unread) | replaceable
        self._latents = [item.name for item in partition.blocks_of[Stage.DECODER].inputs if item.name in LATENTS]
        if self._latents and OUTPUT_TYPE not in names:
            self._settings |= {OUTPUT_TYPE}
        self.inputs = frozenset(names | self._settings | replaceable)
        medium = medium_of(partition.outputs, partition.task)
        defaults = {declared.name: declared.default for declared in partition.blocks.inputs if declared.name}
        defaults |= {name: value for name, value in partition.defaults.items() if name in defaults}
        self._defaults = defaults
        # Like classes that guide, encode an empty negative prompt: without one, a guider silently does not guide.
        made = partition.blocks_of[Stage.ENCODER].intermediate_output_names
        self._negates = partition.as_class and bool(guided) and NEGATIVE_PROMPT in names and _NEGATIVE in made
        fps = frames_per_s(medium, defaults, pipeline)
        public = [
            replace(item, default=defaults[item.name]) if item.name in partition.defaults else item
            for item in declared
            if item.name not in unread
        ]
        public += [
            replace(item, name=name, default=None, required=False, alias_of=item.name)
            for name, other in partition.aliases.items()
            for item in public
            if item.name == other
        ]
        more = [*tensors_parameter(tensors), *([latent_parameter()] if self._latents else [])]
        parameters = with_aliases(
            (*with_size_constraints(public, pipeline), *more),
            settings,
            guided=bool(guided),
            guidance=guidance(pipeline),
            fps=fps,
        )
        self._draws = GENERATOR in encoded(partition)
        images = {parameter.alias_of or parameter.name for parameter in parameters if parameter.kind in IMAGE_KINDS}
        read = encoded(partition) | guided | images | {GENERATOR}
        read |= tensors
        free = self._settings - _read_by_encoder(partition)
        self._passes = {name: default for name, default in defaults.items() if name not in read}
        encodes = self.inputs - self._passes.keys() - free
        later = {item.name for stage in (Stage.DENOISER, Stage.DECODER) for item in partition.blocks_of[stage].inputs}
        passes_through = self.inputs & later - set(partition.blocks_of[Stage.ENCODER].intermediate_output_names)
        self.signature = Signature(
            parameters,
            public_names(encodes, parameters),
            medium,
            fps,
            public_names(passes_through, parameters),
            partition.tasks,
        )

    def encode(self, inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Run the blocks before `denoise`; returns the inputs of later blocks, and `KWARGS_MAPPING`."""
        state = self._encoded(inputs, seed)
        if self._negates and state.get(_NEGATIVE) is None:
            self._defaults[NEGATIVE_PROMPT] = ""
            state = self._encoded(inputs, seed)
        return {**self._crossing(state, Stage.DENOISER, Stage.DECODER), **self._set(inputs)}

    def _encoded(self, inputs: Mapping[str, object], seed: int) -> Any:
        state = PipelineState()
        inputs = {**{REPLACES[name]: "" for name in REPLACES.keys() & self.inputs & inputs.keys()}, **inputs}
        for declared in self._partition.blocks.inputs:
            if declared.name:
                state.set(declared.name, inputs.get(declared.name, self._defaults[declared.name]), declared.kwargs_type)
        if self._takes_generator:
            state.set(GENERATOR, seeded_generator(seed))
        pipeline = request_copy(self.pipeline, inputs, encodes=True)
        for name, block in self._partition.blocks_of[Stage.ENCODER].sub_blocks.items():
            with torch.no_grad():
                pipeline, state = block(pipeline, state)
            _replace(state, self._made.get(name, {}), inputs)
        return state

    def seed_independent(self, payload: Mapping[str, object]) -> bool:
        """Whether the encoder drew nothing from the generator."""
        generator = payload.get(GENERATOR)
        return is_unused(generator) if isinstance(generator, torch.Generator) else not self._draws

    def rebind(self, payload: Mapping[str, object], inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Replace what the encoder did not use: inputs that pass through, settings, and an unused generator."""
        rebound = {name: value for name, value in payload.items() if name not in self._settings} | self._set(inputs)
        for name in self._passes.keys() & payload.keys():
            rebound[name] = inputs.get(name, self._passes[name])
        if GENERATOR in payload and self.seed_independent(payload):
            rebound[GENERATOR] = seeded_generator(seed)
        return rebound

    def denoise(self, payload: Mapping[str, object], *, parks: bool = False) -> Denoising:
        """Prepare a run of the block `denoise`."""
        pipeline = request_copy(self.pipeline, payload, parks=parks)
        settings = self._set(payload)
        return BlockDenoising(
            self._partition.blocks_of[Stage.DENOISER],
            pipeline,
            _restore(payload),
            lambda after: {**self._crossing(after, Stage.DECODER), **settings},
        )

    def decode(self, payload: Mapping[str, object]) -> dict[str, object]:
        """Run the blocks after `denoise`; returns their results, and the "sampling_rate" of sound in Hz.

        For a request for latents, returns the latents that those blocks would get.
        """
        if wants_latents(payload):
            return {name: payload[name] for name in self._latents if payload.get(name) is not None}
        after = self._run(Stage.DECODER, request_copy(self.pipeline, payload), _restore(payload))
        made = {name: after.get(name) for name in self._partition.outputs if after.get(name) is not None}
        return with_sampling_rate(made, self.pipeline)

    def _set(self, values: Mapping[str, object]) -> dict[str, object]:
        """Return the settings of components among the values of a request or payload; no block takes them as inputs."""
        return {name: values[name] for name in self._settings if values.get(name) is not None}

    def _run(self, stage: Stage, pipeline: Any, state: Any) -> Any:
        with torch.no_grad():
            _, state = self._partition.blocks_of[stage](pipeline, state)
        return state

    def _crossing(self, state: Any, *later: Stage) -> dict[str, object]:
        return values_needed_later(
            state.values, state.kwargs_mapping, [self._partition.blocks_of[stage] for stage in later]
        )


def load_modular(model: Path, stages: tuple[Stage, ...], placement: Placement) -> ModularRunner:
    """Load the blocks and components of some stages.

    Raises:
        ModelError: The model cannot be served; the message says why.
    """
    partition = load_modular_partition(model, placement.options)
    if problem := size_problem(partition):
        raise ModelError(problem)
    pipeline = partition.pipeline(join_blocks(partition.blocks_of[stage] for stage in stages))
    loaded = load_components(pipeline, partition, placement)
    load_ip_adapters(pipeline, partition, loaded)
    make_stubs(pipeline, partition, placement)
    set_guidance(pipeline, cast("float | None", partition.defaults.get(GUIDANCE_SCALE)))
    configure(pipeline, placement.options)
    return ModularRunner(partition, pipeline, loaded)


def load_components(pipeline: Any, partition: ModularPartition, placement: Placement) -> frozenset[str]:
    """Load the weights and tokenizers of the components that a pipeline's blocks name.

    Returns:
        The names of the loaded components.

    Raises:
        ModelError: A component is missing or broken. (The pipeline's own loader would warn and go on without it.)
    """
    names = [name for name in pipeline.pretrained_component_names if not partition.goes_without(name)]
    specs = {name: pipeline.get_component_spec(name) for name in names}
    model_folders = {name: partition.component_folder(name, spec) for name, spec in specs.items()}
    files = (file for name in names for file in read_ahead_files(name, model_folders[name], placement.options))
    read_ahead(files, placement.progress)
    loaded = {name: load_component(name, specs[name], model_folders[name], placement) for name in names}
    pipeline.register_components(**loaded)
    return frozenset(loaded)


def make_stubs(pipeline: Any, partition: ModularPartition, placement: Placement) -> None:
    """Give a pipeline stubs for the components of the model that its blocks do not name.

    Its settings, guiders and processors become those of the whole pipeline. Blocks may declare them differently; the
    whole pipeline uses the first declaration, which may be in another stage.

    Do not call it while another thread makes modules: they would have no weights either.

    Raises:
        ModelError: The configuration of a component is missing or broken.
    """
    # Use the blocks of all tasks: geometry may come from a component that only another task declares.
    whole = partition.pipeline(partition.all_blocks)
    pipeline.register_to_config(
        **{spec.name: whole.config[spec.name] for spec in partition.all_blocks.expected_configs}
    )
    for name in whole.config_component_names:
        # Use the real guiders and image processors: they have no weights, and some encoders read the guider.
        setattr(pipeline, name, getattr(whole, name))
    for name in whole.pretrained_component_names:
        if name in pipeline.component_names or partition.goes_without(name):
            continue
        spec = whole.get_component_spec(name)
        if name not in partition.blocks.component_names and not partition.has_folder(spec):
            continue
        folder = partition.component_folder(name, spec)
        stub = load_stub(name, spec, folder, placement.dtype, placement.device, placement.options)
        if stub is not None:
            setattr(pipeline, name, stub)


def load_ip_adapters(pipeline: Any, partition: ModularPartition, loaded: Collection[str]) -> None:
    """Load the IP adapters of a model: `ip_adapter/*.safetensors` in its folder, in the order of their names.

    An index does not name them. With one loaded, each request must have an image for it, so they are loaded only for
    tasks that require `ip_adapter_image`.

    Args:
        pipeline: The pipeline of some stages.
        partition: The model.
        loaded: The names of the loaded components; without the UNet among them, nothing is loaded.

    Raises:
        ModelError: The task needs an IP adapter and there is none, or it does not fit.
    """
    if not any(declared.name == _IP_ADAPTER_IMAGE and declared.required for declared in partition.blocks.inputs):
        return
    model, folder = partition.model, partition.model / IP_ADAPTER_FOLDER
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"The model {model} has no IP adapter: its task needs {IP_ADAPTER_FOLDER}/*.safetensors in it."
        )
    if getattr(pipeline, "unet_name", "unet") not in loaded:
        return
    try:
        pipeline.load_ip_adapter(str(model), subfolder=IP_ADAPTER_FOLDER, weight_name=files, local_files_only=True)
    except Exception as error:  # diffusers raises anything for a broken file; report it as one sentence
        raise ModelError(f"The IP adapter in {folder} cannot be loaded: {error}") from error


def encoded(partition: ModularPartition) -> frozenset[str]:
    """Return the names of all inputs and outputs of the encoder's blocks, whichever of them a request runs."""
    encoder = partition.blocks_of[Stage.ENCODER]
    groups = {item.kwargs_type for item in encoder.inputs if not item.name}
    grouped = {item.name for item in partition.blocks.inputs if item.name and item.kwargs_type in groups}
    named = {item.name for item in (*encoder.inputs, *encoder.intermediate_outputs) if item.name}
    return frozenset(named | grouped | _UNDECLARED | branch_inputs(encoder))


def embeddings(encoder: Any) -> dict[str, dict[str, str | None]]:
    """Return the prompt embeddings that blocks of an encoder make, which a request may give instead.

    Returns:
        For each block, by name, its embeddings with the group that each belongs to, if any.
    """
    found: dict[str, dict[str, str | None]] = {}
    for block_name, block in encoder.sub_blocks.items():
        taken = {item.name for item in block.inputs}
        outputs = {item.name: item.kwargs_type for item in block.intermediate_outputs if item.name}
        made = {name: group for name, group in outputs.items() if _PROMPT_EMBEDS in name and name not in taken}
        if any(is_internal(name) for name in made):
            found[block_name] = made
    return found


def _replace(state: Any, made: Mapping[str, str | None], inputs: Mapping[str, object]) -> None:
    """Replace the embeddings that a block has made of an empty prompt with those of the request.

    Raises:
        InputError: The request has some of the embeddings of a prompt, but not all.
    """
    for negative in (False, True):
        of_prompt = [name for name in made if name.startswith("negative") is negative]
        given = [name for name in of_prompt if inputs.get(name) is not None]
        lacking = [name for name in of_prompt if name not in given and state.get(name) is not None]
        if given and lacking:
            raise InputError(f"tensors must have {', '.join(lacking)} beside {', '.join(given)}.")
    for name, group in made.items():
        if inputs.get(name) is not None:
            state.set(name, inputs[name], group)


def _read_by_encoder(partition: ModularPartition) -> frozenset[str]:
    """Return the names of the settings that may change the encoder's outputs: those of its components."""
    components = set(partition.blocks_of[Stage.ENCODER].component_names)
    scheduler = OF_SCHEDULER if SCHEDULER in components else frozenset()
    # Some encoders read the guider without declaring it.
    return OF_GUIDERS | scheduler | (OF_VAE if VAE in components else frozenset())


def _restore(values: Mapping[str, object]) -> Any:
    """Make a `PipelineState` of a payload, with a copy of its generator."""
    values = dict(values)
    groups = cast("dict[str, list[str]]", values.pop(KWARGS_MAPPING, {}))
    generator = values.get(GENERATOR)
    if isinstance(generator, torch.Generator):
        values[GENERATOR] = generator.clone_state()
    return PipelineState(values=values, kwargs_mapping={group: list(names) for group, names in groups.items()})
