"""Which code builds the actors of each kind of component, by name, so that nothing is imported too early."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from triptych.actors.errors import StartError

if TYPE_CHECKING:
    from triptych.actors.runtime.actor import Actor
    from triptych.actors.topology import Component, Topology

Builder = Callable[["Component", "Topology"], "list[Actor]"]
"""Builds the actors of a component. The first has the name of the component, the others are called NAME.something."""


class ComponentSpec(NamedTuple):
    """How components of one kind are built."""

    build: str
    """Its `Builder`, as "module:function"."""
    forked: bool = False
    """Whether its process is forked from the zygote, which has the large libraries; else a fresh interpreter."""


COMPONENT_SPECS: Final[Mapping[str, ComponentSpec]] = {
    "pool": ComponentSpec("triptych.roles.pool.pool:build"),
    "encoder": ComponentSpec("triptych.roles.worker.instance:build", forked=True),
    "denoiser": ComponentSpec("triptych.roles.worker.instance:build", forked=True),
    "decoder": ComponentSpec("triptych.roles.worker.instance:build", forked=True),
    "monolithic": ComponentSpec("triptych.roles.worker.instance:build", forked=True),
    "head": ComponentSpec("triptych.roles.head.head:build"),
    "api": ComponentSpec("triptych.api.server:build"),
}
"""The components of Triptych, by kind."""

PRELOAD: Final = (
    "triptych.engines",
    "torch",
    "diffusers",
    "transformers",
    "triptych.engines.pipelines.pipeline",
    "triptych.roles.worker.instance",
    "triptych.roles.worker.stream_worker",
    "triptych.roles.worker.transfer",
)
"""Modules that the zygote imports; most of diffusers is imported only by what uses it.

`engines` is first, because it silences the others.
"""


def load_function(name: str) -> Any:
    """Import the function called "module:function"; raises `StartError` when it cannot be imported."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise StartError(f"{name} cannot be imported ({error}): install what it needs") from error
