"""Ray places the hosts of a topology, on a cluster of three nodes; each node is a host made of namespaces."""

from __future__ import annotations

import importlib.util
import json
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from triptych.actors.placement.ray_plan import SYSTEM_CONFIG
from triptych.tools.hosts import HostProcess, Hosts

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

SHAPES = Path(__file__).parents[2] / "examples" / "shapes"
FILE = f"""
[model]
path = "{SHAPES}"
dtype = "float32"
[transfer]
trusted_network = true
pool_size = "32MiB"
[head]
host = "a"
[[hosts]]
name = "a"
[[hosts]]
name = "b"
[[hosts]]
name = "c"
[[roles]]
kind = "encoder"
host = "a"
[[roles]]
kind = "denoiser"
hosts = ["b", "c"]
[[roles]]
kind = "decoder"
host = "a"
"""
LOAD = """
import asyncio, collections, hashlib, sys, httpx

async def main(count):
    async with httpx.AsyncClient(base_url="http://127.0.0.1:8000", timeout=120) as http:
        while True:
            try:
                if (await http.get("/ready")).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.2)
        print("ready", flush=True)
        room, answers, images = asyncio.Semaphore(6), collections.Counter(), set()

        async def one():
            body = {"prompt": "a small blue circle on a white background", "seed": 7, "num_inference_steps": 20}
            async with room:
                answer = await http.post("/v1/images/generations", json=body)
            answers[answer.status_code] += 1
            images.add(hashlib.sha256(answer.content if answer.status_code != 200 else
                                      answer.json()["data"][0]["b64_json"].encode()).hexdigest())
            if answers.total() == 10:
                print("ten", flush=True)

        await asyncio.gather(*(one() for _ in range(count)))
        print(dict(answers), len(images), flush=True)

asyncio.run(main(int(sys.argv[1])))
"""
LEFT = """
import sys, ray
ray.init(address=sys.argv[1], namespace="triptych", logging_level="ERROR", log_to_driver=False)
groups = [each["name"] for each in ray.util.placement_group_table().values() if each["state"] != "REMOVED"]
print(ray.util.list_named_actors(), groups)
"""


class Running:
    """A process on a host, whose output is read line by line."""

    def __init__(self, process: HostProcess) -> None:
        self.process = process
        self.seen: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def until(self, pattern: str) -> re.Match[str]:
        """Return the first match in a line that has not been looked at."""
        while (line := self._lines.get(timeout=240)) is not None:
            self.seen.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"it ended before {pattern!r}:\n" + "\n".join(self.seen[-60:]))

    def end(self) -> int:
        """Return the exit code, when all output is read."""
        while (line := self._lines.get(timeout=120)) is not None:
            self.seen.append(line)
        return self.process.wait(10)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip())
        self._lines.put(None)


class Cluster:
    """Ray on three hosts, a to c, of which a has its head."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts = hosts
        self.address = f"{hosts.address('a')}:6379"
        self.file = folder / "three.toml"
        self.file.write_text(FILE)
        self.start(
            "a", "--head", "--port=6379", "--include-dashboard=false", f"--system-config={json.dumps(SYSTEM_CONFIG)}"
        )
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.join, ("b", "c")))

    def join(self, host: str) -> None:
        self.start(host, f"--address={self.address}")

    def start(self, host: str, *arguments: str) -> None:
        fixed = (f"--node-ip-address={self.hosts.address(host)}", "--num-cpus=3", f"--num-gpus={int(host != 'a')}")
        ray = str(Path(sys.executable).with_name("ray"))
        self.hosts.run(host, ray, "start", *arguments, *fixed, "--object-store-memory=80000000")

    def up(self, file: Path | None = None) -> Running:
        arguments = ("up", str(file or self.file), "--ray", self.address)
        return self.python("-m", "triptych.actors.command", *arguments)

    def load(self, count: int) -> Running:
        return self.python("-c", LOAD, str(count))

    def left(self) -> str:
        return self.hosts.run("a", sys.executable, "-c", LEFT, self.address).strip().splitlines()[-1]

    def python(self, *arguments: str) -> Running:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return Running(self.hosts.popen("a", sys.executable, *arguments, **pipes))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if importlib.util.find_spec("ray") is None:
        pytest.fail("needs Ray, which `make test-ray` installs")
    folder = tmp_path_factory.mktemp("ray")
    with Hosts(("a", "b", "c"), shared=[folder], environment={"RAY_USAGE_STATS_ENABLED": "0"}) as hosts:
        yield Cluster(hosts, folder)


def test_a_node_that_is_switched_off_under_load_loses_no_request_and_its_host_goes_elsewhere(cluster: Cluster) -> None:
    """Also, an image is the same wherever it was made, and Ctrl-C leaves nothing in Ray."""
    up = cluster.up()
    node = up.until(r"c is on (10\.77\.0\.\d)")[1]
    victim = next(name for name in "bc" if cluster.hosts.address(name) == node)
    load = cluster.load(40)
    load.until("^ten$")
    cluster.hosts.kill(victim)
    assert up.until(rf"c goes from {re.escape(node)} to (\S+)")[1] != node
    assert load.until(r"^\{.*").string == "{200: 40} 1"
    assert load.end() == 0
    up.until("c | denoiser-1 .* ready")
    again = cluster.load(6)
    assert again.until(r"^\{.*").string == "{200: 6} 1"
    up.process.send_signal(signal.SIGINT)
    assert up.end() == 0, up.seen[-40:]
    assert cluster.left() == "[] []"
    cluster.hosts.start(victim)
    cluster.join(victim)


def test_the_hosts_outlive_a_driver_that_is_killed_and_the_next_one_replaces_them(cluster: Cluster) -> None:
    up = cluster.up()
    up.until("c is on ")
    assert cluster.load(3).until(r"^\{.*").string == "{200: 3} 1"
    refused = cluster.up()
    refused.until("another triptych up --ray runs")
    assert refused.end() == 1
    up.process.send_signal(signal.SIGKILL)
    up.end()
    assert cluster.load(3).until(r"^\{.*").string == "{200: 3} 1"
    while True:
        following = cluster.up()
        if following.until("another triptych up --ray runs|c is on ")[0].startswith("c is"):
            break
        following.end()
    assert any("ends b, which an earlier" in line for line in following.seen)
    assert cluster.load(3).until(r"^\{.*").string == "{200: 3} 1"
    following.process.send_signal(signal.SIGTERM)
    assert following.end() == 0, following.seen[-40:]
    assert cluster.left() == "[] []"


def test_a_host_that_cannot_run_where_it_is_placed_ends_the_command_with_its_reason(cluster: Cluster) -> None:
    """Ray is told of GPUs that these nodes do not have."""
    file = cluster.file.with_name("gpu.toml")
    file.write_text(FILE.replace('hosts = ["b", "c"]', 'hosts = ["b", "c"]\ndevice = "cuda"'))
    up = cluster.up(file)
    up.until(r"^[bc] \| .*device = \"cuda\" for denoiser-[01], but this machine shows no such device")
    assert up.end() == 2
    assert cluster.left() == "[] []"


def test_a_host_that_fits_nowhere_is_told_of_and_waited_for(cluster: Cluster) -> None:
    file = cluster.file.with_name("gpus.toml")
    file.write_text(FILE.replace('hosts = ["b", "c"]', 'hosts = ["b", "c"]\ndevice = "cuda"\ncount = 2'))
    up = cluster.up(file)
    up.until(r"waits up to 60 s: Ray has no room: .*b needs 2 GPU.* has 1 GPU and 3 CPU in all")
    up.process.send_signal(signal.SIGINT)
    assert up.end() == 0
    assert cluster.left() == "[] []"
