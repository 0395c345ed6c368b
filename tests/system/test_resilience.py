"""What was accepted ends in exactly one way, whatever dies, hangs or gives up on the way."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.conftest import BOUND_S, FREE_PORTS, MANY_STEPS, ROOT, any_steps, back
from tests.system.test_prompt_cache import every_request_is_encoded
from triptych.actors import load_topology
from triptych.actors.topology import free_port
from triptych.api.launch import Cluster, launch

PROMPT = "a red circle"


@pytest.fixture
def patient(models: Callable[[str], Path], tmp_path: Path) -> dict[str, str]:
    """A `[model]` that allows any number of steps."""
    return {"path": str(any_steps(models("flux"), tmp_path)), "dtype": "float32"}


@asynccontextmanager
async def client_of(cluster: Cluster, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=cluster.url, timeout=60, headers=headers) as http:
        yield http


@asynccontextmanager
async def running(path: Path) -> AsyncIterator[tuple[Cluster, httpx.AsyncClient]]:
    async with launch(path, FREE_PORTS) as cluster, client_of(cluster) as http:
        yield cluster, http


def post(http: httpx.AsyncClient, steps: int, **headers: str) -> asyncio.Task[httpx.Response]:
    body = {"prompt": PROMPT, "seed": 1, "num_inference_steps": steps}
    return asyncio.create_task(http.post("/v1/images/generations", json=body, headers=headers))


async def under_way(http: httpx.AsyncClient, state: str = "DENOISING_RUNNING") -> dict[str, Any]:
    """Return the one active request, once it is in that state."""
    async with asyncio.timeout(BOUND_S):
        while True:
            head = (await http.get("/v1/cluster")).json()["head"]
            for instance in head["instances"] if head else ():
                for unit_id in instance["running"]:
                    request = (await http.get(f"/v1/requests/{unit_id.partition('/')[0]}")).json()
                    if request["state"] == state:
                        return dict(request)


async def wait_until_idle(http: httpx.AsyncClient) -> None:
    """Wait until nothing is assigned and every block is free, or the prompt cache's."""
    async with asyncio.timeout(BOUND_S):
        while True:
            seen = (await http.get("/v1/cluster")).json()
            idle = all(i["credits"] == i["slots"] for i in seen["head"]["instances"])
            (pool,) = seen["pools"]
            kept = seen["head"]["prompt_cache"]["nbytes"]
            if idle and pool["leased"] == kept and pool["free"] == pool["capacity"] - kept:
                return


def test_cancel_hang_up_and_timeout_stop_the_denoise_and_release_every_lease_without_a_cache(
    topology_file: Callable[..., Path], patient: dict[str, str]
) -> None:
    async def scenario() -> None:
        model = patient | {"prompt_cache": "0"}
        async with running(topology_file(model=model, head={"request_timeout_s": 4})) as (cluster, http):
            await every_request_is_encoded(cluster)

            asked = post(http, MANY_STEPS)
            request = await under_way(http)
            assert (await http.delete(f"/v1/requests/{request['id']}")).json()["state"] == "CANCELLED"
            assert (await asked).status_code == 409
            await wait_until_idle(http)

            asked = post(http, MANY_STEPS)
            request = await under_way(http)
            asked.cancel()
            await wait_until_idle(http)
            assert (await http.get(f"/v1/requests/{request['id']}")).json()["state"] == "CANCELLED"

            answer = await post(http, MANY_STEPS)
            assert answer.status_code == 504
            assert answer.json()["error"]["message"]
            await wait_until_idle(http)

    asyncio.run(scenario())


@pytest.mark.shared_cluster("killed")
def test_a_client_that_lost_the_api_finds_its_request_by_its_key(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        async with client_of(cluster) as http:
            key = {"Idempotency-Key": "once"}
            asked = post(http, 300, **key)
            request = await under_way(http)
            api = (await cluster.children())["api"]
            os.kill(api.pid, signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                await asked
            await back(cluster, "api", after_generation=api.generation)
            answer = (await post(http, 300, **key)).json()
            assert answer["id"] == request["id"]
            units = (await http.get(f"/v1/requests/{request['id']}")).json()["units"]
            assert [unit["attempts"] for unit in units] == [1]
            assert (await post(http, 301, **key)).status_code == 409

    on_cluster(scenario)


@pytest.mark.shared_cluster("killed")
def test_a_restart_of_the_head_interrupts_no_denoise(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        async with client_of(cluster) as http:
            asked = post(http, 400)
            await under_way(http)
            head = (await cluster.children())["head"]
            os.kill(head.pid, signal.SIGKILL)
            answer = await asked
            assert answer.status_code == 200
            unit = (await http.get(f"/v1/requests/{answer.json()['id']}")).json()["units"][0]
            assert unit["attempts"] == 1
            assert [m["state"] for m in unit["history"]].count("DENOISING_RUNNING") == 1
            await back(cluster, "head", after_generation=head.generation)

    on_cluster(scenario)


@pytest.mark.shared_cluster("killed")
def test_a_stopped_process_is_killed_and_its_job_done_by_a_sibling(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        async with client_of(cluster) as http:
            asked = post(http, 300)
            victim = (await under_way(http))["units"][0]["instances"]["denoiser"]
            child = (await cluster.children())[victim]
            os.kill(child.pid, signal.SIGSTOP)
            answer = await asked
            assert answer.status_code == 200
            unit = (await http.get(f"/v1/requests/{answer.json()['id']}")).json()["units"][0]
            assert unit["instances"]["denoiser"] != victim
            await back(cluster, victim, after_generation=child.generation)

    on_cluster(scenario)


@pytest.mark.shared_cluster("killed")
def test_a_request_that_kills_its_worker_twice_is_failed_and_the_pool_serves_on(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        async with client_of(cluster) as http:
            asked = post(http, MANY_STEPS)
            for attempt in (1, 2):
                request = await under_way(http)
                unit = request["units"][0]
                assert unit["attempts"] == attempt
                os.kill((await cluster.children())[unit["instances"]["denoiser"]].pid, signal.SIGKILL)
                if attempt == 1:
                    await attempt_after(http, request["id"], 1)
            answer = await asked
            assert answer.status_code == 500
            assert answer.json()["error"]["message"].count("its process ended") == 2
            assert (await post(http, 4)).status_code == 200

    on_cluster(scenario)


@pytest.mark.long
def test_pauses_of_the_machine_and_rolling_restarts_fail_no_request(
    topology_file: Callable[..., Path], patient: dict[str, str]
) -> None:
    async def scenario() -> None:
        path = topology_file(model=patient, supervision={"heartbeat_timeout_s": 2, "shutdown_s": 1})
        async with running(path) as (cluster, http):
            before = await cluster.children()
            asked = post(http, 1500)
            request = await under_way(http)
            for _ in range(2):
                await pause_for(2.5, cluster.process.pid, *[child.pid for child in before.values()])
                view = (await http.get(f"/v1/requests/{request['id']}")).json()
                assert [unit["attempts"] for unit in view["units"]] == [1]
            after = await cluster.children()
            assert {n: c.pid for n, c in after.items()} == {n: c.pid for n, c in before.items()}
            for attempt in (1, 2):
                denoiser = (await cluster.children())["denoiser-0"]
                os.kill(denoiser.pid, signal.SIGTERM)
                await attempt_after(http, request["id"], attempt)
                await back(cluster, "denoiser-0", after_generation=denoiser.generation)
                await under_way(http)
            assert (await asked).status_code == 200
            unit = (await http.get(f"/v1/requests/{request['id']}")).json()["units"][0]
            assert unit["causes"] == ["denoiser-0: it was asked to end"] * 2

    asyncio.run(scenario())


async def pause_for(seconds: float, *pids: int) -> None:
    """Stop processes as a pause of the machine does: none of them knows how long it was."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(seconds)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


async def attempt_after(http: httpx.AsyncClient, request_id: str, attempt: int) -> None:
    async with asyncio.timeout(BOUND_S):
        while (await http.get(f"/v1/requests/{request_id}")).json()["units"][0]["attempts"] <= attempt:
            pass


@pytest.mark.shared_cluster("killed")
def test_a_killed_zygote_ends_no_role_and_is_started_again(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        async with client_of(cluster) as http:
            before = await cluster.children()
            os.kill(child_called(cluster.process.pid, "triptych: zygote"), signal.SIGKILL)
            assert (await post(http, 4)).status_code == 200
            assert {n: c.pid for n, c in (await cluster.children()).items()} == {n: c.pid for n, c in before.items()}
            os.kill(before["denoiser-0"].pid, signal.SIGKILL)
            await back(cluster, "denoiser-0", after_generation=before["denoiser-0"].generation)
            assert (await post(http, 4)).status_code == 200

    on_cluster(scenario)


def child_called(parent: int, title: str) -> int:
    listed = subprocess.run(
        ["ps", "--ppid", str(parent), "-o", "pid=,args="], capture_output=True, text=True, check=True
    )
    (pid,) = [int(line.split()[0]) for line in listed.stdout.splitlines() if title in line]
    return pid


@pytest.mark.long
def test_a_role_that_was_stopped_while_it_was_fenced_starts_again(
    topology_file: Callable[..., Path], patient: dict[str, str]
) -> None:
    """Its own supervisor sleeps as well, so nobody kills it: the head has to turn it away."""

    path = topology_file(model=patient, api={"port": free_port()}, supervision={"heartbeat_timeout_s": 2})
    names = [component.name for component in load_topology(path).components]
    up = (sys.executable, "-m", "triptych.actors.command", "up", str(path), "--only")
    others = subprocess.Popen([*up, ",".join(n for n in names if n != "denoiser-0")], cwd=ROOT)
    sleeper = subprocess.Popen([*up, "denoiser-0"], cwd=ROOT)

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=load_topology(path).url, timeout=60) as http:
            first = await generation_of(http, "denoiser-0", after=0)
            role = child_called(sleeper.pid, "triptych: denoiser-0")
            for pid in (sleeper.pid, role):
                os.kill(pid, signal.SIGSTOP)
            await gone_from_the_registry(http)
            for pid in (role, sleeper.pid):
                os.kill(pid, signal.SIGCONT)
            await generation_of(http, "denoiser-0", after=first)
            assert (await post(http, 4)).status_code == 200

    try:
        asyncio.run(scenario())
    finally:
        for process in (sleeper, others):
            process.send_signal(signal.SIGINT)
        assert [process.wait(30) for process in (sleeper, others)] == [0, 0]


async def generation_of(http: httpx.AsyncClient, name: str, *, after: int) -> int:
    """Of an instance registered with the head, once it is later than `after`."""
    async with asyncio.timeout(90):
        while True:
            for instance in await instances(http):
                if instance["name"] == name and instance["generation"] > after:
                    return int(instance["generation"])


async def gone_from_the_registry(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(BOUND_S):
        while any(instance["name"] == "denoiser-0" for instance in await instances(http)):
            pass


async def instances(http: httpx.AsyncClient) -> list[dict[str, Any]]:
    try:
        head = (await http.get("/v1/cluster")).json()["head"]
    except httpx.TransportError:  # the API is not up yet
        return []
    return list(head["instances"]) if head else []


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_short_storm_of_every_fault_breaks_no_promise(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = (sys.executable, "-m", "triptych.tools.chaos", "examples/chaos.toml", "--json", str(report))
    storm = subprocess.run(
        [*command, "--seed", "7", "--duration", "15", "--rate", "3", "--every", "1.5"], cwd=ROOT, check=False
    )
    found = json.loads(report.read_text())
    assert {name: broken for name, broken in found["invariants"].items() if broken} == {}
    assert len(found["invariants"]) == 12
    assert storm.returncode == 0
    assert found["accepted"] > 20
    assert sum(found["faults"].values()) >= 5
    assert (found["lost"], found["doubled"], found["leaked"], found["different"]) == (0, 0, 0, 0)
