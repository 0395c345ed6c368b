"""Pictures through three processes equal those of one, and the API tells the truth about them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.ports import free_ports
from tests.system.reference import diffusers_reference
from triptych.api.launch import launch
from triptych.engines.parameters.serving_config import load_serving_config

PROMPT = "a large red circle on the left of a blue background"
FREE_PORTS = {"api": {"port": 0}}


def pixels(image: object) -> np.ndarray:
    return np.asarray(image.image().convert("RGB"))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("family", "engine", "roles"),
    [
        ("flux", "shm", None),
        ("flux", "mooncake", None),
        ("flux", "auto", {"monolithic": 1}),
        ("wan", "shm", None),
    ],
)
def test_an_image_is_bit_identical_to_what_diffusers_makes_alone(
    family: str,
    engine: str,
    roles: dict[str, int] | None,
    topology_file: Callable[..., Path],
    models: Callable[[str], Path],
) -> None:
    extra: dict[str, object] = {"num_frames": 1} if family == "wan" else {}

    async def through_processes() -> tuple[np.ndarray, dict[str, object]]:
        apart = engine == "mooncake"  # as on several hosts: nothing is shared, and the bus has its keys
        bus = {"bus": {"transport": "tcp"}, "head": {"port": free_ports(9)}} if apart else {}
        path = topology_file(family, roles, transfer={"engine": engine, "trusted_network": apart}, **bus)
        async with launch(path, FREE_PORTS) as cluster:
            image = await cluster.generate(PROMPT, seed=11, **extra)
            return pixels(image), await cluster.status()

    ours, status = asyncio.run(through_processes())
    model = models(family)
    defaults = load_serving_config(model).defaults | extra
    assert np.array_equal(ours, diffusers_reference(family, model, PROMPT, 11, **defaults))
    pools = {pool["name"]: pool for pool in status["pools"]}
    if engine == "mooncake":
        assert pools.keys() == {"pool-encoder", "pool-denoiser", "pool-decoder"}
        assert all("tcp" in pool["transport"].lower() for pool in pools.values())
    else:
        assert pools.keys() == (set() if roles else {"pool"})


def test_one_cluster_serves_everything_the_api_promises(topology_file: Callable[..., Path]) -> None:
    async def scenario() -> None:
        async with (
            launch(topology_file(), FREE_PORTS) as cluster,
            httpx.AsyncClient(base_url=cluster.url, timeout=60) as http,
        ):
            await n_images_are_n_runs(http)
            await a_request_reports_its_history(http)
            await a_stage_that_raises_reaches_the_client(http)
            await bad_input_is_named(http)
            await the_cluster_is_described(http)
            await nothing_but_the_cache_is_held_at_rest(http)

    asyncio.run(scenario())


async def n_images_are_n_runs(http: httpx.AsyncClient) -> None:
    body = {"prompt": PROMPT, "n": 3, "seed": 5}
    together = (await http.post("/v1/images/generations", json=body)).raise_for_status().json()["data"]
    alone = [
        (await http.post("/v1/images/generations", json=body | {"n": 1, "seed": 5 + k})).json()["data"][0]
        for k in range(3)
    ]
    assert [image["b64_json"] for image in together] == [image["b64_json"] for image in alone]
    assert len({image["b64_json"] for image in together}) == 3


async def a_request_reports_its_history(http: httpx.AsyncClient) -> None:
    body = {"prompt": "a prompt that nobody has asked for", "response_format": "url"}
    answer = (await http.post("/v1/images/generations", json=body)).json()
    image = await http.get(answer["data"][0]["url"])
    assert image.headers["content-type"] == "image/png"
    view = (await http.get(f"/v1/requests/{answer['id']}")).json()
    unit = view["units"][0]
    states = [move["state"] for move in unit["history"]]
    assert states == [
        "ENCODER_WAITING", "ENCODER_RUNNING", "ENCODER_DONE", "DENOISING_WAITING", "DENOISING_RUNNING",
        "DENOISING_DONE", "DECODER_WAITING", "DECODER_RUNNING", "DONE",
    ]  # fmt: skip
    times = [move["at"] for move in unit["history"]]
    assert times == sorted(times)
    assert unit["instances"] == {"encoder": "encoder-0", "denoiser": "denoiser-0", "decoder": "decoder-0"}
    assert unit["stage_seconds"].keys() == {"encoder", "denoiser", "decoder"}


async def a_stage_that_raises_reaches_the_client(http: httpx.AsyncClient) -> None:
    # Eight pixels pass the edge and are half a patch: the denoiser cannot pack them.
    answer = await http.post("/v1/images/generations", json={"prompt": PROMPT, "size": "8x8"})
    assert answer.status_code in (422, 500)
    error = answer.json()["error"]
    assert "Traceback" not in error["message"]
    assert error["message"]


async def bad_input_is_named(http: httpx.AsyncClient) -> None:
    for body, param in (
        ({"prompt": PROMPT, "size": "huge"}, "size"),
        ({"prompt": PROMPT, "num_inference_steps": 100_000}, "num_inference_steps"),
        ({"prompt": PROMPT, "hieght": 64}, "hieght"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": PROMPT, "n": 0}, "n"),
    ):
        answer = await http.post("/v1/images/generations", json=body)
        assert answer.status_code == 422, body
        assert answer.json()["error"]["param"] == param


async def the_cluster_is_described(http: httpx.AsyncClient) -> None:
    cluster = (await http.get("/v1/cluster")).json()
    names = {actor["name"] for actor in cluster["actors"]}
    roles = {f"{p}-0{part}" for p in ("encoder", "denoiser", "decoder") for part in ("", ".transfer", ".stream")}
    assert names >= {"pool", "head", "api"} | roles
    assert all(actor["pid"] > 0 and actor["generation"] > 0 for actor in cluster["actors"])
    assert (await http.get("/ready")).status_code == 200
    assert (await http.get("/live")).status_code == 200


async def nothing_but_the_cache_is_held_at_rest(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(15):
        while True:
            cluster = (await http.get("/v1/cluster")).json()
            (pool,) = cluster["pools"]
            assert pool["free"] + pool["leased"] == pool["capacity"]
            if pool["leased"] == cluster["head"]["prompt_cache"]["nbytes"]:
                return
