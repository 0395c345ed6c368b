"""The objects of Kubernetes that run a topology, for `triptych manifests FILE`. Pure.

Each host of the topology becomes a set of one pod with one container, which runs `triptych up FILE --host NAME`: the
roles of a host share its memory, so they need one process namespace and one user. A Service without an address of its
own gives each pod the name that stands as `address` in the topology, whatever node it is on.
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
import tomli_w
import yaml

from triptych.actors.errors import TopologyError
from triptych.actors.placement.service_manager import STATUS_VARIABLE
from triptych.actors.runtime.bus_keys import HOST_VARIABLE
from triptych.actors.topology import HostSection, gpu_count, rebase_models, stop_bound_s

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from triptych.actors.topology import Topology

Manifest = dict[str, Any]
"""One object, as in YAML."""

MAX_NAME: Final = {"statefulset": 52, "disaggregatedset": 40}
"""Most characters of a set's name: labels of its pods, of 63 at most, have it and a few more."""
MAX_ROLES: Final = 10
"""Most roles of a DisaggregatedSet; it has two at least."""
USER: Final = 10001
"""User of the container, as in the Containerfile."""
DRAIN_FIRST_S: Final = 3
"""Seconds for which the head's pod goes on taking requests, until no Service leads to it any more."""
_STOP_MARGIN_S: Final = 10
_SILENT_S: Final = 30
"""Seconds after which a supervisor that has not touched its status file counts as hung."""
_NAME: Final = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_CONFIG_DIR: Final = PurePosixPath("/etc/triptych")
_STATE_MOUNT: Final = PurePosixPath("/var/lib/triptych")
_RUN_DIR: Final = PurePosixPath("/run/triptych")
_SECRETS_DIR: Final = PurePosixPath("/run/secrets/triptych")
_KEYS_DIR: Final = _RUN_DIR / "keys"
_STATUS_FILE: Final = _RUN_DIR / "status"
_TOPOLOGY: Final = "topology.toml"
_BUS_KEY: Final = "bus.key"
_API_KEYS: Final = "api.keys"
_WEBHOOK_KEYS: Final = "webhook.keys"
_TEMPLATE: Final = "REPLACE THIS"


class ManifestOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the topology does not say about the cluster."""

    image: str
    """Image of the container, made by the Containerfile."""
    name: str = "triptych"
    """Of the system: the start of every object's name."""
    namespace: str = ""
    """Of all objects; "" leaves it to `kubectl --namespace`."""
    kind: Literal["statefulset", "disaggregatedset"] = "statefulset"
    """What runs the pods."""
    storage: str = "20Gi"
    """Size of the volume of the head's host: its journal, images and uploads."""
    storage_class: str = ""
    """Of that volume; "" = the default of the cluster."""
    models_claim: str = ""
    """PersistentVolumeClaim with the models, which every pod mounts for reading; "" = they are in the image."""
    models_path: str = "/models"
    """Where the models are in the container; relative paths of models in the topology are below it."""
    gpu_resource: str = "nvidia.com/gpu"
    """What a GPU is called as a resource."""
    memory: str = ""
    """Memory of each pod, requested and at most; the buffer pool is part of it. "" = not said."""
    cpu: str = ""
    """Processors that each pod requests; "" = not said."""


def cluster_topology(file: str, tables: Mapping[str, Any], options: ManifestOptions) -> str:
    """Return the topology as the pods read it, as TOML.

    The hosts get the names of their Services as addresses, the API listens on the pod's address, keys come from
    Secrets, and relative paths of models lie below `options.models_path`.

    Args:
        file: What an error calls the topology.
        tables: The topology as it was read, valid.
        options: About the cluster.

    Raises:
        TopologyError: a host without a key, or a name that Kubernetes does not take.
    """
    changed = rebase_models(tables, Path(file).resolve().parent, Path(options.models_path))
    api, bus = changed.setdefault("api", {}), changed.setdefault("bus", {})
    api["host"] = "0.0.0.0"  # noqa: S104  of the pod; a policy and keys keep others out
    api["keys_file"] = str(_KEYS_DIR / _API_KEYS)
    api["allowed_hosts"] = list(dict.fromkeys([*api.get("allowed_hosts", ()), *_service_names(options)]))
    if "webhooks" in changed:
        changed["webhooks"]["keys_file"] = str(_KEYS_DIR / _WEBHOOK_KEYS)
    changed.get("state", {}).pop("path", None)  # TRIPTYCH_STATE_DIR
    changed.get("transfer", {}).pop("hostname", None)
    for host in changed.get("hosts", ()):
        name = f"{options.name}-{host['name']}"
        most = MAX_NAME[options.kind]
        if not _NAME.fullmatch(name) or len(name) > most:
            problem = f"leads to {name}, which is not a name of at most {most} letters, digits and -"
            raise TopologyError(file, f'[[hosts]] "{host["name"]}"', problem, "give it a shorter one, or use --name")
        if len(changed["hosts"]) > 1 and not host.get("public_key"):
            fix = f"run `triptych keys {file} --host {host['name']}`, and add the line that it prints"
            raise TopologyError(file, f'[[hosts]] "{host["name"]}"', "lacks the key public_key", fix)
        for key in ("ssh", "ssh_command", "ssh_folder", "transfer_address"):
            host.pop(key, None)
        host |= {"address": name, "bind": "*"}
    if len(changed.get("hosts", ())) > 1:
        bus["keys"] = str(_KEYS_DIR / _BUS_KEY)
    return tomli_w.dumps(changed)


def make_manifests(topology: Topology, text: str, options: ManifestOptions) -> list[Manifest]:
    """Return the objects that run a topology, in the order in which they are to be applied.

    Args:
        topology: Read from `text`.
        text: Made by `cluster_topology`.
        options: About the cluster.

    Raises:
        TopologyError: a DisaggregatedSet cannot have so few or so many hosts.
    """
    hosts = topology.hosts or (None,)
    pods = [_Pod(topology, host, text, options) for host in hosts]
    return [
        _object(options, "v1", "ConfigMap", f"{options.name}-topology") | {"data": {_TOPOLOGY: text}},
        *(_pod_service(pod) for pod in pods),
        _api_service(topology, options),
        *_policies(topology, options),
        _disruption_budget(options),
        *(_disaggregated_set(topology, pods) if options.kind == "disaggregatedset" else map(_stateful_set, pods)),
    ]


def make_secrets(topology: Topology, options: ManifestOptions) -> list[Manifest]:
    """Return templates of the Secrets that the pods mount: their values are to be replaced.

    They are not among `make_manifests`, so that applying those again leaves the keys alone.
    """
    bus = [(f"{options.name}-{host.name}-bus", (_BUS_KEY,)) for host in _hosts_with_keys(topology)]
    of_api = (_API_KEYS, _WEBHOOK_KEYS) if topology.webhooks.hosts else (_API_KEYS,)
    return [
        _object(options, "v1", "Secret", name) | {"type": "Opaque", "stringData": dict.fromkeys(keys, _TEMPLATE)}
        for name, keys in (*bus, (f"{options.name}-api", of_api))
    ]


def as_yaml(manifests: Iterable[Manifest], comment: str = "") -> str:
    """Return objects as one stream of YAML; texts of several lines stay readable."""
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, width=110, explicit_start=True)


class _Pod:
    """The pod of one host, and what its objects have in common."""

    def __init__(self, topology: Topology, host: HostSection | None, text: str, options: ManifestOptions) -> None:
        self.options = options
        self.host = host.name if host else ""
        self.name = f"{options.name}-{self.host}" if host else options.name
        self.service = self.name if host else f"{options.name}-pod"  # beside that of the API
        self.state_claim = f"{self.name}-state"
        self.is_head = self.host == topology.head_host
        self.components = topology.on_host(self.host) if host else topology.components
        self.labels = _labels(options) | {"triptych/host": self.host or "all"}
        self._topology = topology
        self._digest = hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def port(self) -> int:
        """A port that the pod listens on, for its Service."""
        return self._topology.supervisor_port(self.host) if self.host else self._topology.api.port

    @property
    def template(self) -> Manifest:
        """The pod itself."""
        return {
            "metadata": {
                "labels": self.labels | ({"triptych/api": "true"} if self.is_head else {}),
                "annotations": {"triptych/topology": self._digest},  # another topology is another pod
            },
            "spec": {
                "terminationGracePeriodSeconds": self._grace_s,
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,  # its variables would begin with TRIPTYCH_, as ours do
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": USER,
                    "runAsGroup": USER,
                    "fsGroup": USER,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "topologySpreadConstraints": [
                    {
                        "maxSkew": 1,
                        "topologyKey": "kubernetes.io/hostname",
                        "whenUnsatisfiable": "ScheduleAnyway",
                        "labelSelector": {"matchLabels": _labels(self.options)},
                    }
                ],
                "initContainers": [self._key_container],
                "containers": [self._container],
                "volumes": self._volumes,
            },
        }

    @property
    def claim(self) -> Manifest:
        """What the volume of the head's host is to be like."""
        resources = {"requests": {"storage": self.options.storage}}
        spec: Manifest = {"accessModes": ["ReadWriteOnce"], "resources": resources}
        if self.options.storage_class:
            spec["storageClassName"] = self.options.storage_class
        return spec

    @property
    def _grace_s(self) -> int:
        """Seconds from the deletion of the pod to SIGKILL."""
        bound_s = math.ceil(stop_bound_s(self._topology, self.host)) + _STOP_MARGIN_S
        return bound_s + (DRAIN_FIRST_S if self.is_head else 0)

    @property
    def _container(self) -> Manifest:
        command = ["triptych", "up", str(_CONFIG_DIR / _TOPOLOGY), *(["--host", self.host] if self.host else [])]
        container: Manifest = {
            "name": "triptych",
            "image": self.options.image,
            "command": command,
            "env": [
                {"name": "TRIPTYCH_STATE_DIR", "value": str(_STATE_MOUNT / "state")},
                *([{"name": HOST_VARIABLE, "value": self.host}] if self.host else []),  # for commands in the pod
                {"name": "XDG_RUNTIME_DIR", "value": str(_RUN_DIR)},
                {"name": STATUS_VARIABLE, "value": str(_STATUS_FILE)},
                {"name": "HOME", "value": "/tmp"},  # noqa: S108  of the container
            ],
            "ports": self._ports,
            "resources": self._resources,
            "securityContext": _CLOSED,
            "volumeMounts": self._mounts,
            **self._probes,
        }
        if self.is_head:
            container["lifecycle"] = {"preStop": {"exec": {"command": ["sleep", str(DRAIN_FIRST_S)]}}}
        return container

    @property
    def _key_container(self) -> Manifest:
        """Copies the keys, which are refused unless they belong to the user alone; a mounted Secret belongs to root."""
        return {
            "name": "keys",
            "image": self.options.image,
            "command": ["sh", "-c", f"umask 077 && mkdir -p {_KEYS_DIR} && cp {_SECRETS_DIR}/* {_KEYS_DIR}/"],
            "securityContext": _CLOSED,
            "volumeMounts": [
                {"name": "secrets", "mountPath": str(_SECRETS_DIR), "readOnly": True},
                {"name": "run", "mountPath": str(_RUN_DIR)},
            ],
        }

    @property
    def _ports(self) -> list[Manifest]:
        bus = [{"name": "bus", "containerPort": self.port}] if self.host else []
        http = [{"name": "http", "containerPort": self._topology.api.port}] if self.is_head else []
        return [*bus, *http]

    @property
    def _resources(self) -> Manifest:
        options, requests, limits = self.options, {}, {}
        if options.cpu:
            requests["cpu"] = options.cpu
        if options.memory:
            requests["memory"] = limits["memory"] = options.memory
        if count := gpu_count(self.components):
            limits[options.gpu_resource] = str(count)
        return {key: values for key, values in (("requests", requests), ("limits", limits)) if values}

    @property
    def _probes(self) -> Manifest:
        runs = f"test $(($(date +%s) - $(stat -c %Y {_STATUS_FILE}))) -lt {_SILENT_S}"
        ready: Manifest = {"exec": {"command": ["grep", "-q", "^ready", str(_STATUS_FILE)]}}
        if self.is_head:
            ready = {"httpGet": {"path": "/ready", "port": "http"}}
        return {
            "startupProbe": {
                "exec": {"command": ["test", "-e", str(_STATUS_FILE)]},
                "periodSeconds": 2,
                "failureThreshold": 60,
            },
            "livenessProbe": {"exec": {"command": ["sh", "-c", runs]}, "periodSeconds": 10, "timeoutSeconds": 5},
            "readinessProbe": ready | {"periodSeconds": 2, "timeoutSeconds": 5},
        }

    @property
    def _mounts(self) -> list[Manifest]:
        mounts: list[Manifest] = [
            {"name": "topology", "mountPath": str(_CONFIG_DIR), "readOnly": True},
            {"name": "state", "mountPath": str(_STATE_MOUNT)},
            {"name": "run", "mountPath": str(_RUN_DIR)},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108  of the container
        ]
        if self.options.models_claim:
            mounts.append({"name": "models", "mountPath": self.options.models_path, "readOnly": True})
        return mounts

    @property
    def _volumes(self) -> list[Manifest]:
        bus = [{"secret": {"name": f"{self.name}-bus"}}] if _hosts_with_keys(self._topology) else []
        api = [{"secret": {"name": f"{self.options.name}-api"}}] if self.is_head else []
        volumes: list[Manifest] = [
            {"name": "topology", "configMap": {"name": f"{self.options.name}-topology"}},
            {"name": "secrets", "projected": {"sources": [*bus, *api]}},
            {"name": "run", "emptyDir": {"medium": "Memory"}},
            {"name": "tmp", "emptyDir": {}},
        ]
        if not self.is_head:
            volumes.append({"name": "state", "emptyDir": {}})
        elif self.options.kind == "disaggregatedset":
            volumes.append({"name": "state", "persistentVolumeClaim": {"claimName": self.state_claim}})
        if self.options.models_claim:
            claim = {"claimName": self.options.models_claim, "readOnly": True}
            volumes.append({"name": "models", "persistentVolumeClaim": claim})
        return volumes


_CLOSED: Final[Manifest] = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def _hosts_with_keys(topology: Topology) -> tuple[HostSection, ...]:
    """Return the hosts that have a key of the bus: none of a single one, which reaches nobody."""
    return topology.hosts if len(topology.hosts) > 1 else ()


def _labels(options: ManifestOptions) -> dict[str, str]:
    return {"app.kubernetes.io/name": "triptych", "app.kubernetes.io/instance": options.name}


def _service_names(options: ManifestOptions) -> list[str]:
    """Return the names under which pods of the cluster reach the API."""
    name, space = options.name, options.namespace
    return [name, *((f"{name}.{space}", f"{name}.{space}.svc", f"{name}.{space}.svc.cluster.local") if space else ())]


def _object(options: ManifestOptions, version: str, kind: str, name: str) -> Manifest:
    metadata: Manifest = {"name": name, "labels": _labels(options)}
    if options.namespace:
        metadata["namespace"] = options.namespace
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _pod_service(pod: _Pod) -> Manifest:
    """Give the pod its name: before it is ready, too, since it becomes ready only once the others reach it."""
    return _object(pod.options, "v1", "Service", pod.service) | {
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": pod.labels,
            "ports": [{"name": "bus" if pod.host else "http", "port": pod.port}],
        }
    }


def _api_service(topology: Topology, options: ManifestOptions) -> Manifest:
    spec = {
        "selector": _labels(options) | {"triptych/api": "true"},
        "ports": [{"name": "http", "port": topology.api.port, "targetPort": "http"}],
    }
    return _object(options, "v1", "Service", options.name) | {"spec": spec}


def _policies(topology: Topology, options: ManifestOptions) -> list[Manifest]:
    """Let the pods reach each other's bus and pools, and everybody the API; nothing else reaches them."""
    ports = [{"protocol": "TCP", "port": first, "endPort": last} for first, last in _ranges(topology)]
    ingress = [{"from": [{"podSelector": {"matchLabels": _labels(options)}}], "ports": ports}] if ports else []
    http = [{"ports": [{"protocol": "TCP", "port": topology.api.port}]}]
    return [
        _policy(options, f"{options.name}-hosts", _labels(options), ingress),
        _policy(options, f"{options.name}-api", _labels(options) | {"triptych/api": "true"}, http),
    ]


def _policy(options: ManifestOptions, name: str, labels: Mapping[str, str], ingress: list[Manifest]) -> Manifest:
    spec = {"podSelector": {"matchLabels": dict(labels)}, "policyTypes": ["Ingress"], "ingress": ingress}
    return _object(options, "networking.k8s.io/v1", "NetworkPolicy", name) | {"spec": spec}


def _ranges(topology: Topology) -> list[tuple[int, int]]:
    """Return the ranges of ports that the hosts reach each other by: of the bus, and of each pool."""
    if not topology.hosts:
        return []
    bus = [component.port for component in topology.components if component.kind != "api"]
    bus += [topology.supervisor_port(host.name) for host in topology.hosts]
    pools = [topology.transfer_ports(host.name) for host in topology.hosts]
    return list(dict.fromkeys([(min(bus), max(bus)), *pools]))


def _disruption_budget(options: ManifestOptions) -> Manifest:
    """Have nodes drained one host at a time."""
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": _labels(options)}}
    return _object(options, "policy/v1", "PodDisruptionBudget", options.name) | {"spec": spec}


def _stateful_set(pod: _Pod) -> Manifest:
    spec: Manifest = {
        "serviceName": pod.service,
        "replicas": 1,
        "selector": {"matchLabels": pod.labels},
        "template": pod.template,
    }
    if pod.is_head:  # the claim outlives the set
        spec["persistentVolumeClaimRetentionPolicy"] = {"whenDeleted": "Retain", "whenScaled": "Retain"}
        claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "state"}, "spec": pod.claim}
        spec["volumeClaimTemplates"] = [claim]
    return _object(pod.options, "apps/v1", "StatefulSet", pod.name) | {"spec": spec}


def _disaggregated_set(topology: Topology, pods: Sequence[_Pod]) -> list[Manifest]:
    """Return the set, and the claim of the head's host: each new revision of a set has claims of its own."""
    options = pods[0].options
    if not 2 <= len(pods) <= MAX_ROLES:
        problem = f"are {len(topology.hosts)}, but a DisaggregatedSet has 2 to {MAX_ROLES} roles, one for each host"
        raise TopologyError(str(topology.path), "[[hosts]]", problem, "use --kind statefulset")
    roles = [
        {
            "name": pod.host,
            "spec": {
                "replicas": 1,
                # A host's name must never lead to two pods: the old one goes before the new one comes.
                "rolloutStrategy": {
                    "type": "RollingUpdate",
                    "rollingUpdateConfiguration": {"maxSurge": 0, "maxUnavailable": 1},
                },
                "leaderWorkerTemplate": {"size": 1, "restartPolicy": "None", "workerTemplate": pod.template},
            },
        }
        for pod in pods
    ]
    head = next(pod for pod in pods if pod.is_head)
    return [
        _object(options, "v1", "PersistentVolumeClaim", head.state_claim) | {"spec": head.claim},
        _object(options, "disaggregatedset.x-k8s.io/v1", "DisaggregatedSet", options.name) | {"spec": {"roles": roles}},
    ]


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, and a value that stands twice twice."""

    def ignore_aliases(self, data: object) -> bool:
        """Write no references: people and other tools read this."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
