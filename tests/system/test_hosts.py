"""One system of three hosts, here three addresses of loopback, each with a supervisor of its own.

`test_separate_hosts.py` has hosts that are namespaces, and faults of the network between them.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.ports import free_ports
from tests.system.conftest import ROOT
from tests.system.reference import diffusers_reference, pixels_of_answer
from triptych.actors.supervision import module_command
from triptych.actors.topology import free_port
from triptych.engines.parameters.serving_config import load_serving_config

PROMPT = "a large red circle on the left of a blue background"
HOSTS = ("a", "b", "c")
BOUND_S = 240.0
"""Longest wait for what must come: three supervisors import the same libraries at once."""
TOPOLOGY = """
[model]
path = "{model}"
dtype = "float32"
[api]
port = {api}
[head]
host = "a"
port = {port}
[state]
path = "state"
[transfer]
trusted_network = true
pool_size = "16MiB"
{hosts}
[[roles]]
kind = "encoder"
host = "a"
[[roles]]
kind = "denoiser"
hosts = ["b", "c"]
[[roles]]
kind = "decoder"
host = "c"
"""


@pytest.mark.hosts
def test_three_hosts_in_any_order_make_the_image_of_one_process_and_do_without_one_of_them(
    tmp_path: Path, models: Callable[[str], Path]
) -> None:
    model = models("flux")
    hosts = "".join(f'[[hosts]]\nname = "{name}"\naddress = "127.0.0.{n}"\n' for n, name in enumerate(HOSTS, start=2))
    file, api = tmp_path / "topology.toml", free_port()
    file.write_text(TOPOLOGY.format(model=model, hosts=hosts, api=api, port=free_ports(13)))

    async def host(name: str) -> asyncio.subprocess.Process:
        command = (*module_command("triptych.actors.command"), "up", str(file), "--host", name, "--until-eof")
        return await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=asyncio.subprocess.PIPE)

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            http = await stack.enter_async_context(
                httpx.AsyncClient(base_url=f"http://127.0.0.1:{api}", timeout=BOUND_S)
            )
            running = {name: await host(name) for name in reversed(HOSTS)}
            stack.push_async_callback(_end, running)
            await _until(http, "/ready", lambda answer: answer["status"] == "ready")
            body = {"prompt": PROMPT, "seed": 11}
            made = pixels_of_answer(await http.post("/v1/images/generations", json=body))
            defaults = load_serving_config(model).defaults
            expected = await asyncio.to_thread(diffusers_reference, "flux", model, PROMPT, 11, **defaults)
            assert np.array_equal(made, expected)
            cluster = (await http.get("/v1/cluster")).json()
            assert [(row["name"], row["state"], row["components"]) for row in cluster["hosts"]] == [
                ("a", "ready", ["pool-a", "encoder-0", "head", "api"]),
                ("b", "ready", ["pool-b", "denoiser-0"]),
                ("c", "ready", ["pool-c", "denoiser-1", "decoder-0"]),
            ]
            assert all("tcp" in pool["transport"].lower() for pool in cluster["pools"])

            asked = [asyncio.ensure_future(http.post("/v1/images/generations", json=body | {"n": 8})) for _ in range(2)]
            running["b"].send_signal(signal.SIGKILL)  # and with it every process of the host
            for answer in await asyncio.gather(*asked):
                assert np.array_equal(pixels_of_answer(answer), expected)
                assert len(answer.json()["data"]) == 8
            await running.pop("b").wait()
            seen = await _until(http, "/v1/cluster", lambda answer: answer["hosts"][1]["state"] == "down")
            assert (seen["ready"], seen["reasons"]) == (True, ["host b does not answer"])
            assert await _end(running) == [0, 0]

    asyncio.run(scenario())


async def _until(http: httpx.AsyncClient, path: str, condition: Callable[[Any], bool]) -> Any:
    async with asyncio.timeout(BOUND_S):
        while True:
            try:
                answer = (await http.get(path)).json()
            except httpx.TransportError:  # the API has not started
                answer = None
            if answer is not None and condition(answer):
                return answer
            await asyncio.sleep(0.05)


async def _end(running: dict[str, asyncio.subprocess.Process]) -> list[int]:
    """Close the stdin of every host, and return their exit codes."""
    for process in running.values():
        assert process.stdin is not None
        process.stdin.close()
    async with asyncio.timeout(BOUND_S):
        return [await process.wait() for process in running.values()]
