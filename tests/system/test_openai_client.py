"""OpenAI's Python client over all of its API that is here, each answer held against the OpenAPI document."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Coroutine
from typing import Any

import av
import httpx
import openai
import pytest
from PIL import Image

from tests.contract import Contract
from tests.system.conftest import BOUND_S
from triptych.api.launch import Cluster
from triptych.tools.families.cases import input_image, mask

pytestmark = [
    pytest.mark.shared_cluster("models"),
    pytest.mark.filterwarnings("ignore:.*Sora:DeprecationWarning"),
]
PROMPT = "a large red circle on the left of a blue background"
TEXT_MODEL, VIDEO_MODEL = "adapters", "wan"
Scenario = Callable[[openai.AsyncOpenAI], Coroutine[Any, Any, None]]


@pytest.fixture
def with_client(on_cluster: Callable[..., Any]) -> Callable[[Scenario], None]:
    """Run a coroutine function with OpenAI's client of the shared cluster."""

    def run(scenario: Scenario) -> None:
        async def connected(cluster: Cluster) -> None:
            async with cluster.http_client(BOUND_S) as plain:
                contract = Contract((await plain.get("/openapi.json")).json())
            http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [contract.check]}, timeout=BOUND_S)
            async with openai.AsyncOpenAI(
                base_url=f"{cluster.url}/v1", api_key="none", http_client=http, max_retries=0
            ) as client:
                await scenario(client)

        on_cluster(connected)

    return run


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def opened(text: str | None) -> Image.Image:
    assert text
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_images_of_a_prompt(with_client: Callable[[Scenario], None]) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        made = await client.images.generate(
            prompt=PROMPT, model=TEXT_MODEL, n=3, size="auto", user="me", output_format="jpeg", output_compression=80,
            quality="auto", background="auto", moderation="auto", style="vivid", stream=False,
            extra_body={"seed": 5, "num_inference_steps": 2},
        )  # fmt: skip
        images = [opened(image.b64_json) for image in made.data]
        assert [image.format for image in images] == ["JPEG"] * 3
        one = await client.images.generate(
            prompt=PROMPT, model=TEXT_MODEL, response_format="url", extra_body={"seed": 5, "num_inference_steps": 2}
        )
        url = str(one.data[0].url)
        async with httpx.AsyncClient() as http:
            file = await http.get(url)
            part = await http.get(url, headers={"Range": "bytes=0-7"})
        assert Image.open(io.BytesIO(file.content)).format == "PNG"
        assert (part.status_code, part.content) == (206, b"\x89PNG\r\n\x1a\n")

    with_client(scenario)


def test_images_as_events(with_client: Callable[[Scenario], None]) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        stream = await client.images.generate(
            prompt=PROMPT, model=TEXT_MODEL, stream=True, extra_body={"num_inference_steps": 2}
        )
        events = [event async for event in stream]
        assert [event.type for event in events][-1] == "image_generation.completed"
        assert opened(events[-1].b64_json).format == "PNG"
        stream = await client.images.edit(
            image=png(input_image()), prompt=PROMPT, model="image-to-image", stream=True,
            extra_body={"strength": 0.7},
        )  # fmt: skip
        events = [event async for event in stream]
        assert [event.type for event in events][-1] == "image_edit.completed"

    with_client(scenario)


def test_images_of_images(with_client: Callable[[Scenario], None]) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        for image in (png(input_image()), ("storm.png", png(input_image()), "image/png"), [png(input_image())]):
            made = await client.images.edit(
                image=image, prompt=PROMPT, model="image-to-image", input_fidelity="low", extra_body={"strength": 0.7}
            )
            assert opened(made.data[0].b64_json)
        made = await client.images.edit(
            image=png(input_image()), mask=png(mask()), prompt=PROMPT, model="inpainting", n=2,
            output_format="webp", extra_body={"num_inference_steps": 2, "strength": 1.0},
        )  # fmt: skip
        assert [opened(image.b64_json).format for image in made.data] == ["WEBP"] * 2
        varied = await client.images.create_variation(
            image=png(input_image()), model="image-to-image", n=2, extra_body={"strength": "0.7"}
        )
        assert len({image.b64_json for image in varied.data}) == 2

    with_client(scenario)


def test_videos(with_client: Callable[[Scenario], None]) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        short = {"num_frames": 5, "num_inference_steps": 2}
        video = await client.videos.create_and_poll(prompt=PROMPT, model=VIDEO_MODEL, extra_body=short)
        assert (video.status, video.progress, video.model) == ("completed", 100, VIDEO_MODEL)
        content = (await client.videos.download_content(video.id)).content
        with av.open(io.BytesIO(content)) as container:
            assert container.streams.video[0].frames == 5
        for variant in ("thumbnail", "spritesheet"):
            still = (await client.videos.download_content(video.id, variant=variant)).content
            assert Image.open(io.BytesIO(still)).width % 16 == 0
        other = await client.videos.remix(video.id, prompt="a small green triangle")
        assert (await client.videos.poll(other.id)).status == "completed"
        assert other.remixed_from_video_id == video.id
        page = await client.videos.list(limit=1)
        assert [each.id for each in page.data] == [other.id]
        following = await client.videos.list(after=other.id, limit=1, order="desc")
        assert [each.id for each in following.data] == [video.id]
        for each in (video, other):
            gone = await client.videos.delete(each.id)
            assert (gone.id, gone.deleted, gone.object) == (each.id, True, "video.deleted")
        with pytest.raises(openai.NotFoundError):
            await client.videos.retrieve(video.id)
        with pytest.raises(openai.NotFoundError):
            await client.videos.download_content(video.id)
        still = await client.videos.create_and_poll(
            prompt=PROMPT, model="image-to-video", input_reference=("boat.png", png(input_image()), "image/png"),
            extra_body=short,
        )  # fmt: skip
        assert still.status == "completed", still.error
        await client.videos.delete(still.id)

    with_client(scenario)


def test_models(with_client: Callable[[Scenario], None]) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        models = [model async for model in client.models.list()]
        assert {TEXT_MODEL, VIDEO_MODEL} <= {model.id for model in models}
        assert {(model.object, model.owned_by) for model in models} == {("model", "triptych")}
        assert (await client.models.retrieve(TEXT_MODEL)).id == TEXT_MODEL
        with pytest.raises(openai.NotFoundError) as missing:
            await client.models.retrieve("gpt-image-1")
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")

    with_client(scenario)


def test_a_request_that_nobody_waits_for_and_its_key(with_client: Callable[[Scenario], None]) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        headers = {"Prefer": "respond-async", "Idempotency-Key": "openai-1"}
        ids = set()
        for _ in range(2):
            answer = await client.images.with_raw_response.generate(
                prompt=PROMPT, model=TEXT_MODEL, extra_headers=headers
            )
            assert answer.status_code == 202
            ids.add(answer.headers["location"].rpartition("/")[2])
        assert len(ids) == 1
        with pytest.raises(openai.ConflictError):
            await client.images.generate(prompt="another", model=TEXT_MODEL, extra_headers=headers)

    with_client(scenario)


def test_errors_are_those_that_the_client_knows(with_client: Callable[[Scenario], None]) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        cases: list[tuple[type[openai.APIStatusError], str | None, dict[str, Any]]] = [
            (openai.NotFoundError, "model", {"model": "dall-e-3"}),
            (openai.UnprocessableEntityError, "n", {"n": 0}),
            (openai.UnprocessableEntityError, "size", {"size": "99999x99999"}),
            (openai.UnprocessableEntityError, "quality", {"quality": "hd"}),
            (openai.UnprocessableEntityError, "background", {"background": "transparent"}),
            (openai.UnprocessableEntityError, "num_inference_step", {"extra_body": {"num_inference_step": 2}}),
        ]
        for kind, param, fields in cases:
            with pytest.raises(kind) as error:
                await client.images.generate(**{"prompt": PROMPT, "model": TEXT_MODEL, **fields})
            assert error.value.param == param
            assert error.value.response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.UnprocessableEntityError, match="makes no videos"):
            await client.videos.create(prompt=PROMPT, model=TEXT_MODEL)

    with_client(scenario)
