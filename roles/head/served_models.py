"""The served models: each with its serving config and its scheduler, found by name, instance or request."""

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
    """One model: its parameters, and the scheduler of its jobs.

    Args:
        model: A model of the topology.
        scheduler: Its scheduler, which no other model shares.
    """

    def __init__(self, model: Model, scheduler: JobScheduler) -> None:
        self.model = model
        self.scheduler = scheduler
        self.serving_config = ServingConfig()
        self.identity: ModelIdentity | None = None
        """None if its folder is missing, or was not read yet."""
        self.unavailable_reason = ""
        """Why no request for it can be completed; "" if one can."""
        self.weight_file_bytes = 0
        """Bytes of its weight files."""
        self._known = Signature()
        self._described: tuple[Signature, ServingConfig, ModelDescription] | None = None
        """The latest description, and the signature and serving config that it was made from."""
        self._checked_config: ServingConfig | None = None

    @property
    def key(self) -> str:
        """Return its name in the journal: that in the topology, "" if it has none there."""
        return self.model.name

    @property
    def name(self) -> str:
        """Return its name in requests."""
        return self.model.name or self.serving_config.name

    @property
    def signature(self) -> Signature:
        """Return the signature of an instance that has loaded it, else the last one known; all load the same model."""
        found = (i.signature for i in self.scheduler.registry.instances.values() if i.signature.parameters)
        self._known = next(found, self._known)
        return self._known

    @property
    def has_been_loaded(self) -> bool:
        """Return whether every stage has an instance that has loaded its weights, even if it is asleep now."""
        loaded = [i for i in self.scheduler.registry.instances.values() if i.awake or i.weights]
        return any(i.kind == "monolithic" for i in loaded) or all(any(i.serves(p) for i in loaded) for p in Stage)

    @property
    def parameters(self) -> tuple[Parameter, ...] | None:
        """Return the parameters of the pipeline; None until an instance has loaded it."""
        return self.signature.parameters or None

    @property
    def lora_names(self) -> list[str]:
        """Return the names of the LoRA adapters that a request may ask for."""
        return [lora.name for lora in self.model.section.lora]

    def new_misspellings(self) -> list[str]:
        """Return a sentence for each misspelt name in the serving config, once for each config."""
        if self.parameters is None or self._checked_config is self.serving_config:
            return []
        self._checked_config = self.serving_config
        taken = [parameter.name for parameter in self.parameters]
        return self.serving_config.misspellings(taken, self.model.path / SERVING_CONFIG_NAME)

    def describe(self, created_at: float, state: str) -> ModelDescription:
        """Return the description of the model, with its state."""
        return replace(self._description, created_at=created_at, state=state)

    @property
    def description_version(self) -> str:
        """Return the version of its description, which changes with the description."""
        return self._description.version

    @property
    def _description(self) -> ModelDescription:
        """Return the description without its state and creation time."""
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
    """All served models, in the order of the topology.

    Args:
        served: At least one model.
        instances: The model of each instance, by name of the instance.
    """

    def __init__(self, served: Iterable[ServedModel], instances: Mapping[str, ServedModel]) -> None:
        self.all = tuple(served)
        self._instances = dict(instances)

    @property
    def schedulers(self) -> tuple[JobScheduler, ...]:
        """Return the schedulers of all models."""
        return tuple(served.scheduler for served in self.all)

    def find(self, name: str) -> ServedModel | None:
        """Return the model that requests call `name`, the first for ""; None if there is none."""
        return next((served for served in self.all if name in ("", served.name)), None)

    def by_key(self, key: str) -> ServedModel | None:
        """Return the model that the journal calls `key`, or None."""
        return next((served for served in self.all if served.key == key), None)

    def unknown(self, name: str) -> str:
        """Return a sentence that there is no model of that name, and which ones there are."""
        names = " and ".join(repr(served.name) for served in self.all)
        return f"the model {name!r} is not served here, {names} {'is' if len(self.all) == 1 else 'are'}"

    def of(self, instance: str) -> ServedModel | None:
        """Return the model that an instance serves; None if the topology has no such instance."""
        return self._instances.get(instance)

    def scheduler_of(self, instance: str) -> JobScheduler:
        """Return the scheduler of an instance; raises KeyError if the topology has no such instance."""
        return self._instances[instance].scheduler

    def model_for_resumed(self, request: Request) -> tuple[ServedModel, bool]:
        """Return the model for a request of an earlier head, and whether it is the one that accepted the request.

        It is the model of the same name, unless that name now belongs to another model; else the model with the same
        identity, whatever its name is now.
        """
        was, named = request.served, self.by_key(request.model)
        if not (was or request.model):  # an earlier version recorded no model, and served only one
            return self.all[0], True
        if named and not (was and named.identity and not was.is_same(named.identity)):
            return named, True
        same = next((served for served in self.all if was and served.identity and was.is_same(served.identity)), None)
        return (same, True) if same else (named or self.all[0], False)

    # -- of all their schedulers

    @property
    def jobs_count(self) -> int:
        """Return the number of active jobs."""
        return sum(len(scheduler.jobs) for scheduler in self.schedulers)

    @property
    def requests(self) -> dict[str, Request]:
        """Return the requests of all schedulers, by id."""
        return {id_: request for scheduler in self.schedulers for id_, request in scheduler.requests.items()}

    def scheduler_of_request(self, request_id: str) -> JobScheduler | None:
        """Return the scheduler that has a request, or None."""
        return next((scheduler for scheduler in self.schedulers if request_id in scheduler.requests), None)

    def request(self, request_id: str) -> Request | None:
        """Return the request of that id if a scheduler has it, else None."""
        scheduler = self.scheduler_of_request(request_id)
        return scheduler.requests[request_id] if scheduler else None

    def request_of_key(self, key: str) -> Request | None:
        """Return the request of an idempotency key if a scheduler has it, else None."""
        return next((scheduler.by_key[key] for scheduler in self.schedulers if key in scheduler.by_key), None)

    def counts(self) -> dict[str, int]:
        """Return the number of active jobs by state."""
        counts: dict[str, int] = {}
        for scheduler in self.schedulers:
            for state, count in scheduler.counts().items():
                counts[state] = counts.get(state, 0) + count
        return counts

    def instance_views(self) -> tuple[InstanceView, ...]:
        """Return what clients may see of all instances."""
        return tuple(view for scheduler in self.schedulers for view in scheduler.instance_views())

    def evict_checkpoints(self, pool: str, nbytes: int) -> None:
        """Release checkpoints of `nbytes` bytes in a full pool."""
        for scheduler in self.schedulers:
            if nbytes > 0:
                nbytes -= scheduler.evict_checkpoints(pool, nbytes)

    def make_room(self, pool: str, nbytes: int, now: float) -> None:
        """Free `nbytes` bytes of a full pool: cached outputs first, then stored outputs of models that are asleep."""
        wanted = nbytes
        for scheduler in self.schedulers:
            if wanted > 0:
                wanted -= scheduler.evict(pool, wanted)
        for scheduler in self.schedulers:
            if wanted > 0:
                scheduler.requeue_stored(pool, now)

    @property
    def completed(self) -> int:
        """Return the number of completed jobs."""
        return sum(scheduler.tally.completed for scheduler in self.schedulers)

    @property
    def average_latency_s(self) -> float:
        """Return the average latency of completed jobs; 0 before the first."""
        return sum(scheduler.tally.latency_s for scheduler in self.schedulers) / max(1, self.completed)

    def prompt_cache(self) -> PromptCacheView:
        """Return the sums over all prompt caches."""
        views = [scheduler.stored_outputs.cache.view() for scheduler in self.schedulers]
        return PromptCacheView(
            *(sum(getattr(view, name) for view in views) for name in PromptCacheView.__struct_fields__)
        )


def weight_file_bytes(paths: Iterable[Path]) -> int:
    """Return the bytes of the weight files among `paths` and in its folders; raises OSError."""
    files = {file for path in paths for file in (path.rglob("*") if path.is_dir() else (path,))}
    return sum(file.stat().st_size for file in files if file.suffix in WEIGHTS)


def served_models_of(topology: Topology) -> ServedModels:
    """Return the models of a topology, with empty schedulers."""
    served = {model.name: ServedModel(model, _scheduler(topology, model)) for model in topology.models}
    roles = [component for component in topology.components if component.slots]
    return ServedModels(served.values(), {component.name: served[component.model] for component in roles})


def _scheduler(topology: Topology, model: Model) -> JobScheduler:
    settings = topology.head
    return JobScheduler(
        POLICIES[settings.dispatch],
        settings.policy,
        max_attempts=settings.max_attempts,
        waiting_timeout_s=settings.waiting_timeout_s,
        running_timeout_s=settings.running_timeout_s,
        heartbeat_timeout_s=topology.supervision.heartbeat_timeout_s,
        preempt=settings.preempt,
        registry=InstanceRegistry({stage: _slots(topology.components, model, stage) for stage in Stage}),
    )


def _slots(components: Iterable[Component], model: Model, stage: Stage) -> int:
    return sum(c.slots for c in components if c.kind == stage.value and c.model == model.name)
