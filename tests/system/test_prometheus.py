"""The files of examples/ for Prometheus and Grafana, with a real Prometheus that scrapes a system under load."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ports import free_ports
from tests.system.conftest import BOUND_S
from triptych.api.launch import Cluster
from triptych.roles.messages.common import Attempt
from triptych.roles.messages.stages import StageTaken

EXAMPLES = Path(__file__).parents[2] / "examples"
ONLY_ON_A_GPU = "triptych_device_memory_bytes"
LATER_NAMES = "vllm:"
"""Gauges under another project's names, which no rule of Prometheus' would give them."""

pytestmark = pytest.mark.prometheus


def expressions() -> Iterator[tuple[str, str]]:
    """The titles of the panels and their expressions, as Grafana would send them."""
    dashboard = json.loads((EXAMPLES / "grafana.json").read_text())
    variables = {"$model": ".*", "$__rate_interval": "1m", "$__range": "5m"}
    for panel in (*dashboard["panels"], *dashboard["annotations"]["list"]):
        for target in panel.get("targets", [panel] if "expr" in panel else []):
            text = target["expr"]
            for name, value in variables.items():
                text = text.replace(name, value)
            assert "$" not in text
            yield panel.get("title") or panel["name"], text


def promtool(*arguments: str, stdin: str = "") -> None:
    checked = subprocess.run(["promtool", "check", *arguments], input=stdin, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@asynccontextmanager
async def prometheus(folder: Path, api: str) -> AsyncIterator[httpx.AsyncClient]:
    """Prometheus with the files of examples/, but for the address of the API and how often it is asked."""
    config = (EXAMPLES / "prometheus.yml").read_text()
    assert "127.0.0.1:8000" in config
    (folder / "prometheus.yml").write_text(config.replace("127.0.0.1:8000", api).replace("15s", "1s"))
    shutil.copy(EXAMPLES / "alerts.yml", folder)
    address = f"127.0.0.1:{free_ports(1)}"
    command = (
        "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}", "--log.level=error",
    )  # fmt: skip
    process = await asyncio.create_subprocess_exec(*command)
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}", timeout=BOUND_S) as client:
            async with asyncio.timeout(BOUND_S):
                while not await value_of(client, "triptych_up"):
                    assert process.returncode is None
                    await asyncio.sleep(0.1)
            yield client
    finally:
        process.terminate()
        await process.wait()


async def value_of(client: httpx.AsyncClient, expression: str) -> list[float]:
    """The values of an expression now that are numbers; [] also while Prometheus starts."""
    try:
        response = await client.get("/api/v1/query", params={"query": expression})
    except httpx.TransportError:
        return []
    if response.status_code == 503:
        return []
    answer = response.json()
    assert answer["status"] == "success", (expression, answer)
    return [found for one in answer["data"]["result"] if math.isfinite(found := float(one["value"][1]))]


async def load(cluster: Cluster) -> None:
    """Requests for ever: some prompts again, some that are refused, some that are cancelled."""
    async with httpx.AsyncClient(base_url=cluster.url, timeout=BOUND_S) as http:
        for number in count():
            body = {"prompt": f"a red circle, {number // 2}", "num_inference_steps": 20, "n": 2}
            await http.post("/v1/images/generations", json=body)
            await http.post("/v1/images/generations", json={"prompt": "x", "size": "one"})
            long = {"prompt": "a long one", "num_inference_steps": 50_000}
            asked = await http.post("/v1/images/generations", json=long, headers={"Prefer": "respond-async"})
            await http.delete(f"/v1/requests/{asked.json()['id']}")


@pytest.mark.shared_cluster("killed")
def test_each_expression_of_the_dashboard_gives_data_under_load(on_cluster: Callable[..., Any], tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        async with prometheus(tmp_path, cluster.url.removeprefix("http://")) as client:
            working = [asyncio.create_task(load(cluster)) for _ in range(3)]
            try:
                missing = await all_give_data(client, cluster)
            finally:
                for task in working:
                    task.cancel()
            assert {text for _, text in missing} == {text for _, text in expressions() if ONLY_ON_A_GPU in text}
            rules = await evaluated_rules(client)
            assert {rule["health"] for rule in rules} == {"ok"}, rules
            assert len(rules) == (EXAMPLES / "alerts.yml").read_text().count("- alert:")
            await cluster.wait_ready(BOUND_S)

    on_cluster(scenario)


async def all_give_data(client: httpx.AsyncClient, cluster: Cluster) -> set[tuple[str, str]]:
    """Kill a denoiser once, and ask until each expression has given a number; returns those that have not."""
    missing = set(expressions())
    async with asyncio.timeout(BOUND_S):  # an increase needs what was before
        while True:
            if await value_of(client, "min(count_over_time(triptych_recovery_seconds_count[1m])) > 1"):
                break
            await asyncio.sleep(0.2)
    await lose_a_denoise(cluster)
    (head,) = [component for component in cluster.topology.components if component.kind == "head"]
    cluster._outbox.reference("head", head.address).tell(StageTaken(Attempt("nobody/0", 1)))
    try:
        async with asyncio.timeout(BOUND_S):
            while any(ONLY_ON_A_GPU not in text for _, text in missing):
                for title, text in sorted(missing):
                    if await value_of(client, text):
                        missing.discard((title, text))
                await asyncio.sleep(0.5)
    except TimeoutError:
        pass  # the caller compares
    return missing


async def lose_a_denoise(cluster: Cluster) -> None:
    """Kill the denoiser of a long request, and cancel that once another one has it."""
    long = {"prompt": "a long one, lost", "num_inference_steps": 50_000, "priority": 1}
    async with httpx.AsyncClient(base_url=cluster.url, timeout=BOUND_S) as http:
        asked = await http.post("/v1/images/generations", json=long, headers={"Prefer": "respond-async"})
        path = f"/v1/requests/{asked.json()['id']}"

        async def runs(attempt: int) -> str:
            async with asyncio.timeout(BOUND_S):
                while True:
                    (job,) = (await http.get(path)).json()["units"]
                    if (job["state"], job["attempts"]) == ("DENOISING_RUNNING", attempt):
                        return str(job["instances"]["denoiser"])
                    await asyncio.sleep(0.05)

        victim, children = await runs(1), await cluster.children()
        os.kill(children[victim].pid, signal.SIGKILL)
        await runs(2)
        await http.delete(path)


async def evaluated_rules(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    async with asyncio.timeout(BOUND_S):
        while True:
            groups = (await client.get("/api/v1/rules")).json()["data"]["groups"]
            rules = [rule for group in groups for rule in group["rules"]]
            if all(rule["health"] != "unknown" for rule in rules):
                return rules
            await asyncio.sleep(0.2)


@pytest.mark.shared_cluster("killed")
def test_promtool_takes_the_metrics_and_the_files(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        promtool("config", str(EXAMPLES / "prometheus.yml"))
        promtool("rules", str(EXAMPLES / "alerts.yml"))
        async with httpx.AsyncClient(base_url=cluster.url, timeout=BOUND_S) as http:
            await cluster.generate("a red circle", steps=3)
            text = (await http.get("/metrics")).text
        lines = [line for line in text.splitlines(keepends=True) if LATER_NAMES not in line]
        promtool("metrics", stdin="".join(lines))

    on_cluster(scenario)
