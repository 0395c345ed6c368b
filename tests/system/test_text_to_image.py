"""Images through three processes equal those of one, and the API tells the truth about them."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.system.reference import diffusers_reference, pixels
from triptych.api.launch import Cluster
from triptych.engines.parameters.serving_config import load_serving_config

PROMPT = "a large red circle on the left of a blue background"


@pytest.mark.parametrize(
    ("family", "pools"),
    [
        pytest.param("flux", ["pool"], marks=pytest.mark.shared_cluster("flux")),
        pytest.param("wan", ["pool"], marks=pytest.mark.shared_cluster("models")),
        pytest.param(
            "flux", ["pool-encoder", "pool-denoiser", "pool-decoder"], marks=pytest.mark.shared_cluster("mooncake")
        ),
    ],
)
def test_an_image_is_bit_identical_to_what_diffusers_makes_alone(
    family: str, pools: list[str], on_cluster: Callable[..., Any], models: Callable[[str], Path]
) -> None:
    extra: dict[str, Any] = {"num_frames": 1} if family == "wan" else {}
    model_name = "wan" if family == "wan" else None

    async def scenario(cluster: Cluster) -> tuple[np.ndarray, dict[str, Any]]:
        return pixels(await cluster.generate(PROMPT, model=model_name, seed=11, **extra)), await cluster.status()

    ours, status = on_cluster(scenario)
    model = models(family)
    defaults = load_serving_config(model).defaults | extra
    assert np.array_equal(ours, diffusers_reference(family, model, PROMPT, 11, **defaults))
    described = {pool["name"]: pool for pool in status["pools"]}
    assert described.keys() == set(pools)
    assert len(pools) == 1 or all("tcp" in pool["transport"].lower() for pool in described.values())


@pytest.fixture
def on_http(on_cluster: Callable[..., Any]) -> Callable[..., Any]:
    """Run a coroutine function with a client of the shared cluster's API."""

    def run(scenario: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]) -> None:
        async def with_client(cluster: Cluster) -> None:
            async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:
                await scenario(http)

        on_cluster(with_client)

    return run


@pytest.mark.shared_cluster("flux")
def test_n_images_are_n_runs(on_http: Callable[..., Any]) -> None:
    async def scenario(http: httpx.AsyncClient) -> None:
        body = {"prompt": PROMPT, "n": 3, "seed": 5}
        together = (await http.post("/v1/images/generations", json=body)).raise_for_status().json()["data"]
        alone = [
            (await http.post("/v1/images/generations", json=body | {"n": 1, "seed": 5 + k})).json()["data"][0]
            for k in range(3)
        ]
        assert [image["b64_json"] for image in together] == [image["b64_json"] for image in alone]
        assert len({image["b64_json"] for image in together}) == 3

    on_http(scenario)


@pytest.mark.shared_cluster("flux")
def test_a_file_says_what_it_is_made_from(on_http: Callable[..., Any]) -> None:
    async def scenario(http: httpx.AsyncClient) -> None:
        async def made(**body: object) -> bytes:
            answer = (await http.post("/v1/images/generations", json=body)).raise_for_status()
            return base64.b64decode(answer.json()["data"][0]["b64_json"])

        file = await made(prompt=PROMPT, seed=5)
        image: Any = Image.open(io.BytesIO(file))
        (model,) = (await http.get("/v1/models")).json()["data"]
        prompt, line = image.text["parameters"].split("\n")
        assert prompt == PROMPT
        assert line.startswith("Steps: 4, ")
        assert f"Seed: 5, Size: 64x64, Model: {model['id']}" in line
        assert await made(**json.loads(image.text["triptych"])) == file, "it is a request that makes the same file"
        plain: Any = Image.open(io.BytesIO(await made(prompt=PROMPT, seed=5, metadata=False)))
        assert (plain.text, plain.tobytes()) == ({}, image.tobytes())

    on_http(scenario)


@pytest.mark.shared_cluster("flux")
def test_a_request_reports_its_history(on_http: Callable[..., Any]) -> None:
    async def scenario(http: httpx.AsyncClient) -> None:
        body = {
            "prompt": "a prompt that nobody has asked for",
            "response_format": "url",
            "priority": 5,
            "deadline_s": 6e5,
        }
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
        kinds = {kind: name.partition("-")[0] for kind, name in unit["instances"].items()}
        assert kinds == {"encoder": "encoder", "denoiser": "denoiser", "decoder": "decoder"}
        assert unit["stage_seconds"].keys() == {"encoder", "denoiser", "decoder"}
        assert (view["priority"], view["deadline_s"], view["deadline_met"], unit["bucket"]) == (5, 6e5, True, 1)

    on_http(scenario)


@pytest.mark.shared_cluster("flux")
def test_a_stage_that_raises_reaches_the_client(on_http: Callable[..., Any]) -> None:
    async def scenario(http: httpx.AsyncClient) -> None:
        # Eight pixels pass the edge and are half a patch: the denoiser cannot pack them.
        answer = await http.post("/v1/images/generations", json={"prompt": PROMPT, "size": "8x8"})
        assert answer.status_code in (422, 500)
        error = answer.json()["error"]
        assert "Traceback" not in error["message"]
        assert error["message"]

    on_http(scenario)


@pytest.mark.shared_cluster("flux")
def test_bad_input_is_named(on_http: Callable[..., Any]) -> None:
    async def scenario(http: httpx.AsyncClient) -> None:
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

    on_http(scenario)


@pytest.mark.shared_cluster("flux")
def test_the_cluster_is_described(on_http: Callable[..., Any]) -> None:
    async def scenario(http: httpx.AsyncClient) -> None:
        cluster = (await http.get("/v1/cluster")).json()
        names = {actor["name"] for actor in cluster["actors"]}
        roles = {f"{p}-0{part}" for p in ("encoder", "denoiser", "decoder") for part in ("", ".transfer", ".stream")}
        assert names >= {"pool", "head", "api"} | roles
        assert all(actor["pid"] > 0 and actor["generation"] > 0 for actor in cluster["actors"])
        assert (await http.get("/ready")).status_code == 200
        assert (await http.get("/live")).status_code == 200

    on_http(scenario)


@pytest.mark.shared_cluster("flux")
def test_nothing_but_the_cache_is_held_at_rest(on_http: Callable[..., Any]) -> None:
    async def scenario(http: httpx.AsyncClient) -> None:
        async with asyncio.timeout(15):
            while True:
                cluster = (await http.get("/v1/cluster")).json()
                (pool,) = cluster["pools"]
                assert pool["free"] + pool["leased"] == pool["capacity"]
                if pool["leased"] == cluster["head"]["prompt_cache"]["nbytes"]:
                    return

    on_http(scenario)
