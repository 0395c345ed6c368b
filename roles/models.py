"""The models of a system: each with its card and its books, and which of them something is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from triptych.actors import Component, Model, Topology
from triptych.actors.ownership import ModelIdentity
from triptych.engines.card import ModelCard
from triptych.engines.checks import ANY
from triptych.engines.panels import Panel
from triptych.engines.parameters import Parameter, Signature
from triptych.roles.dispatch import POLICIES
from triptych.roles.fleet import Fleet
from triptych.roles.formats import settle_output
from triptych.roles.ledger import Ledger
from triptych.roles.messages.requests import ModelDescription, PromptCacheView
from triptych.roles.messages.work import Output
from triptych.roles.request import Request

WEIGHTS: Final = frozenset({".safetensors", ".gguf"})


class Served:
    """One model: what it takes, and the books of its requests and instances.

    Args:
        model: Of the topology.
        ledger: Of this model alone.
    """

    def __init__(self, model: Model, ledger: Ledger) -> None:
        self.model = model
        self.ledger = ledger
        self.card = ModelCard()
        self.identity: ModelIdentity | None = None
        """None where its folder is not there, or was not looked at yet."""
        self.given_up = ""
        """Why no request can come to its end."""
        self.file_bytes = 0
        """Size of its files of weights."""
        self._known = Signature()

    @property
    def key(self) -> str:
        """What the journal calls it: its name in the topology, "" where that has none."""
        return self.model.name

    @property
    def name(self) -> str:
        """What requests give as `model`."""
        return self.model.name or self.card.name

    @property
    def signature(self) -> Signature:
        """Of whichever instance has loaded it, or was the last to have: they load the same model."""
        found = (i.signature for i in self.ledger.fleet.instances.values() if i.signature.parameters)
        self._known = next(found, self._known)
        return self._known

    @property
    def has_been_loaded(self) -> bool:
        """Whether for every stage there is an instance that has loaded its weights, be they in memory now or not."""
        loaded = [i for i in self.ledger.fleet.instances.values() if i.awake or i.weights]
        return any(i.kind == "monolithic" for i in loaded) or all(any(i.serves(p) for i in loaded) for p in Panel)

    @property
    def parameters(self) -> tuple[Parameter, ...] | None:
        """What the pipeline takes; None until an instance has loaded it."""
        return self.signature.parameters or None

    @property
    def lora_names(self) -> list[str]:
        """Adapters that a request may ask for."""
        return [lora.name for lora in self.model.section.lora]

    def describe(self, created_at: float, state: str) -> ModelDescription:
        """Say what it is and what it takes."""
        signature, card = self.signature, self.card
        parameters = [replace(item, default=card.default(item)) for item in signature.parameters]
        return ModelDescription(
            name=self.name,
            family=card.family,
            task=self._task(),
            dtype=self.model.section.dtype,
            created_at=created_at,
            defaults=dict(card.defaults),
            ranges={item.name: limits for item in parameters if (limits := card.limits(item)) not in ((), ANY)},
            parameters=tuple(parameters),
            medium=signature.medium,
            fps=settle_output(Output(), signature, {}, card.defaults).fps,
            tasks=signature.tasks,
            state=state,
        )

    def _task(self) -> str:
        tasks, named = self.signature.tasks, self.card.task
        if tasks:
            return tasks[0].name if len(tasks) == 1 else "any"
        return named if isinstance(named, str) else "any"


class Models:
    """All of them, in the order of the topology.

    Args:
        served: At least one.
        instances: Name of each instance, and the model that it serves.
    """

    def __init__(self, served: Iterable[Served], instances: Mapping[str, Served]) -> None:
        self.all = tuple(served)
        self._instances = dict(instances)

    @property
    def ledgers(self) -> tuple[Ledger, ...]:
        """Their books."""
        return tuple(served.ledger for served in self.all)

    def find(self, name: str) -> Served | None:
        """Return the model that requests call `name`, the first for ""; None where there is none."""
        return next((served for served in self.all if name in ("", served.name)), None)

    def by_key(self, key: str) -> Served | None:
        """Return the model that the journal calls `key`."""
        return next((served for served in self.all if served.key == key), None)

    def unknown(self, name: str) -> str:
        """Say that there is no model of that name, and which there are."""
        names = " and ".join(repr(served.name) for served in self.all)
        return f"the model {name!r} is not served here, {names} {'is' if len(self.all) == 1 else 'are'}"

    def of(self, instance: str) -> Served | None:
        """Return the model that an instance serves; None for what is no instance of the topology."""
        return self._instances.get(instance)

    def books_of(self, instance: str) -> Ledger:
        """Return the ledger of an instance; raises KeyError for what is none of the topology."""
        return self._instances[instance].ledger

    def heir(self, request: Request) -> tuple[Served, bool]:
        """Return the model that goes on with a request of an earlier head, and whether it is the same one.

        That of its name, unless another model is called so by now; else the one that it was accepted for, whatever
        its name has become.
        """
        was, named = request.served, self.by_key(request.model)
        if not (was or request.model):  # an earlier version wrote nothing down, and served one model
            return self.all[0], True
        if named and not (was and named.identity and not was.is_same(named.identity)):
            return named, True
        same = next((served for served in self.all if was and served.identity and was.is_same(served.identity)), None)
        return (same, True) if same else (named or self.all[0], False)

    # -- of all their books

    @property
    def units_count(self) -> int:
        """How many are active."""
        return sum(len(ledger.units) for ledger in self.ledgers)

    @property
    def requests(self) -> dict[str, Request]:
        """All that a ledger has."""
        return {id_: request for ledger in self.ledgers for id_, request in ledger.requests.items()}

    def holder(self, request_id: str) -> Ledger | None:
        """Return the ledger that has a request."""
        return next((ledger for ledger in self.ledgers if request_id in ledger.requests), None)

    def request(self, request_id: str) -> Request | None:
        """Return the request of that id, if a ledger has it."""
        holder = self.holder(request_id)
        return holder.requests[request_id] if holder else None

    def request_of_key(self, key: str) -> Request | None:
        """Return the request of an idempotency key, if a ledger has it."""
        return next((ledger.by_key[key] for ledger in self.ledgers if key in ledger.by_key), None)

    def counts(self) -> dict[str, int]:
        """Active units by state."""
        counts: dict[str, int] = {}
        for ledger in self.ledgers:
            for state, count in ledger.counts().items():
                counts[state] = counts.get(state, 0) + count
        return counts

    @property
    def completed(self) -> int:
        """Units that came to a good end."""
        return sum(ledger.tally.completed for ledger in self.ledgers)

    @property
    def average_latency_s(self) -> float:
        """Of completed units; 0 before the first."""
        return sum(ledger.tally.latency_s for ledger in self.ledgers) / max(1, self.completed)

    def prompt_cache(self) -> PromptCacheView:
        """Sum their prompt caches up."""
        views = [ledger.staging.cache.view() for ledger in self.ledgers]
        return PromptCacheView(
            *(sum(getattr(view, name) for view in views) for name in PromptCacheView.__struct_fields__)
        )


def file_bytes(places: Iterable[Path]) -> int:
    """Size of the weights in files and folders; raises OSError."""
    files = {file for place in places for file in (place.rglob("*") if place.is_dir() else (place,))}
    return sum(file.stat().st_size for file in files if file.suffix in WEIGHTS)


def models_of(topology: Topology) -> Models:
    """Make the models of a topology, with empty books."""
    served = {model.name: Served(model, _ledger(topology, model)) for model in topology.models}
    roles = [component for component in topology.components if component.slots]
    return Models(served.values(), {component.name: served[component.model] for component in roles})


def _ledger(topology: Topology, model: Model) -> Ledger:
    settings = topology.head
    return Ledger(
        POLICIES[settings.dispatch],
        max_pending=settings.max_pending,
        max_attempts=settings.max_attempts,
        waiting_timeout_s=settings.waiting_timeout_s,
        running_timeout_s=settings.running_timeout_s,
        heartbeat_timeout_s=topology.supervision.heartbeat_timeout_s,
        fleet=Fleet({panel: _slots(topology.components, model, panel) for panel in Panel}),
    )


def _slots(components: Iterable[Component], model: Model, panel: Panel) -> int:
    return sum(c.slots for c in components if c.kind == panel.value and c.model == model.name)
