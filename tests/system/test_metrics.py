"""Every metric of a running system moves when it should, and Prometheus' own parser takes them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.system.conftest import BOUND_S, back
from triptych.api.launch import Cluster
from triptych.roles.messages.common import Attempt
from triptych.roles.messages.stages import StageTaken

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
ASYNC = {"Prefer": "respond-async"}


async def metrics(http: httpx.AsyncClient) -> dict[str, float]:
    """The sum of each sample's values over all components, by its name."""
    answer = (await http.get("/metrics")).raise_for_status()
    assert answer.headers["content-type"].startswith("text/plain")
    sums = defaultdict[str, float](float)
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            sums[sample.name] += sample.value
            if outcome := sample.labels.get("outcome"):
                sums[f"{sample.name} {outcome}"] += sample.value
    return sums


async def undocumented(http: httpx.AsyncClient) -> list[str]:
    """The metrics that docs/metrics.md does not name."""
    families = text_string_to_metric_families((await http.get("/metrics")).text)
    names = [f"{family.name}_total" if family.type == "counter" else family.name for family in families]
    return [name for name in names if f"`{name}`" not in PAGE and not name.startswith("process_")]


async def until(http: httpx.AsyncClient, condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """The first metrics for which the condition holds."""
    async with asyncio.timeout(BOUND_S):
        while True:
            if condition(found := await metrics(http)):
                return found
            await asyncio.sleep(0.05)


def both(found: dict[str, float]) -> tuple[float, float]:
    """Jobs that run, and that wait."""
    return found["vllm:num_requests_running"], found["vllm:num_requests_waiting"]


@pytest.mark.shared_cluster("killed")
def test_each_metric_moves_when_it_should(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=BOUND_S) as http:
            before = await metrics(http)
            await cluster.generate("metrics of a red circle", seed=3, steps=40)
            await cluster.generate("metrics of a red circle", seed=4, steps=4)
            body = {"prompt": "metrics of a long one", "num_inference_steps": 4000}
            ids = [(await http.post("/v1/images/generations", json=body, headers=ASYNC)).json()["id"] for _ in range(3)]
            # Two denoisers with a slot each: the third job waits.
            during = await until(http, lambda found: both(found) == (2, 1))
            children = await cluster.children()
            os.kill(children["denoiser-0"].pid, signal.SIGKILL)
            await back(cluster, "denoiser-0", after_generation=children["denoiser-0"].generation)
            await until(http, lambda found: both(found) == (2, 1))
            for id_ in ids:
                await http.delete(f"/v1/requests/{id_}")
            await cluster.wait_ready(BOUND_S)
            cancelled = before["triptych_requests_total cancelled"] + 3
            after = await until(http, lambda found: found["triptych_requests_total cancelled"] == cancelled)
            assert await undocumented(http) == []
            (head,) = [one for one in cluster.topology.components if one.kind == "head"]
            cluster._outbox.reference("head", head.address).tell(StageTaken(Attempt("nobody/0", 1)))
            await until(http, lambda found: found["triptych_dead_letters_total"] > after["triptych_dead_letters_total"])
            decoder = await cluster.pid_of("decoder-0")
            os.kill(decoder, signal.SIGSTOP)
            silent = await metrics(http)
            os.kill(decoder, signal.SIGCONT)
            await cluster.wait_ready(BOUND_S)
        assert silent["triptych_up"] == after["triptych_up"] - 1
        assert silent["triptych_instances"] == after["triptych_instances"] == 4
        assert after["triptych_requests_total done"] == before["triptych_requests_total done"] + 2
        assert after["triptych_restarts_total"] == before["triptych_restarts_total"] + 1
        rises = (
            "triptych_request_seconds_count", "triptych_stage_wait_seconds_count", "triptych_stage_seconds_count",
            "triptych_recovery_seconds_count", "triptych_prompt_cache_hits_total", "triptych_prompt_cache_misses_total",
            "triptych_http_responses_total",
        )  # fmt: skip
        assert [name for name in rises if not after[name] > before[name]] == []
        rose_before_the_kill = (
            "triptych_step_seconds_count", "triptych_batch_size_count", "triptych_instance_stage_seconds_count",
            "triptych_transfer_seconds_count", "triptych_transfer_bytes_total", "triptych_instance_runs",
            "triptych_jobs", "triptych_queued_seconds", "triptych_pool_bytes", "triptych_slots",
            "triptych_prompt_cache_bytes", "process_resident_memory_bytes", "process_cpu_seconds_total",
        )  # fmt: skip
        assert [name for name in rose_before_the_kill if not during[name] > 0] == []
        assert after["triptych_jobs"] == 0
        assert {"triptych_mailbox_depth", "triptych_transfer_failures_total"} <= during.keys()

    on_cluster(scenario)
