"""What lies in a pool: which tensors need memory of their own there, and how large one payload may be. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection

    from triptych.actors.topology._topology import Component

INCOMING: Final = "incoming"
"""Tensors that come in from another pool, until they are loaded."""
_UPSTREAM: Final = {"denoiser": "encoder", "decoder": "denoiser"}
_LEAST_PARTS: Final = 2


def pool_zones(components: Collection[Component], pool: str) -> tuple[str, ...]:
    """Return the zones of a pool, each of which may wait for another: they must not take each other's memory.

    They are "encoder" and "denoiser" for the outputs of these stages, and "incoming".
    """
    users = [component for component in components if component.pool == pool]
    outputs = [stage for stage in ("encoder", "denoiser") if any(user.kind == stage for user in users)]
    sources = {(component.model, component.kind) for component in components if component.pool not in ("", pool)}
    arrivals = any((user.model, _UPSTREAM.get(user.kind, "")) in sources for user in users)
    return (*outputs, *([INCOMING] if arrivals else []))


def largest_payload(pool_bytes: int, zones: int = _LEAST_PARTS) -> int:
    """Return the most bytes of a payload: a block is a power of two, within the part of a pool that a zone has.

    That is a half at most also where there is one zone, since the payload may have to go on into a pool with two.
    """
    return 1 << (pool_bytes // max(zones, _LEAST_PARTS)).bit_length() >> 1
