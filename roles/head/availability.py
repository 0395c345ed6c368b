"""Whether requests can be served at all, by what the supervisors do not start any more."""

from __future__ import annotations

from collections.abc import Iterable

from triptych.actors import Component
from triptych.actors.child_state import GIVEN_UP_STATES
from triptych.actors.runtime.system_messages import ChildReport


def unavailable_reason(components: Iterable[Component], children: Iterable[ChildReport]) -> str:
    """Say why no request can come to its end until a person steps in; "" while one may.

    Args:
        components: Of the topology.
        children: As their supervisors report them; a component that no supervisor has may still be started.
    """
    components = tuple(components)
    gone = {child.name: child.reason or child.state for child in children if child.state in GIVEN_UP_STATES}
    for component in components:
        if component.kind == "pool" and component.name in gone:
            return f"{component.name} is not started any more ({gone[component.name]})"
    for kind in dict.fromkeys(component.kind for component in components if component.slots):
        names = [component.name for component in components if component.kind == kind]
        if all(name in gone for name in names):
            return f"no {kind} is started any more ({names[0]}: {gone[names[0]]})"
    return ""
