"""The models of a system: each with its parameter defaults and its scheduler, and which of them something is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from triptych.actors import Component, Model, Topology
from triptych.actors.topology import ModelIdentity
from triptych.engines.parameters.schema import Parameter, Signature
from triptych.engines.parameters.serving_config import SERVING_CONFIG_NAME, ServingConfig
from triptych.engines.parameters.validation import ANY
from triptych.engines.stages import Stage
from triptych.roles.head.dispatch import POLICIES
from triptych.roles.head.job import Request
from triptych.roles.head.output import resolve_output
from triptych.roles.head.registry import InstanceRegistry
from triptych.roles.head.scheduler import JobScheduler
from triptych.roles.messages.common import Output
from triptych.roles.messages.requests import InstanceView, ModelDescription, PromptCacheView

WEIGHTS: Final = frozenset({".safetensors", ".gguf"})
_encoder: Final = msgspec.msgpack.Encoder(order="deterministic")


class ServedModel:
    """One model: what it takes, and the scheduler of its jobs.

    Args:
        model: Of the topology.
        scheduler: Of this model alone.
    """

    def __init__(self, model: Model, scheduler: JobScheduler) -> None:
        self.model = model
        self.scheduler = scheduler
        self.serving_config = ServingConfig()
        self.identity: ModelIdentity | None = None
        """None where its folder is not there, or was not looked at yet."""
        self.unavailable_reason = ""
        """Why no request can come to its end."""
        self.weight_file_bytes = 0
        """Size of its files of weights."""
        self._known = Signature()
        self._described: tuple[Signature, ServingConfig, ModelDescription] | None = None
        """The latest description, and what it was made of."""
        self._checked_config: ServingConfig | None = None

    @property
    def key(self) -> str:
        """What the journal calls it: its name in the topology, "" where that has none."""
        return self.model.name

    @property
    def name(self) -> str:
        """What requests give as `model`."""
        return self.model.name or self.serving_config.name

    @property
    def signature(self) -> Signature:
        """Of whichever instance has loaded it, or was the last to have: they load the same model."""
        found = (i.signature for i in self.scheduler.registry.instances.values() if i.signature.parameters)
        self._known = next(found, self._known)
        return self._known

    @property
    def has_been_loaded(self) -> bool:
        """Whether for every stage there is an instance that has loaded its weights, be they in memory now or not."""
        loaded = [i for i in self.scheduler.registry.instances.values() if i.awake or i.weights]
        return any(i.kind == "monolithic" for i in loaded) or all(any(i.serves(p) for i in loaded) for p in Stage)

    @property
    def parameters(self) -> tuple[Parameter, ...] | None:
        """What the pipeline takes; None until an instance has loaded it."""
        return self.signature.parameters or None

    @property
    def lora_names(self) -> list[str]:
        """Adapters that a request may ask for."""
        return [lora.name for lora in self.model.section.lora]

    def new_misspellings(self) -> list[str]:
        """Return a sentence for each misspelt name in the serving config, once per config and parameters known."""
        if self.parameters is None or self._checked_config is self.serving_config:
            return []
        self._checked_config = self.serving_config
        taken = [parameter.name for parameter in self.parameters]
        return self.serving_config.misspellings(taken, self.model.path / SERVING_CONFIG_NAME)

    def describe(self, created_at: float, state: str) -> ModelDescription:
        """Describe the model: what it is, what it takes and what it does at present."""
        return replace(self._description, created_at=created_at, state=state)

    @property
    def description_version(self) -> str:
        """The version of its description; another one as soon as the description differs."""
        return self._description.version

    @property
    def _description(self) -> ModelDescription:
        """The description without what changes while the model is served: its state."""
        signature, serving_config = self.signature, self.serving_config
        if self._described is None or self._described[:2] != (signature, serving_config):
            made = self._make_description(signature, serving_config)
            version = blake2b(_encoder.encode(made), digest_size=16).hexdigest()
            self._described = (signature, serving_config, replace(made, version=version))
        return self._described[2]

    def _make_description(self, signature: Signature, serving_config: ServingConfig) -> ModelDescription:
        parameters = [replace(item, default=serving_config.default(item)) for item in signature.parameters]
        return ModelDescription(
            name=self.name,
            family=serving_config.family,
            task=self._task(),
            dtype=self.model.section.dtype,
            created_at=0.0,
            defaults=dict(serving_config.defaults),
            ranges={
                item.name: limits for item in parameters if (limits := serving_config.limits(item)) not in ((), ANY)
            },
            parameters=tuple(parameters),
            medium=signature.medium,
            fps=resolve_output(Output(), signature, {}, serving_config.defaults).fps,
            tasks=signature.tasks,
        )

    def _task(self) -> str:
        tasks, named = self.signature.tasks, self.serving_config.task
        if tasks:
            return tasks[0].name if len(tasks) == 1 else "any"
        return named if isinstance(named, str) else "any"


class ServedModels:
    """All of them, in the order of the topology.

    Args:
        served: At least one.
        instances: Name of each instance, and the model that it serves.
    """

    def __init__(self, served: Iterable[ServedModel], instances: Mapping[str, ServedModel]) -> None:
        self.all = tuple(served)
        self._instances = dict(instances)

    @property
    def schedulers(self) -> tuple[JobScheduler, ...]:
        """Their schedulers."""
        return tuple(served.scheduler for served in self.all)

    def find(self, name: str) -> ServedModel | None:
        """Return the model that requests call `name`, the first for ""; None where there is none."""
        return next((served for served in self.all if name in ("", served.name)), None)

    def by_key(self, key: str) -> ServedModel | None:
        """Return the model that the journal calls `key`."""
        return next((served for served in self.all if served.key == key), None)

    def unknown(self, name: str) -> str:
        """Say that there is no model of that name, and which there are."""
        names = " and ".join(repr(served.name) for served in self.all)
        return f"the model {name!r} is not served here, {names} {'is' if len(self.all) == 1 else 'are'}"

    def of(self, instance: str) -> ServedModel | None:
        """Return the model that an instance serves; None for what is no instance of the topology."""
        return self._instances.get(instance)

    def scheduler_of(self, instance: str) -> JobScheduler:
        """Return the scheduler of an instance; raises KeyError for what is none of the topology."""
        return self._instances[instance].scheduler

    def model_for_resumed(self, request: Request) -> tuple[ServedModel, bool]:
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

    # -- of all their schedulers

    @property
    def jobs_count(self) -> int:
        """How many are active."""
        return sum(len(scheduler.jobs) for scheduler in self.schedulers)

    @property
    def requests(self) -> dict[str, Request]:
        """All that a scheduler has."""
        return {id_: request for scheduler in self.schedulers for id_, request in scheduler.requests.items()}

    def scheduler_holding(self, request_id: str) -> JobScheduler | None:
        """Return the scheduler that has a request."""
        return next((scheduler for scheduler in self.schedulers if request_id in scheduler.requests), None)

    def request(self, request_id: str) -> Request | None:
        """Return the request of that id, if a scheduler has it."""
        scheduler_holding = self.scheduler_holding(request_id)
        return scheduler_holding.requests[request_id] if scheduler_holding else None

    def request_of_key(self, key: str) -> Request | None:
        """Return the request of an idempotency key, if a scheduler has it."""
        return next((scheduler.by_key[key] for scheduler in self.schedulers if key in scheduler.by_key), None)

    def counts(self) -> dict[str, int]:
        """Active jobs by state."""
        counts: dict[str, int] = {}
        for scheduler in self.schedulers:
            for state, count in scheduler.counts().items():
                counts[state] = counts.get(state, 0) + count
        return counts

    def instance_views(self) -> tuple[InstanceView, ...]:
        """Return what clients may know of all instances."""
        return tuple(view for scheduler in self.schedulers for view in scheduler.instance_views())

    def make_room(self, pool: str, nbytes: int, now: float) -> None:
        """Free `nbytes` bytes of a pool that is full: cached outputs first, then those of models that are asleep."""
        wanted = nbytes
        for scheduler in self.schedulers:
            if wanted > 0:
                wanted -= scheduler.evict(pool, wanted)
        for scheduler in self.schedulers:
            if wanted > 0:
                scheduler.requeue_stored(pool, now)

    @property
    def completed(self) -> int:
        """Jobs that are done."""
        return sum(scheduler.tally.completed for scheduler in self.schedulers)

    @property
    def average_latency_s(self) -> float:
        """Of completed jobs; 0 before the first."""
        return sum(scheduler.tally.latency_s for scheduler in self.schedulers) / max(1, self.completed)

    def prompt_cache(self) -> PromptCacheView:
        """Sum their prompt caches up."""
        views = [scheduler.stored_outputs.cache.view() for scheduler in self.schedulers]
        return PromptCacheView(
            *(sum(getattr(view, name) for view in views) for name in PromptCacheView.__struct_fields__)
        )


def weight_file_bytes(places: Iterable[Path]) -> int:
    """Size of the weights in files and folders; raises OSError."""
    files = {file for place in places for file in (place.rglob("*") if place.is_dir() else (place,))}
    return sum(file.stat().st_size for file in files if file.suffix in WEIGHTS)


def served_models_of(topology: Topology) -> ServedModels:
    """Make the models of a topology, with empty schedulers."""
    served = {model.name: ServedModel(model, _scheduler(topology, model)) for model in topology.models}
    roles = [component for component in topology.components if component.slots]
    return ServedModels(served.values(), {component.name: served[component.model] for component in roles})


def _scheduler(topology: Topology, model: Model) -> JobScheduler:
    settings = topology.head
    return JobScheduler(
        POLICIES[settings.dispatch],
        max_pending=settings.max_pending,
        max_attempts=settings.max_attempts,
        waiting_timeout_s=settings.waiting_timeout_s,
        running_timeout_s=settings.running_timeout_s,
        heartbeat_timeout_s=topology.supervision.heartbeat_timeout_s,
        registry=InstanceRegistry({stage: _slots(topology.components, model, stage) for stage in Stage}),
    )


def _slots(components: Iterable[Component], model: Model, stage: Stage) -> int:
    return sum(c.slots for c in components if c.kind == stage.value and c.model == model.name)
