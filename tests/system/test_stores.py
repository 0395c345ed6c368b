"""Images that clients send and results, where the roles have no disk in common with the API, or all have a bucket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.conftest import S3_BUCKET
from tests.system.conftest import FREE_PORTS
from tests.system.reference import pixels_of_answer
from tests.system.test_image_inputs import plain, png
from triptych.api.launch import launch
from triptych.roles.media.artifacts import ARTIFACTS
from triptych.roles.media.s3 import S3Files
from triptych.roles.media.uploads import UPLOADS
from triptych.roles.worker.store_client import UPLOAD_COPIES
from triptych.tools.families.cases import PROMPT, input_image
from triptych.tools.families.compare import SEED
from triptych.tools.hosts.cluster import launch_on_hosts

BODY = {"prompt": PROMPT, "seed": str(SEED), "strength": "0.7", "response_format": "url"}


async def edited(http: httpx.AsyncClient) -> tuple[str, str, np.ndarray]:
    """The id of a request that edits an image, the path of its result, and that."""
    answer = await http.post("/v1/images/edits", data=BODY, files={"image": png(input_image())})
    path = httpx.URL(answer.raise_for_status().json()["data"][0]["url"]).path
    data = (await http.get(path)).raise_for_status().content
    part = await http.get(path, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, data[10:20])
    inline = await http.post(
        "/v1/images/edits", data=BODY | {"response_format": "b64_json"}, files={"image": png(input_image())}
    )
    return answer.json()["id"], path, pixels_of_answer(inline)


def expected(model: Path) -> np.ndarray:
    return np.asarray(plain("FluxModularPipeline", model, image=input_image(), strength=0.7)["images"][0])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.hosts
def test_images_go_to_and_from_hosts_that_share_no_disk_with_the_api(
    topology_file: Callable[..., Path], models: Callable[[str], Path]
) -> None:
    path = topology_file(
        "flux-kl",
        model={"task": "image-to-image"},
        hosts={"encoder": ["b"], "denoiser": ["a"], "decoder": ["c"]},
        head={"host": "a"},
        transfer={"trusted_network": True},
    )

    async def scenario() -> None:
        async with launch_on_hosts(path) as cluster:
            disks = {host: cluster.hosts.disk(host) / "state" for host in ("a", "b", "c")}
            async with cluster.http_client(60.0) as http:
                request_id, url, made = await edited(http)
                assert np.array_equal(made, expected(models("flux-kl")))
                (upload,) = names(disks["a"] / UPLOADS)
                assert names(disks["b"] / UPLOAD_COPIES / "encoder-0") == [upload]
                assert len(names(disks["a"] / ARTIFACTS)) == 2
                assert not any(names(disks[host] / ARTIFACTS) for host in ("b", "c"))
                assert (await http.delete(f"/v1/requests/{request_id}")).status_code == 200
                assert (await http.get(url)).status_code == 404

    asyncio.run(scenario())


@pytest.mark.s3
@pytest.mark.usefixtures("s3_server")
def test_a_bucket_keeps_what_clients_send_and_get(
    topology_file: Callable[..., Path], models: Callable[[str], Path]
) -> None:
    url = f"s3://{S3_BUCKET}/system"
    path = topology_file("flux-kl", model={"task": "image-to-image"}, store={"url": url})
    artifacts, uploads = (S3Files(f"{url}/{name}") for name in (ARTIFACTS, UPLOADS))

    async def scenario() -> None:
        async with launch(path, FREE_PORTS) as cluster:
            state = cluster.topology.state_dir
            async with cluster.http_client(60.0) as http:
                request_id, result, made = await edited(http)
                assert np.array_equal(made, expected(models("flux-kl")))
                (upload,) = await asyncio.to_thread(uploads.entries)
                assert names(state / UPLOAD_COPIES / "encoder-0") == [upload.name]
                assert len(await asyncio.to_thread(artifacts.entries)) == 2
                assert not names(state / ARTIFACTS)
                assert not names(state / UPLOADS)
                assert (await http.delete(f"/v1/requests/{request_id}")).status_code == 200
                assert (await http.get(result)).status_code == 404
                assert len(await asyncio.to_thread(artifacts.entries)) == 1

    asyncio.run(scenario())
