"""The modular route: the panels of a pipeline that diffusers has in blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from msgspec.structs import replace

from triptych.engines.aliases import public_names, with_aliases
from triptych.engines.calling import asks_for_latents
from triptych.engines.geometry import with_steps
from triptych.engines.guidance import GUIDANCE_SCALE, guidance, has_guider, private, set_guidance
from triptych.engines.ip_adapters import load_ip_adapters
from triptych.engines.loading import geometry_problem, load_components, make_shadows
from triptych.engines.media import LATENTS, frames_per_s, medium_of, with_sampling_rate
from triptych.engines.panels import InputError, ModelError, Panel
from triptych.engines.parameters import IN_PLACE_OF, OUTPUT_TYPE, PICTURES, Signature
from triptych.engines.placing import Placement
from triptych.engines.seeds import GENERATOR, is_fresh, seeded
from triptych.engines.settings import OF_GUIDERS, OF_SCHEDULER, OF_VAE, SCHEDULER, VAE, configure, setting_parameters
from triptych.engines.split import KWARGS_MAPPING, Split, crossing, ignored, joined, load_split, switches
from triptych.engines.stepping import BlockDenoising, Denoising
from triptych.engines.vocabulary import is_internal, latent_parameter, of_blocks, tensors_of_blocks, tensors_parameter

NEGATIVE_PROMPT: Final = "negative_prompt"
_NEGATIVE: Final = "negative_prompt_embeds"
_PROMPT_EMBEDS: Final = "prompt_embeds"
_UNDECLARED: Final = frozenset({"batch_size"})
"""Inputs that some encoder makes without a declaration (HunyuanVideo 1.5)."""


class ModularParts:
    """The blocks of some panels, and a pipeline with what they need."""

    def __init__(self, split: Split, pipeline: Any, components: frozenset[str]) -> None:
        self.pipeline = pipeline
        self.components = components
        self._split = split
        declared = of_blocks(split.blocks, split.required)
        unread = ignored(split.blocks) & {item.name for item in declared}
        names = {declared.name for declared in split.blocks.inputs if declared.name} - unread
        self._takes_generator = GENERATOR in names
        guided = {GUIDANCE_SCALE} if has_guider(pipeline) else set()
        settings = setting_parameters(pipeline)
        self._settings = (guided | {setting.name for setting in settings}) - (names - guided)
        self._made = embeddings(split.parts[Panel.ENCODER])
        replaceable = {name for made in self._made.values() for name in made}
        tensors = (set(tensors_of_blocks(split.blocks)) - unread) | replaceable
        self._latents = [item.name for item in split.parts[Panel.DECODER].inputs if item.name in LATENTS]
        if self._latents and OUTPUT_TYPE not in names:
            self._settings |= {OUTPUT_TYPE}
        self.inputs = frozenset(names | self._settings | replaceable)
        medium = medium_of(split.outputs, split.task)
        defaults = {declared.name: declared.default for declared in split.blocks.inputs if declared.name}
        defaults |= {name: value for name, value in split.defaults.items() if name in defaults}
        self._defaults = defaults
        # Classes that guide encode an empty negative prompt; a guider without one does not guide, and says nothing.
        made = split.parts[Panel.ENCODER].intermediate_output_names
        self._negates = split.as_class and bool(guided) and NEGATIVE_PROMPT in names and _NEGATIVE in made
        fps = frames_per_s(medium, defaults, pipeline)
        public = [
            replace(item, default=defaults[item.name]) if item.name in split.defaults else item
            for item in declared
            if item.name not in unread
        ]
        public += [
            replace(item, name=name, default=None, required=False, alias_of=item.name)
            for name, other in split.aliases.items()
            for item in public
            if item.name == other
        ]
        more = [*tensors_parameter(tensors), *([latent_parameter()] if self._latents else [])]
        parameters = with_aliases(
            (*with_steps(public, pipeline), *more),
            settings,
            guided=bool(guided),
            guidance=guidance(pipeline),
            fps=fps,
        )
        self._draws = GENERATOR in encoded(split)
        pictures = {parameter.alias_of or parameter.name for parameter in parameters if parameter.kind in PICTURES}
        read = encoded(split) | guided | pictures | {GENERATOR}
        read |= tensors
        free = self._settings - _read_by_encoder(split)
        self._passes = {name: default for name, default in defaults.items() if name not in read}
        encodes = self.inputs - self._passes.keys() - free
        later = {item.name for panel in (Panel.DENOISER, Panel.DECODER) for item in split.parts[panel].inputs}
        hands_on = self.inputs & later - set(split.parts[Panel.ENCODER].intermediate_output_names)
        self.signature = Signature(
            parameters, public_names(encodes, parameters), medium, fps, public_names(hands_on, parameters), split.tasks
        )

    def encode(self, inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Run the blocks before `denoise`; returns what later blocks take as inputs, and `KWARGS_MAPPING`."""
        state = self._encoded(inputs, seed)
        if self._negates and state.get(_NEGATIVE) is None:
            self._defaults[NEGATIVE_PROMPT] = ""
            state = self._encoded(inputs, seed)
        return {**self._crossing(state, Panel.DENOISER, Panel.DECODER), **self._set(inputs)}

    def _encoded(self, inputs: Mapping[str, object], seed: int) -> Any:
        state = PipelineState()
        inputs = {**{IN_PLACE_OF[name]: "" for name in IN_PLACE_OF.keys() & self.inputs & inputs.keys()}, **inputs}
        for declared in self._split.blocks.inputs:
            if declared.name:
                state.set(declared.name, inputs.get(declared.name, self._defaults[declared.name]), declared.kwargs_type)
        if self._takes_generator:
            state.set(GENERATOR, seeded(seed))
        pipeline = private(self.pipeline, inputs, encodes=True)
        for name, block in self._split.parts[Panel.ENCODER].sub_blocks.items():
            with torch.no_grad():
                pipeline, state = block(pipeline, state)
            _replace(state, self._made.get(name, {}), inputs)
        return state

    def seedless(self, state: Mapping[str, object]) -> bool:
        """Whether the encoder drew nothing from the generator."""
        generator = state.get(GENERATOR)
        return is_fresh(generator) if isinstance(generator, torch.Generator) else not self._draws

    def renew(self, state: Mapping[str, object], inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Set anew what only passes the encoder: other inputs, and a generator that it did not draw from."""
        renewed = {name: value for name, value in state.items() if name not in self._settings} | self._set(inputs)
        for name in self._passes.keys() & state.keys():
            renewed[name] = inputs.get(name, self._passes[name])
        if GENERATOR in state and self.seedless(state):
            renewed[GENERATOR] = seeded(seed)
        return renewed

    def denoise(self, state: Mapping[str, object]) -> Denoising:
        """Prepare a run of the block `denoise`."""
        pipeline = private(self.pipeline, state)
        settings = self._set(state)
        return BlockDenoising(
            self._split.parts[Panel.DENOISER],
            pipeline,
            _restore(state),
            lambda after: {**self._crossing(after, Panel.DECODER), **settings},
        )

    def decode(self, state: Mapping[str, object]) -> dict[str, object]:
        """Run the blocks after `denoise`; returns what they make, and the "sampling_rate" of sound in Hz.

        Asked for latents, it returns those that the blocks would get.
        """
        if asks_for_latents(state):
            return {name: state[name] for name in self._latents if state.get(name) is not None}
        after = self._run(Panel.DECODER, private(self.pipeline, state), _restore(state))
        made = {name: after.get(name) for name in self._split.outputs if after.get(name) is not None}
        return with_sampling_rate(made, self.pipeline)

    def _set(self, values: Mapping[str, object]) -> dict[str, object]:
        """Of a request or a state, what sets parts of the pipeline: no block takes it as an input."""
        return {name: values[name] for name in self._settings if values.get(name) is not None}

    def _run(self, panel: Panel, pipeline: Any, state: Any) -> Any:
        with torch.no_grad():
            _, state = self._split.parts[panel](pipeline, state)
        return state

    def _crossing(self, state: Any, *later: Panel) -> dict[str, object]:
        return crossing(state.values, state.kwargs_mapping, [self._split.parts[panel] for panel in later])


def load_modular(model: Path, panels: tuple[Panel, ...], placement: Placement) -> ModularParts:
    """Load the blocks of some panels.

    Raises:
        ModelError: The model cannot be served; the sentence says why.
    """
    split = load_split(model, placement.options)
    if problem := geometry_problem(split):
        raise ModelError(problem)
    pipeline = split.pipeline(joined(split.parts[panel] for panel in panels))
    loaded = load_components(pipeline, split, placement)
    load_ip_adapters(pipeline, split, loaded)
    make_shadows(pipeline, split, placement)
    set_guidance(pipeline, cast("float | None", split.defaults.get(GUIDANCE_SCALE)))
    configure(pipeline, placement.options)
    return ModularParts(split, pipeline, loaded)


def encoded(split: Split) -> frozenset[str]:
    """Names of all that the encoder's blocks may read or make, whichever of them a request runs."""
    part = split.parts[Panel.ENCODER]
    groups = {item.kwargs_type for item in part.inputs if not item.name}
    grouped = {item.name for item in split.blocks.inputs if item.name and item.kwargs_type in groups}
    named = {item.name for item in (*part.inputs, *part.intermediate_outputs) if item.name}
    return frozenset(named | grouped | _UNDECLARED | switches(part))


def embeddings(encoder: Any) -> dict[str, dict[str, str | None]]:
    """What blocks of an encoder make of prompts, which a request may give in its place.

    Returns:
        By name of the block, the names of its tensors and the group that each belongs to, if any.
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
    """Put what a request gives in the place of what a block has made of an empty prompt.

    Raises:
        InputError: A request gives some of what is made of one prompt, but not all.
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


def _read_by_encoder(split: Split) -> frozenset[str]:
    """Names of settings that may change what the encoder makes: those of the components that it has."""
    components = set(split.parts[Panel.ENCODER].component_names)
    scheduler = OF_SCHEDULER if SCHEDULER in components else frozenset()
    # Some encoders read the guider although they do not declare it.
    return OF_GUIDERS | scheduler | (OF_VAE if VAE in components else frozenset())


def _restore(values: Mapping[str, object]) -> Any:
    """Make a `PipelineState` of values that crossed, with a generator of its own."""
    values = dict(values)
    groups = cast("dict[str, list[str]]", values.pop(KWARGS_MAPPING, {}))
    generator = values.get(GENERATOR)
    if isinstance(generator, torch.Generator):
        values[GENERATOR] = generator.clone_state()
    return PipelineState(values=values, kwargs_mapping={group: list(names) for group, names in groups.items()})
