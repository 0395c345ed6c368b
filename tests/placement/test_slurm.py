"""`examples/slurm.sh` under a real slurmctld and a slurmd on each of three hosts that are namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.placement.conftest import ROOT, Machine, until
from triptych.bus import CurveKeys
from triptych.tools.hosts import DISK, Hosts

pytestmark = [pytest.mark.placement, pytest.mark.timeout(500)]
READY_S = 240
NAMES = ("a", "b", "c")
CONF = """
ClusterName=test
SlurmctldHost=a({a})
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
AuthInfo=cred_expire=30
CredType=cred/none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/linear
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=5
KillWait=10
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/ctld.pid
SlurmdPidFile=/run/slurm/d.pid
SlurmctldLogFile=/run/slurm/ctld.log
SlurmdLogFile=/run/slurm/d.log
JobAcctGatherType=jobacct_gather/none
NodeName=a NodeAddr={a} CPUs=1
NodeName=b NodeAddr={b} CPUs=1
NodeName=c NodeAddr={c} CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
"""
GENERATE = """
import json, sys, urllib.request
body = json.dumps({"prompt": "a large red circle on the left of a blue background", "seed": 7}).encode()
headers = {"Content-Type": "application/json"}
request = urllib.request.Request(sys.argv[1] + "/v1/images/generations", body, headers)
print(json.load(urllib.request.urlopen(request, timeout=60))["data"][0]["b64_json"])
"""
GET = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"


class Slurm:
    """A cluster of the hosts a, b and c."""

    def __init__(self, hosts: Hosts, machine: Machine) -> None:
        self.hosts = hosts
        self.machine = machine

    def run(self, *command: str, host: str = "a") -> str:
        return self.hosts.run(host, *command).strip()

    def shown(self, *command: str) -> str:
        """What a command on the first host shows, "" if it fails."""
        line = self.hosts.command("a", *command)
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        return "" if done.returncode else done.stdout.strip()

    def get(self, path: str) -> str:
        return self.shown(sys.executable, "-I", "-c", GET, f"{self.machine.url}{path}")

    def image(self) -> str:
        return self.run(sys.executable, "-I", "-c", GENERATE, self.machine.url)

    def nodes(self) -> str:
        """Such as "a idle, b idle, c down*"."""
        return ", ".join(sorted(self.shown("sinfo", "-h", "-N", "-o", "%N %t").splitlines()))

    def supervisors(self, host: str) -> list[str]:
        lines = self.run("ps", "-eo", "pid=,args=", host=host).splitlines()
        return [line.split()[0] for line in lines if "triptych: supervisor" in line]

    def log(self, host: str) -> str:
        """The end of what a host has written; it lies on the disk of its node."""
        return self.run("tail", "-n", "20", f"{DISK}/triptych-{host}.log", host=host)

    def is_whole(self) -> bool:
        """Whether every stage is served, and no component is down."""
        found = self.get("/v1/cluster")
        return "denoiser-0" in found and "second-0" in found and '"down"' not in found and bool(self.get("/ready"))


@pytest.fixture
def slurm(machine: Machine) -> Iterator[Slurm]:
    if os.geteuid() != 0:
        pytest.skip("slurmd wants to be root")
    conf = machine.folder / "slurm.conf"
    environment = {
        "SLURM_CONF": str(conf),
        "PYTHONPATH": str(ROOT),
        "TRIPTYCH": str(machine.folder / "triptych"),
        "OMP_NUM_THREADS": "1",
    }
    with Hosts(NAMES, shared=[machine.folder], environment=environment) as hosts:
        conf.write_text(CONF.format(**{name: hosts.address(name) for name in NAMES}))
        for name in NAMES:
            hosts.run(name, "mkdir", "-p", "/run/slurm/state", "/run/slurm/spool")
        hosts.popen("a", "slurmctld", "-D", "-c", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name in NAMES:
            hosts.popen(name, "slurmd", "-D", "-N", name, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        made = Slurm(hosts, machine)
        until(lambda: made.nodes() == "a idle, b idle, c idle", 60)
        yield made


def topology(machine: Machine, hosts: Hosts) -> Path:
    """Three hosts with keys, and a program that Slurm starts as `triptych`."""
    program = machine.folder / "triptych"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m triptych.actors.command "$@"\n')
    program.chmod(0o755)
    addresses = {name: hosts.address(name) for name in NAMES}
    sections = f'[bus]\nkeys = "{machine.folder}/{{host}}.key"\n[supervision]\nshutdown_s = 4\n'
    file = machine.topology(addresses, sections=sections)
    text = file.read_text()
    for name, address in addresses.items():
        keys = CurveKeys.new()
        secret = machine.folder / f"{name}.key"
        secret.touch(0o600)
        secret.write_text(keys.secret.decode())
        line = f'address = "{address}"\n'
        text = text.replace(line, f'{line}public_key = "{keys.public.decode()}"\n')
    file.write_text(text + '[[roles]]\nkind = "denoiser"\nname = "second"\nhost = "b"\n')
    return file


def test_each_host_is_a_job_comes_back_with_its_node_and_ends(slurm: Slurm, machine: Machine) -> None:
    file = topology(machine, slurm.hosts)
    slurm.run("env", f"LOGS={DISK}", "bash", str(ROOT / "examples/slurm.sh"), str(file), *NAMES)
    try:
        until(slurm.is_whole, READY_S)
        assert all(len(slurm.supervisors(name)) == 1 for name in NAMES)
        first = slurm.image()

        before = slurm.supervisors("c")
        with slurm.hosts.isolate("c"):
            until(lambda: "c down*" in slurm.nodes(), 60)
            assert slurm.image() == first  # b denoises
        until(lambda: slurm.supervisors("c") not in ([], before), READY_S)
        until(slurm.is_whole, READY_S)

        slurm.run("kill", "-9", *slurm.supervisors("b"), host="b")
        until(lambda: "host b has ended" in slurm.log("b"), 60)
        until(slurm.is_whole, READY_S)
        assert slurm.image() == first

        slurm.run("scancel", "--name", "triptych")
        until(lambda: not slurm.run("squeue", "-h"), 60)
        assert not any(slurm.supervisors(name) for name in NAMES)
    finally:
        print(slurm.shown("tail", "-n", "40", "/run/slurm/ctld.log"), *map(slurm.log, NAMES), sep="\n----\n")
