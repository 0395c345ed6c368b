"""OpenAI's own client, in front of the application."""

from __future__ import annotations

import io

import httpx2
import msgspec
import openai
import pytest
from PIL import Image

from tests.api.test_videos import PARAMETERS
from triptych.roles.messages import requests as wire

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")]


@pytest.fixture
async def videos(app, fake_head):
    fake_head.description = msgspec.structs.replace(
        fake_head.description, parameters=PARAMETERS, medium="video", fps=16.0, defaults={"height": 64, "width": 48}
    )
    transport = httpx2.AsyncClient(transport=httpx2.ASGITransport(app))
    async with openai.AsyncOpenAI(
        base_url="http://127.0.0.1/v1", api_key="none", max_retries=0, http_client=transport
    ) as client:
        yield client.videos


async def test_all_that_it_can_do_with_videos(videos, fake_head):
    made = await videos.create_and_poll(prompt="a cat", seconds="4", extra_body={"seed": 7})
    assert (made.status, made.progress, made.prompt, made.seconds) == ("completed", 100, "a cat", "4.06")
    assert made.expires_at > made.completed_at >= made.created_at

    video = await videos.download_content(made.id)
    assert video.response.headers["content-type"] == "video/mp4"
    for variant, form, kind in (("thumbnail", "WEBP", "image/webp"), ("spritesheet", "JPEG", "image/jpeg")):
        picture = await videos.download_content(made.id, variant=variant)
        assert picture.response.headers["content-type"] == kind
        assert Image.open(io.BytesIO(picture.content)).format == form

    remix = await videos.remix(made.id, prompt="a dog")
    assert (remix.prompt, remix.remixed_from_video_id, remix.seconds) == ("a dog", made.id, made.seconds)
    first, second = (submit for submit in await fake_head.received(wire.SubmitRequest, 2))
    assert second.inputs == {**first.inputs, "prompt": "a dog"}
    assert second.seed == first.seed == 7

    page = await videos.list(limit=1)
    assert [video.id async for video in page] == [remix.id, made.id]
    assert [video.id for video in (await videos.list(limit=1, after=remix.id, order="desc")).data] == [made.id]

    gone = await videos.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        await videos.download_content(made.id)
    assert (await videos.retrieve(remix.id)).remixed_from_video_id == made.id
