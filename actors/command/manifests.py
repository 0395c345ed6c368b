"""`triptych manifests`: the objects of Kubernetes that run a topology."""

from __future__ import annotations

import importlib.metadata
import tempfile
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from triptych.actors.command._console import EXIT_BAD_TOPOLOGY, fail
from triptych.actors.command.check import TopologyFile
from triptych.actors.errors import TopologyError
from triptych.actors.placement.kubernetes import (
    ManifestOptions,
    as_yaml,
    cluster_topology,
    make_manifests,
    make_secrets,
)
from triptych.actors.topology import Topology, load_toml, load_topology

_DEFAULTS: Final = ManifestOptions(image="")


def manifests(
    file: TopologyFile,
    image: Annotated[
        str, typer.Option(help="Image of the pods; the Containerfile makes it. Default: triptych:VERSION.")
    ] = "",
    kind: Annotated[
        Literal["statefulset", "disaggregatedset"],
        typer.Option(help="What runs the pods; a DisaggregatedSet needs the controller of LeaderWorkerSet 0.9."),
    ] = _DEFAULTS.kind,
    name: Annotated[str, typer.Option(help="Start of the name of each object.")] = _DEFAULTS.name,
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Of the objects.", show_default=False)] = "",
    storage: Annotated[str, typer.Option(help="Volume of the head's host.")] = _DEFAULTS.storage,
    storage_class: Annotated[str, typer.Option(help="Its class; default: that of the cluster.")] = "",
    models_claim: Annotated[
        str, typer.Option(metavar="CLAIM", help="PersistentVolumeClaim with the models; default: in the image.")
    ] = "",
    models_path: Annotated[
        str, typer.Option(metavar="PATH", help="Where models are in the pods; relative paths are below it.")
    ] = _DEFAULTS.models_path,
    gpu_resource: Annotated[str, typer.Option(metavar="RESOURCE", help="What a GPU is called.")] = (
        _DEFAULTS.gpu_resource
    ),
    memory: Annotated[str, typer.Option(help='Of each pod, such as "64Gi".', show_default=False)] = "",
    cpu: Annotated[str, typer.Option(help='That each pod requests, such as "8".', show_default=False)] = "",
    secrets: Annotated[
        bool, typer.Option("--secrets", help="Print templates of the Secrets alone, to be filled in and applied once.")
    ] = False,
) -> None:
    """Print the objects of Kubernetes that run a topology: a pod for each of its hosts, and what they need.

    The addresses of the hosts become the names of Services. The GPUs of a pod are counted from the `device` of its
    roles. Exits with 2 and one sentence when the topology cannot run there.

    [bold]Examples[/]

    triptych manifests flux.toml --image registry.local/triptych:0.1.0 --models-claim models | kubectl apply -f -

    triptych manifests flux.toml --secrets > secrets.yaml

    triptych manifests flux.toml -n pictures --kind disaggregatedset --storage 100Gi --memory 64Gi
    """
    options = ManifestOptions(
        image=image or f"triptych:{importlib.metadata.version('triptych')}",
        kind=kind,
        name=name,
        namespace=namespace,
        storage=storage,
        storage_class=storage_class,
        models_claim=models_claim,
        models_path=models_path,
        gpu_resource=gpu_resource,
        memory=memory,
        cpu=cpu,
    )
    try:
        load_topology(file)  # so that an error is about the file as it is written
        text = cluster_topology(str(file), load_toml(file), options)
        topology = _load_text(text, file)
        objects = make_secrets(topology, options) if secrets else make_manifests(topology, text, options)
    except TopologyError as error:
        fail(str(error), EXIT_BAD_TOPOLOGY)
    again = "Fill them in and apply them once." if secrets else "To change them, change that file and run it again."
    print(as_yaml(objects, f"Made by `triptych manifests {file.name}`. {again}"), end="")


def _load_text(text: str, file: Path) -> Topology:
    """Return the topology of a text; an error names `file`."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, file.name)
        written.write_text(text, encoding="utf-8")
        try:
            return load_topology(written)
        except TopologyError as error:
            problem = f"{error.problem}, in the topology for the pods"
            raise TopologyError(str(file), error.key, problem, error.fix) from error
