"""What the head and an instance must have read alike in their topology files."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from triptych.actors.topology._topology import Component, Model, Topology

_OF_ONE_HOST: Final = frozenset({"path", "revision", "config", "sleep", "prompt_cache", "roles"})
"""Keys of `[model]` that are paths, which each host may have elsewhere, or that only one process reads."""


def agreement(topology: Topology, name: str) -> str:
    """Return a digest of what the head and the instance `name` must have read alike; raises `UnknownNameError`.

    That is what the image depends on, and where the two and the pools are reached. Paths, sizes, time limits and other
    instances do not count, so that a file may be changed while a system runs.
    """
    component = topology.component(name)
    involved = [c for c in topology.components if c.kind in ("head", "pool") or c.name == name]
    alike = (
        [_of_model(model) for model in topology.models if model.name == component.model],
        [_of_component(each) for each in involved],
        topology.engine if any(c.kind == "pool" for c in involved) else "",
        topology.transfer.protocol,
    )
    return hashlib.blake2b(msgspec.json.encode(alike, order="deterministic"), digest_size=8).hexdigest()


def _of_model(model: Model) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(model.section)
    alike = {key: value for key, value in fields.items() if key not in _OF_ONE_HOST}
    alike["components"] = sorted(model.section.components)
    alike["lora"] = [(lora.name, lora.scale) for lora in model.section.lora]
    alike["embeddings"] = [embedding.token for embedding in model.section.embeddings]
    alike["step_cache"] = model.step_cache
    return alike


def _of_component(component: Component) -> tuple[str, ...]:
    address = component.address if component.address.startswith("tcp://") else ""  # an ipc path is this host's own
    return (
        component.name,
        component.kind,
        component.model,
        address,
        component.pool,
        component.dtype,
        component.quantization,
    )
