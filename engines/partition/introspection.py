"""Find out which methods of a classic pipeline encode and decode, and which stage owns each component.

The `__call__` of a classic pipeline does everything. Its compiled code names each attribute that it reads, so the
components that a method uses are known without running it. What it does with them is found in its source
(`source_analysis`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any, Final

import diffusers
from transformers import PreTrainedModel

from triptych.engines.partition.source_analysis import (
    attributes_set_from,
    calls_in_loop,
    computes,
    ends_without_steps,
    requires_component,
    runs,
    runs_before,
)
from triptych.engines.stages import Stage

_WEIGHTLESS: Final = ("Tokenizer", "Processor", "FeatureExtractor")
_ENCODED: Final = {"vae", "encode"}
_AFTER: Final = frozenset({"vocoder", "safety_checker", "watermark", "watermarker"})


@dataclass(frozen=True)
class ClassicPartition:
    """How a classic pipeline is cut.

    Attributes:
        components: The library and class of each component of the model, by name.
        owners: The stage that runs each component, by name.
        read: The components that are read outside of the encoding methods.
        encodes: The methods that `__call__` calls to run text encoders and the like.
        decodes: The methods that `__call__` calls to run the VAE's decoder; may be empty.
        conditions: Whether other code runs the VAE's encoder, as for image-to-image.
        before: The components that are run before the last encoding method returns.
        computes: The components that are run outside of the encoding methods and of the loop.
        has_decoder_stage: Whether the decoder is a stage of its own: there is one VAE, which decodes once, and a run
            without steps of the loop arrives at it. Otherwise the denoiser runs to the end.
        can_be_cut: Whether there is an encoding method.
    """

    components: Mapping[str, tuple[str, str]]
    owners: Mapping[str, Stage]
    read: frozenset[str]
    encodes: frozenset[str]
    decodes: frozenset[str]
    conditions: bool
    before: frozenset[str]
    computes: frozenset[str]
    has_decoder_stage: bool
    can_be_cut: bool

    def needed(self, stage: Stage) -> frozenset[str]:
        """Return the names of the components that a stage loads."""
        mine = {name for name in self.components if self.owners[name] is stage}
        if stage is Stage.ENCODER:
            return frozenset(mine | self.before)
        if not mine:
            return frozenset()
        # The denoiser and the decoder both run the code before the loop.
        mine |= self.computes
        if stage is Stage.DENOISER and self.conditions:
            mine.add("vae")
        # Tokenizers and processors are cheap, and cannot be stubs.
        return frozenset(mine | {name for name in self.read if is_weightless(*self.components[name])})


def classic_partition(cls: Any, index: Mapping[str, object]) -> ClassicPartition:
    """Find out from the code of a pipeline class how it is cut.

    Args:
        cls: A `diffusers.DiffusionPipeline`.
        index: The index of a model of that class.
    """
    components = dict(_components(cls, index))
    models = {name for name, entry in components.items() if _encodes(name, *entry)}
    called = _names(_code(cls, "__call__"))
    encodes: set[str] = set()
    decodes: set[str] = set()
    for method in called:
        reached = _reached(cls, method)
        names = set().union(*reached.values())
        if {"vae", "decode"} <= names:
            decodes.add(method)
        elif any(computes(cls, inner, name) for name in names & models for inner in reached):
            encodes.add(method)
    others = _reached(cls, "__call__", without=frozenset(encodes))
    read = set().union(*others.values())
    read |= {
        name
        for name, entry in components.items()
        if is_weightless(*entry) and (attributes_set_from(cls, name) & read or requires_component(cls, name))
    }
    encoding = {name for method in encodes for name in _reach(cls, method)}
    vaes = [name for name in components if name.endswith("vae")]
    owners = {name: _owner(name, models, encoding, read, components) for name in components}
    loops = frozenset(name for name, owner in owners.items() if owner is Stage.DENOISER)
    apart = vaes == ["vae"] and {"vae", "decode"} <= read and ends_without_steps(cls, loops, encodes)
    if not apart:
        owners = {name: Stage.DENOISER if owner is Stage.DECODER else owner for name, owner in owners.items()}
    return ClassicPartition(
        components,
        owners,
        frozenset(read & components.keys()),
        frozenset(encodes),
        frozenset(decodes),
        "vae" in components and any(_runs_encoder(cls, *other) for other in others.items()),
        runs_before(cls, components, encodes),
        frozenset(encoding & components.keys() if calls_in_loop(cls, encodes) else ())
        | runs(cls, loops, encodes, in_loops=False)
        | {name for name in models if any(computes(cls, method, name) for method in others)},
        apart,
        bool(encodes),
    )


def is_weightless(library: str, name: str) -> bool:
    """Whether the class of a component is a tokenizer or a processor."""
    return library != "diffusers" and any(word in name for word in _WEIGHTLESS)


def loaded_by(cls: Any) -> frozenset[str]:
    """Return the names of the components that diffusers loads for a pipeline if its index has them.

    Other arguments have a default; diffusers has no folder for them.
    """
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return frozenset(
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty or parameter.name in cls._optional_components
    )


def _components(cls: Any, index: Mapping[str, object]) -> Iterator[tuple[str, tuple[str, str]]]:
    expected = loaded_by(cls)
    for name, entry in index.items():
        if (
            name in expected
            and isinstance(entry, list)
            and len(entry) == 2
            and all(isinstance(part, str) for part in entry)
        ):
            yield name, (entry[0], entry[1])


def _encodes(name: str, library: str, class_name: str) -> bool:
    if name in _AFTER or is_weightless(library, class_name):
        return False
    if library == "transformers" or name.startswith("text_encoder"):
        return True
    # A few families have their own encoder class, and an index may name a folder of pipelines for a class of
    # transformers.
    found = getattr(getattr(diffusers.pipelines, library, None), class_name, None)
    return isinstance(found, type) and issubclass(found, PreTrainedModel)


def _owner(
    name: str, models: set[str], encoding: set[str], read: set[str], components: Mapping[str, tuple[str, str]]
) -> Stage:
    if name == "vae" or name in _AFTER:
        return Stage.DECODER
    # A component that only encoding methods read belongs to the encoder, such as a projection of embeddings.
    if name in models or is_weightless(*components[name]) or (name in encoding and name not in read):
        return Stage.ENCODER
    return Stage.DENOISER


def _code(cls: Any, method: str) -> CodeType | None:
    if method != "__call__" and hasattr(diffusers.DiffusionPipeline, method):
        return None
    function = inspect.getattr_static(cls, method, None)
    function = inspect.unwrap(getattr(function, "__func__", function)) if callable(function) else None
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None


def _names(code: CodeType | None) -> set[str]:
    if code is None:
        return set()
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def _runs_encoder(cls: Any, method: str, names: set[str]) -> bool:
    """Whether a method runs the VAE's encoder; the VAE may be an argument."""
    code = _code(cls, method)
    return names | set(code.co_varnames if code is not None else ()) >= _ENCODED


def _reach(cls: Any, method: str) -> set[str]:
    """Return all names that a method reads, directly or through other methods of its class."""
    return set().union(*_reached(cls, method).values())


def _reached(cls: Any, method: str, without: frozenset[str] = frozenset()) -> dict[str, set[str]]:
    """Return the names that a method reads, and those of each method that it reaches, by method."""
    found: dict[str, set[str]] = {}
    ahead = [method]
    while ahead:
        current = ahead.pop()
        if current not in found and current not in without and current != "__init__":
            found[current] = _names(_code(cls, current))
            ahead.extend(found[current])
    return found
