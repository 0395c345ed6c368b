"""The manifests are what the published schemas say, and fit together; faults planted in them are found."""

from __future__ import annotations

import copy
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from tests.actors.placement import published
from triptych.actors import load_topology
from triptych.actors.command import app

Manifest = dict[str, Any]
KINDS = ("statefulset", "disaggregatedset")
THREE = """
[model]
path = "flux"
[head]
host = "a"
[supervision]
shutdown_s = 20
[transfer]
trusted_network = true
[[hosts]]
name = "a"
address = "10.0.0.1"
public_key = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
[[hosts]]
name = "b"
address = "10.0.0.2"
public_key = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
transfer_ports = "22000-22031"
ssh = "somebody@b"
[[hosts]]
name = "c"
address = "10.0.0.3"
public_key = "cccccccccccccccccccccccccccccccccccccccc"
[[roles]]
kind = "encoder"
host = "a"
device = "cuda:1"
[[roles]]
kind = "denoiser"
hosts = ["b", "c"]
count = 4
device = "cuda"
[[roles]]
kind = "decoder"
host = "c"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "flux").mkdir()
    path = tmp_path / "three.toml"
    path.write_text(THREE)
    return path


def made(file: Path, *options: str) -> list[Manifest]:
    showing = CliRunner().invoke(app, ["manifests", str(file), *options])
    assert showing.exit_code == 0, showing.output
    return list(yaml.safe_load_all(showing.stdout))


def named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    return next(each for each in manifests if (each["kind"], each["metadata"]["name"]) == (kind, name))


def pods(manifests: list[Manifest]) -> list[Manifest]:
    """The templates of all pods."""
    sets = [each["spec"]["template"] for each in manifests if each["kind"] == "StatefulSet"]
    for each in manifests:
        if each["kind"] == "DisaggregatedSet":
            sets += [role["spec"]["leaderWorkerTemplate"]["workerTemplate"] for role in each["spec"]["roles"]]
    return sets


def faults(manifests: list[Manifest], secrets: list[Manifest]) -> list[str]:
    """What a schema cannot tell: ports, names, and whether what an object names is there."""
    found = [f"{name} is no name" for name in map(_name, manifests) if not re.fullmatch(r"[a-z][a-z0-9-]{0,62}", name)]
    found += [f"{port} is no port" for port in _ports(manifests) if not 0 < port < 65536]
    templates = pods(manifests)
    for manifest in manifests:
        for selector in _selectors(manifest):
            if not selector or not any(_selects(selector, pod) for pod in templates):
                found.append(f"{_name(manifest)} selects no pod")
    there = {(each["kind"], _name(each)) for each in (*manifests, *secrets)}
    for pod in templates:
        spec = pod["spec"]
        claims = {claim["metadata"]["name"] for claim in _claims(manifests, pod)}
        volumes = {volume["name"] for volume in spec["volumes"]} | claims
        containers = [*spec["initContainers"], *spec["containers"]]
        mounts = [mount["name"] for container in containers for mount in container["volumeMounts"]]
        found += [f"{name} is mounted and no volume" for name in mounts if name not in volumes]
        found += [f"{what} is not there" for what in _mentioned(spec["volumes"]) if what not in there]
        ports = {port["name"] for container in containers for port in container.get("ports", ())}
        for container in spec["containers"]:
            named_port = container["readinessProbe"].get("httpGet", {}).get("port")
            found += [f"{named_port} is no port of the pod"] if named_port and named_port not in ports else []
    return found


def _name(manifest: Manifest) -> str:
    return str(manifest["metadata"]["name"])


def _ports(value: Any) -> list[int]:
    if isinstance(value, dict):
        own = [value[key] for key in ("port", "containerPort", "endPort") if isinstance(value.get(key), int)]
        return own + [port for each in value.values() for port in _ports(each)]
    return [port for each in value for port in _ports(each)] if isinstance(value, list) else []


def _selectors(manifest: Manifest) -> list[dict[str, str]]:
    spec = manifest.get("spec", {})
    match manifest["kind"]:
        case "Service":
            return [spec["selector"]]
        case "NetworkPolicy":
            peers = [peer["podSelector"] for rule in spec["ingress"] for peer in rule.get("from", ())]
            return [selector["matchLabels"] for selector in (spec["podSelector"], *peers)]
        case "StatefulSet" | "PodDisruptionBudget":
            return [spec["selector"]["matchLabels"]]
    return []


def _selects(selector: dict[str, str], pod: Manifest) -> bool:
    return selector.items() <= pod["metadata"]["labels"].items()


def _claims(manifests: list[Manifest], pod: Manifest) -> list[Manifest]:
    sets = [each["spec"] for each in manifests if each["kind"] == "StatefulSet"]
    return [claim for each in sets if each["template"] == pod for claim in each.get("volumeClaimTemplates", ())]


def _mentioned(volumes: list[Manifest]) -> list[tuple[str, str]]:
    found = [("ConfigMap", volume["configMap"]["name"]) for volume in volumes if "configMap" in volume]
    for volume in volumes:
        sources = volume.get("projected", {}).get("sources", ())
        found += [("Secret", source["secret"]["name"]) for source in sources]
        claim = volume.get("persistentVolumeClaim", {}).get("claimName", "models")
        found += [("PersistentVolumeClaim", claim)] if claim != "models" else []
    return found


@pytest.mark.parametrize(
    "options", [(), ("-n", "pictures", "--models-claim", "models", "--memory", "8Gi", "--cpu", "2")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_manifests_are_as_published_and_fit_together(file: Path, kind: str, options: tuple[str, ...]) -> None:
    manifests = made(file, "--kind", kind, *options)
    secrets = made(file, "--secrets", *options)
    for manifest in (*manifests, *secrets):
        published.check_object(manifest)
    assert faults(manifests, secrets) == []
    assert len(pods(manifests)) == 3


def _edit(manifests: list[Manifest], change: Callable[[Manifest], object], kind: str, name: str) -> None:
    change(named(manifests, kind, name))


def _container(manifest: Manifest) -> Manifest:
    container: Manifest = manifest["spec"]["template"]["spec"]["containers"][0]
    return container


PLANTED: dict[str, Callable[[list[Manifest]], object]] = {
    "a misspelt key": lambda all_: _container(named(all_, "StatefulSet", "triptych-b")).update(livenesProbe={}),
    "a wrong type": lambda all_: named(all_, "StatefulSet", "triptych-b")["spec"].update(replicas="one"),
    "no selector": lambda all_: named(all_, "StatefulSet", "triptych-b")["spec"].pop("selector"),
    "an unknown kind": lambda all_: named(all_, "StatefulSet", "triptych-b").update(kind="StatefullSet"),
    "an environment that is no list": lambda all_: _container(named(all_, "StatefulSet", "triptych-a")).update(env={}),
    "no namespace of the network policy's port": lambda all_: named(all_, "NetworkPolicy", "triptych-hosts")[
        "spec"
    ].update(ports=[]),
    "a port outside the range": lambda all_: named(all_, "Service", "triptych")["spec"]["ports"][0].update(port=70000),
    "a selector of nobody": lambda all_: named(all_, "Service", "triptych-b")["spec"]["selector"].update(x="y"),
    "labels that the set does not select": lambda all_: named(all_, "StatefulSet", "triptych-c")["spec"]["template"][
        "metadata"
    ].update(labels={}),
    "no volume of a mount": lambda all_: named(all_, "StatefulSet", "triptych-a")["spec"].pop("volumeClaimTemplates"),
    "no topology": lambda all_: all_.remove(named(all_, "ConfigMap", "triptych-topology")),
    "a probe of no port": lambda all_: _container(named(all_, "StatefulSet", "triptych-a")).update(ports=[]),
}


def check(manifests: list[Manifest], secrets: list[Manifest]) -> None:
    for manifest in manifests:
        published.check_object(manifest)
    if found := faults(manifests, secrets):
        raise jsonschema.ValidationError(found[0])


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(file: Path, fault: str) -> None:
    manifests = copy.deepcopy(made(file))
    secrets = made(file, "--secrets")
    check(manifests, secrets)
    PLANTED[fault](manifests)
    with pytest.raises(jsonschema.ValidationError):
        check(manifests, secrets)


@pytest.mark.parametrize(
    "plant",
    [
        lambda role: role.update(replica=2),
        lambda role: role["spec"].pop("leaderWorkerTemplate"),
        lambda role: role.update(name="B"),
        lambda role: role["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"].update(contaners=[]),
        lambda role: role["spec"]["leaderWorkerTemplate"].update(restartPolicy="Never"),
    ],
    ids=["a misspelt key", "no template", "a name", "a key of the pod", "a value"],
)
def test_planted_faults_of_a_disaggregated_set_are_found(file: Path, plant: Callable[[Manifest], object]) -> None:
    manifest = named(made(file, "--kind", "disaggregatedset"), "DisaggregatedSet", "triptych")
    published.check_object(manifest)
    plant(manifest["spec"]["roles"][1])
    with pytest.raises(jsonschema.ValidationError):
        published.check_object(manifest)


def test_pods_read_a_topology_whose_addresses_are_their_services(file: Path, tmp_path: Path) -> None:
    manifests = made(file)
    written = tmp_path / "pods.toml"
    written.write_text(named(manifests, "ConfigMap", "triptych-topology")["data"]["topology.toml"])
    topology = load_topology(written)
    assert [host.address for host in topology.hosts] == ["triptych-a", "triptych-b", "triptych-c"]
    assert {host.bind for host in topology.hosts} == {"*"}
    assert (topology.api.host, topology.api.keys_file) == ("0.0.0.0", "/run/triptych/keys/api.keys")
    assert str(topology.models[0].path) == "/models/flux"
    for host in topology.hosts:
        service = named(manifests, "Service", host.address)["spec"]
        assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)


def test_the_secret_that_signs_webhooks_lies_beside_the_keys_of_the_api(file: Path, tmp_path: Path) -> None:
    file.write_text('[webhooks]\nhosts = ["a.example"]\nkeys_file = "mine"\n' + THREE)
    written = tmp_path / "pods.toml"
    written.write_text(named(made(file), "ConfigMap", "triptych-topology")["data"]["topology.toml"])
    assert load_topology(written).webhooks.keys_file == "/run/triptych/keys/webhook.keys"
    secret = named(made(file, "--secrets"), "Secret", "triptych-api")
    assert secret["stringData"].keys() == {"api.keys", "webhook.keys"}


def test_a_pod_has_the_gpus_the_time_and_the_command_of_its_host(file: Path) -> None:
    manifests = made(file)
    a, b, c = (named(manifests, "StatefulSet", f"triptych-{host}")["spec"]["template"]["spec"] for host in "abc")
    gpus = [pod["containers"][0]["resources"].get("limits", {}).get("nvidia.com/gpu") for pod in (a, b, c)]
    assert gpus == ["2", "4", "4"]
    assert b["containers"][0]["command"] == ["triptych", "up", "/etc/triptych/topology.toml", "--host", "b"]
    # Kinds of components stop one after the other: pool and denoisers, and on the head's host four.
    assert (b["terminationGracePeriodSeconds"], a["terminationGracePeriodSeconds"]) == (2 * 20 + 10, 4 * 20 + 10 + 3)
    assert "volumeClaimTemplates" not in named(manifests, "StatefulSet", "triptych-b")["spec"]


def test_probes_tell_a_supervisor_that_waits_from_one_that_hangs(file: Path, tmp_path: Path) -> None:
    container = _container(named(made(file), "StatefulSet", "triptych-b"))
    status = tmp_path / "status"

    def succeed() -> list[bool]:
        probes = ("startupProbe", "livenessProbe", "readinessProbe")
        commands = [container[probe]["exec"]["command"] for probe in probes]
        here = [[word.replace("/run/triptych/status", str(status)) for word in command] for command in commands]
        return [not subprocess.run(command, capture_output=True, check=False).returncode for command in here]

    assert succeed() == [False, False, False]
    status.write_text("waiting: denoiser-0 loading\n")
    assert succeed() == [True, True, False]
    status.write_text("ready: pool-b, denoiser-0\n")
    assert succeed() == [True, True, True]
    os.utime(status, (0, 0))
    assert succeed() == [True, False, True]


def test_the_bus_is_open_to_the_pods_alone_and_the_api_to_all(file: Path) -> None:
    manifests = made(file)
    (inside,) = named(manifests, "NetworkPolicy", "triptych-hosts")["spec"]["ingress"]
    (outside,) = named(manifests, "NetworkPolicy", "triptych-api")["spec"]["ingress"]
    ranges = [(port["port"], port["endPort"]) for port in inside["ports"]]
    topology = load_topology(file)
    bus = {component.port for component in topology.components} | {topology.supervisor_port("c")}
    assert ranges[1:] == [(21000, 21015), (22000, 22031), (21032, 21047)]
    assert ranges[0] == (min(bus), max(bus))
    assert inside["from"]
    assert outside == {"ports": [{"protocol": "TCP", "port": 8000}]}


def test_a_topology_without_hosts_is_one_pod(file: Path) -> None:
    file.write_text('[model]\npath = "flux"\n[[roles]]\nkind = "monolithic"\ndevice = "cuda:0"\n')
    manifests, secrets = made(file), made(file, "--secrets")
    check(manifests, secrets)
    (pod,) = pods(manifests)
    assert pod["spec"]["containers"][0]["command"] == ["triptych", "up", "/etc/triptych/topology.toml"]
    assert [_name(secret) for secret in secrets] == ["triptych-api"]


def test_a_single_host_needs_no_key_of_the_bus(file: Path) -> None:
    file.write_text('[model]\npath = "flux"\n[[hosts]]\nname = "a"\naddress = "a"\n[[roles]]\nkind = "monolithic"\n')
    manifests, secrets = made(file), made(file, "--secrets")
    check(manifests, secrets)
    assert [_name(secret) for secret in secrets] == ["triptych-api"]


def test_a_host_without_a_key_is_refused(file: Path) -> None:
    file.write_text(THREE.replace("public_key", "# public_key"))
    showing = CliRunner().invoke(app, ["manifests", str(file)])
    said = showing.output.replace("\n", "")
    assert (showing.exit_code, '"a" lacks the key public_key: run `triptych keys' in said) == (2, True)


def test_a_changed_topology_is_another_pod(file: Path) -> None:
    before = pods(made(file))
    file.write_text(THREE.replace("shutdown_s = 20", "shutdown_s = 20\nintensity = 6"))
    assert [pod["metadata"]["annotations"] for pod in pods(made(file))] != [
        p["metadata"]["annotations"] for p in before
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--name", "T"), '[[hosts]] "a" leads to T-a, which is not a name'),
        (("--name", "t" * 60), "of at most 52 letters"),
        (("--kind", "disaggregatedset", "--name", "t" * 39), "of at most 40 letters"),
    ],
)
def test_what_kubernetes_does_not_take_is_refused(file: Path, options: tuple[str, ...], said: str) -> None:
    showing = CliRunner().invoke(app, ["manifests", str(file), *options])
    assert showing.exit_code == 2
    assert said in showing.output.replace("\n", "")


def test_a_disaggregated_set_of_one_host_is_refused(file: Path) -> None:
    file.write_text('[model]\npath = "flux"\n[[roles]]\nkind = "monolithic"\n')
    showing = CliRunner().invoke(app, ["manifests", str(file), "--kind", "disaggregatedset"])
    assert (showing.exit_code, "2 to 10 roles" in showing.output) == (2, True)
