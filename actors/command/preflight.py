"""Check that this machine has what a topology needs, before anything starts."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from triptych.actors.errors import TopologyError
from triptych.actors.runtime.bus_keys import fix_unlisted, lists_keys
from triptych.api.keys import ApiKeysError, load_api_keys
from triptych.api.webhook_keys import load_webhook_keys
from triptych.engines.backends import DEFAULT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from triptych.actors.topology import Component, Model, Topology

_DEVICES: Final = ("nvidia[0-9]*", "nvidiactl", "kfd", "dxg")  # NVIDIA, AMD, and either of them under Windows


def preflight(topology: Topology, components: Sequence[Component], *, file: str = "") -> None:
    """Raise `TopologyError` for the first thing that this machine lacks to run `components`.

    `file` is the name of the topology in the error, by default its absolute path. Nothing large is imported, so the
    roles themselves check what only torch can tell.
    """
    file = file or str(topology.path)
    kinds = {component.kind for component in components}
    if kinds - {"api"}:
        for model in topology.models:
            _check_model(topology, model, file)
            _check_adapters(topology, model, file)
    if "api" in kinds:
        _check_keys(topology, file)
    _check_bus_keys(topology, file)
    if any(component.quantization != "none" for component in components) and not _is_installed("torchao"):
        fix = 'install it with pip install "triptych[quantization]", or use "none"'
        raise TopologyError(file, "[[roles]] quantization", "needs torchao, which is missing", fix)
    backend, engine = topology.backend, topology.engine
    if "pool" in kinds and backend.package and not _is_installed(backend.package):
        fix = f'install it with pip install "{backend.install}", or use engine = "{DEFAULT}"'
        problem = f"needs the {engine} engine, which is missing"
        raise TopologyError(file, f'[transfer] engine = "{engine}"', problem, fix)
    if topology.otel.endpoint and not _is_installed("opentelemetry.exporter.otlp.proto.http"):
        fix = 'install it with pip install "triptych[otel]"'
        raise TopologyError(file, "[otel] endpoint", "needs OpenTelemetry, which is missing", fix)
    if kinds - {"pool", "denoiser"}:
        _check_store(topology, file)
    for component in components:
        if component.on_gpu and not has_accelerator():
            fix = 'use device = "cpu", or run it on a machine with an accelerator'
            problem = f'= "{component.device}" for {component.name}, but this machine shows no such device'
            raise TopologyError(file, "[[roles]] device", problem, fix)


def has_accelerator(devices: Path = Path("/dev")) -> bool:
    """Return whether the folder `devices` shows an accelerator."""
    return any(True for pattern in _DEVICES for _ in devices.glob(pattern))


def _check_model(topology: Topology, model: Model, file: str) -> None:
    source, where = model.source, "[model]" if len(topology.models) == 1 else f'[[models]] "{model.name}"'
    if source.problem:
        written = getattr(model.section, source.key)
        key = f'{source.key} = "{written}"' if written and isinstance(written, str) else source.key
        raise TopologyError(file, f"{where} {key}", source.problem, source.fix)
    if any(path.suffix == ".gguf" for path in source.files) and not _is_installed("gguf"):
        fix = 'install it with pip install "triptych[gguf]"'
        raise TopologyError(file, f"{where} path", "needs the package gguf, which is missing", fix)


def _check_store(topology: Topology, file: str) -> None:
    where, folder = f'[store] url = "{topology.store.url}"', topology.store.folder
    if topology.store.url and folder is None and not _is_installed("s3fs"):
        raise TopologyError(file, where, "needs s3fs, which is missing", 'install it with pip install "triptych[s3]"')
    if folder is not None and not (folder.is_dir() and os.access(folder, os.R_OK | os.W_OK | os.X_OK)):
        fix = "mount the file system and make the folder, for the user of these processes"
        raise TopologyError(file, where, "is not a folder that this user can write to", fix)


def _check_adapters(topology: Topology, model: Model, file: str) -> None:
    loras = [("lora", key, getattr(lora, key)) for lora in model.section.lora for key in ("path", "path_2")]
    embeddings = [("embeddings", "path", embedding.path) for embedding in model.section.embeddings]
    for section, key, written in (*loras, *embeddings):
        path = model.absolute(written)
        table = f"[[model.{section}]]" if len(topology.models) == 1 else f'[[models.{section}]] of "{model.name}"'
        where = f'{table} {key} = "{written}"'
        if (key, written) == ("path_2", ""):
            continue
        if not path.exists():
            fix = "give a file or folder, relative to the topology file or absolute"
            raise TopologyError(file, where, f"does not exist ({path})", fix)
        if path.is_file() and path.suffix != ".safetensors":
            fix = "convert it: no other format is read, since those can run code"
            raise TopologyError(file, where, "is not a .safetensors file", fix)


def _check_keys(topology: Topology, file: str) -> None:
    for section, written, path, load in (
        ("api", topology.api.keys_file, topology.keys_path, load_api_keys),
        ("webhooks", topology.webhooks.keys_file, topology.webhook_keys_path, load_webhook_keys),
    ):
        try:
            if path is not None:
                load(path)
        except ApiKeysError as error:
            where = f'[{section}] keys_file = "{written}"'
            raise TopologyError(file, where, error.problem, error.fix) from error


def _check_bus_keys(topology: Topology, file: str) -> None:
    for host in topology.hosts if lists_keys(topology) else ():
        if not host.public_key:
            fix = fix_unlisted(topology, host.name)
            raise TopologyError(file, f'[[hosts]] "{host.name}"', "lacks the key public_key", fix)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # what it is a part of is missing
        return False
