"""Describe, reload, sleep and wake the served models, for clients and the command."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from triptych.actors import Component, Model, StartDelayedError, StartError, Topology
from triptych.actors.runtime.system_messages import ChildReport
from triptych.actors.topology import ModelIdentity
from triptych.bus import RefusedError
from triptych.engines.parameters.serving_config import load_serving_config
from triptych.engines.stages import ModelError
from triptych.engines.weights.model_version import model_version
from triptych.roles.head.availability import unavailable_reason
from triptych.roles.head.prompt_cache import PromptCache
from triptych.roles.head.residency import ResidencyManager
from triptych.roles.head.served_models import ServedModel, ServedModels, weight_file_bytes
from triptych.roles.messages import requests
from triptych.roles.messages.weights import ModelStatus, Reloading, SleepModel


class ModelManager:
    """Manages the files, weights and availability of the models of a topology.

    Args:
        topology: Has the models and the memory budgets.
        models: The served models.
    """

    def __init__(self, topology: Topology, models: ServedModels) -> None:
        self.residency = ResidencyManager(topology, models)
        self._topology = topology
        self._models = models
        self._created_at = time.time()

    async def read(self) -> None:
        """Read the serving config and the identity of each model.

        Raises:
            StartError: A model is broken.
            StartDelayedError: The folder of a model is missing.
        """
        for served in self._models.all:
            model = served.model
            try:
                served.serving_config = load_serving_config(model.path, model.section.task, model.title)
                served.identity = await asyncio.to_thread(_identity, model)
                served.weight_file_bytes = await asyncio.to_thread(weight_file_bytes, model.files)
            except (ModelError, OSError) as error:
                kind = StartError if model.path.is_dir() else StartDelayedError
                raise kind(str(error)) from error
            cached = f"{served.name}, {model.section.dtype}"
            served.scheduler.stored_outputs.cache = PromptCache(model.prompt_cache_bytes, cached)

    # -- descriptions

    def describe(self, name: str) -> requests.ModelDescription:
        """Describe a model; raises RefusedError if there is none of that name."""
        return self._describe(self._find(name))

    def describe_all(self) -> requests.ModelDescriptions:
        """Describe every model, in the order of the topology."""
        return requests.ModelDescriptions(tuple(self._describe(served) for served in self._models.all))

    def states(self) -> dict[str, str]:
        """Return the state of each model, by name."""
        return {served.name: self.residency.state(served).value for served in self._models.all}

    def _describe(self, served: ServedModel) -> requests.ModelDescription:
        return served.describe(self._created_at, self.residency.state(served).value)

    def _find(self, name: str) -> ServedModel:
        if served := self._models.find(name):
            return served
        raise RefusedError("model_not_found", self._models.unknown(name))

    # -- sleep and wake

    def sleep(self, message: SleepModel) -> ModelStatus:
        """Let a model sleep as soon as it is idle; raises RefusedError if its `sleep` is "never"."""
        served = self._find(message.model)
        if served.model.section.sleep == "never":
            raise RefusedError("never", f'{served.name} never sleeps: its `sleep` is "never"')
        if message.begins:
            self.residency.request_sleep(served)
        return self._status(served)

    def wake(self, name: str) -> ModelStatus:
        """Wake a model, as a request for it would."""
        served = self._find(name)
        self.residency.request_wake(served)
        return self._status(served)

    def status(self, name: str) -> ModelStatus:
        """Return whether a model is in memory, and the problems of its instances."""
        return self._status(self._find(name))

    def _status(self, served: ServedModel) -> ModelStatus:
        instances = served.scheduler.registry.instances.values()
        problems = "; ".join(f"{i.name}: {i.problem}" for i in instances if i.problem)
        weights = sum(i.weights for i in instances if i.awake)
        return ModelStatus(served.name, self.residency.state(served).value, weights, problems)

    # -- changed weights

    async def reload(self, name: str) -> Reloading:
        """Read the files of a model ("" for all) again, and use their weights for new jobs.

        Raises:
            RefusedError: There is no such model, its files cannot be read, or an instance would not restart.
        """
        chosen = [served for served in self._models.all if name in ("", served.name)]
        if not chosen:
            raise RefusedError("model_not_found", self._models.unknown(name))
        keys = {served.key for served in chosen}
        instances = [c for c in self._topology.components if c.slots and c.model in keys]
        once = [c.name for c in instances if c.restart != "permanent"]
        if once:
            raise RefusedError(
                "not_permanent", f'{", ".join(once)} would not restart: their `restart` is not "permanent"'
            )
        versions, stale, joined = list[str](), list[str](), 0
        for served in chosen:
            model = served.model
            try:
                serving_config = await asyncio.to_thread(
                    load_serving_config, model.path, model.section.task, model.title
                )
                version = await asyncio.to_thread(model_version, model.files, by_content=len(self._topology.hosts) > 1)
            except (ModelError, OSError) as error:
                raise RefusedError("model", str(error)) from error
            served.serving_config = serving_config
            versions.append(version)
            stale += served.scheduler.reload(version)
            joined += sum(instance.model == version for instance in served.scheduler.registry.instances.values())
        return Reloading(", ".join(versions), tuple(stale), joined, len(instances))

    # -- availability

    def missing(self, pools_missing: Iterable[str]) -> list[ServedModel]:
        """Return the models that lack an instance for a stage, or a pool."""
        pools = tuple(pools_missing)
        return [served for served in self._models.all if pools or served.scheduler.registry.missing_stages()]

    def update_availability(self, missing: Iterable[ServedModel], children: Iterable[ChildReport]) -> None:
        """Record for each model why no request can be completed, by the supervisors' reports."""
        missing, children = tuple(missing), tuple(children)
        for served in self._models.all:
            components = self._components_of(served)
            served.unavailable_reason = unavailable_reason(components, children) if served in missing else ""

    def _components_of(self, served: ServedModel) -> list[Component]:
        """Return the instances of a model, and the pools."""
        return [c for c in self._topology.components if c.kind == "pool" or (c.slots and c.model == served.key)]


def _identity(model: Model) -> ModelIdentity | None:
    """Return the digests of a model's folder. It reads files, so call it in a thread."""
    return model.identity
