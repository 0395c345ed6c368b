"""The base of everything that travels between actors."""

from __future__ import annotations

from typing import dataclass_transform

import msgspec


@dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
class Message(
    msgspec.Struct,
    frozen=True,
    tag=True,
    array_like=True,
    gc=False,
    forbid_unknown_fields=True,
):
    """A typed message; its class name is its tag on the wire.

    Subclasses are plain annotated fields, each with a line of docstring. Fields hold scalars, strings,
    bytes, tuples, dicts, `msgspec.Struct`s and unions of those; never a tensor, never a live object.
    """
