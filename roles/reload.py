"""Which instance restarts next while the system goes over to changed weights. Pure.

New work is made with the new weights as soon as an encoder has them. What was begun with the old ones is finished with
the old ones, so each stage keeps an old instance for as long as a unit needs it. One instance restarts at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from triptych.engines.panels import Panel
from triptych.roles.fleet import Instance
from triptych.roles.request import Unit

_ORDER = [panel.value for panel in Panel]


def next_to_restart(instances: Collection[Instance], units: Iterable[Unit], model: str) -> Instance | None:
    """Return an idle instance with other weights than `model` that nothing needs; None while there is none.

    Args:
        instances: all of them.
        units: the active ones.
        model: version of the weights to go over to.

    """
    needed = [(unit.model, _ORDER.index(unit.panel.value)) for unit in units if unit.panel and unit.made_of_old(model)]
    for instance in sorted(instances, key=_stage):
        if instance.model == model or instance.in_hand:
            continue
        peers = [i for i in instances if (i.kind, i.model) == (instance.kind, instance.model) and i is not instance]
        if peers or not any(model == instance.model and at <= _stage(instance) for model, at in needed):
            return instance
    return None


def _stage(instance: Instance) -> int:
    return _ORDER.index(instance.kind) if instance.kind in _ORDER else 0
