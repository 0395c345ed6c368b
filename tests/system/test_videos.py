"""Videos through three processes: files that play, with the frames that diffusers makes alone, and their sound."""

from __future__ import annotations

import io
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

from triptych.actors import AddressBook
from triptych.api.launch import Cluster
from triptych.bus import Outbox, Reference
from triptych.engines.parameters.serving_config import load_serving_config
from triptych.roles.messages import requests
from triptych.roles.messages.common import Artifact, Output

PROMPT = "a large red circle on the left of a blue background"
SEED = 11
BOUND_S = 60.0


class Client:
    """Submits to the head by the bus, and gets the files by HTTP."""

    def __init__(self, head: Reference, http: httpx.AsyncClient, model: str) -> None:
        self.head, self.http, self.model = head, http, model

    async def submit(
        self, id_: str, output: Output, **inputs: object
    ) -> requests.RequestAccepted | requests.RequestRejected:
        message = requests.SubmitRequest(id_, {"prompt": PROMPT, **inputs}, SEED, 1, output, model=self.model)
        return await self.head.ask(message, requests.RequestAccepted, requests.RequestRejected, timeout_s=BOUND_S)

    async def refused(self, id_: str, output: Output, **inputs: object) -> tuple[str, str]:
        answer = await self.submit(id_, output, **inputs)
        assert isinstance(answer, requests.RequestRejected)
        return answer.code, answer.param

    async def make(self, id_: str, output: Output, **inputs: object) -> tuple[Artifact, bytes]:
        assert isinstance(await self.submit(id_, output, **inputs), requests.RequestAccepted)
        waiting = requests.WaitRequest(id_, BOUND_S)
        view = await self.head.ask(waiting, requests.RequestView, timeout_s=BOUND_S + 5)
        (unit,) = view.units
        assert (view.state, unit.causes) == ("DONE", ())
        assert unit.artifact is not None
        response = (await self.http.get(f"/v1/images/{unit.artifact.name}")).raise_for_status()
        assert response.headers["content-type"] == unit.artifact.content_type
        assert len(response.content) == unit.artifact.nbytes
        return unit.artifact, response.content


@asynccontextmanager
async def client_of(cluster: Cluster, model: str) -> AsyncIterator[Client]:
    outbox = Outbox("test")
    head = outbox.reference("head", AddressBook(cluster.topology).address("head"))
    async with httpx.AsyncClient(base_url=cluster.url, timeout=BOUND_S) as http:
        yield Client(head, http, model)
    outbox.close()


def decoded(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def unpacked(data: bytes) -> np.ndarray:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return np.stack([np.asarray(Image.open(archive.open(name))) for name in archive.namelist()])


def diffusers_alone(model: Path, frames: int) -> np.ndarray:
    """The frames, uint8 [frames, height, width, 3], of the plain pipeline in one process."""
    pipeline = WanPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    inputs = {**load_serving_config(model).defaults, "num_frames": frames}
    generator = torch.Generator("cpu").manual_seed(SEED)
    made = pipeline(PROMPT, generator=generator, output_type="pil", **inputs).frames[0]
    return np.stack([np.asarray(frame) for frame in made])


@pytest.mark.shared_cluster("models")
def test_a_video_is_a_file_that_plays_with_the_frames_that_diffusers_makes_alone(
    on_cluster: Callable[..., Any], models: Callable[[str], Path]
) -> None:
    async def scenario(cluster: Cluster) -> tuple[bytes, bytes]:
        async with client_of(cluster, "wan") as client:
            artifact, film = await client.make("film", Output(), num_frames=5)
            assert (artifact.name, artifact.content_type) == ("film_0.mp4", "video/mp4")
            assert (await client.make("again", Output("mp4"), num_frames=5))[1] == film
            _, archive = await client.make("frames", Output("zip"), num_frames=5)
            assert (await client.make("still", Output(), num_frames=1))[0].content_type == "image/png"
            assert (await client.make("still2", Output("jpeg"), num_frames=1))[0].content_type == "image/jpeg"
            assert (await client.make("moving", Output("webp"), num_frames=5))[0].content_type == "image/webp"
            # Wan asks for no rate, but its files have one.
            _, slow = await client.make("slow", Output(), num_frames=5, fps=8)
            with av.open(io.BytesIO(slow)) as container:
                assert container.streams.video[0].average_rate == 8

            assert await client.refused("a", Output("jpeg"), num_frames=5) == ("invalid", "output_format")
            assert await client.refused("b", Output("wav")) == ("invalid", "output_format")
            assert await client.refused("c", Output("bmp")) == ("invalid", "output_format")
            assert await client.refused("d", Output("mp4", 1000.0)) == ("invalid", "fps")

            some = await client.http.get("/v1/images/film_0.mp4", headers={"Range": "bytes=10-19"})
            assert (some.status_code, some.content) == (206, film[10:20])
            assert some.headers["content-range"] == f"bytes 10-19/{len(film)}"
            return film, archive

    film, archive = on_cluster(scenario)
    expected = diffusers_alone(models("wan"), 5)
    assert np.array_equal(unpacked(archive), expected)
    with av.open(io.BytesIO(film)) as container:
        video = container.streams.video[0]
        assert (video.codec_context.name, video.frames, video.average_rate) == ("h264", 5, 16)
        assert (video.height, video.width) == expected.shape[1:3]
        assert not container.streams.audio
    # Random pixels: chroma is halved, but the brightness of each frame is there.
    ours, theirs = decoded(film).mean(axis=-1).ravel(), expected.mean(axis=-1).ravel()
    assert np.corrcoef(ours, theirs)[0, 1] > 0.85


@pytest.mark.shared_cluster("models")
@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_openais_client_does_with_videos_all_that_it_can(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        server = {"base_url": f"{cluster.url}/v1", "api_key": "none", "timeout": BOUND_S, "max_retries": 0}
        async with openai.AsyncOpenAI(**server) as client:
            videos = client.videos
            made = await videos.create_and_poll(
                model="wan", prompt=PROMPT, seconds="0.3", extra_body={"seed": SEED}, poll_interval_ms=20
            )
            assert (made.status, made.prompt, made.seconds, made.error) == ("completed", PROMPT, "0.31", None)
            data = (await videos.download_content(made.id)).content
            film = decoded(data)
            with av.open(io.BytesIO(data)) as container:
                assert container.metadata["title"] == PROMPT
                assert f"Seed: {SEED}" in container.metadata["comment"]
            thumbnail = (await videos.download_content(made.id, variant="thumbnail")).content
            sheet = (await videos.download_content(made.id, variant="spritesheet")).content
            height, width = film.shape[1:3]
            assert Image.open(io.BytesIO(thumbnail)).size == (width, height)
            assert Image.open(io.BytesIO(sheet)).size == (5 * width, height)

            remix = await videos.poll((await videos.remix(made.id, prompt="a small ship")).id, poll_interval_ms=20)
            assert (remix.status, remix.remixed_from_video_id, remix.seconds) == ("completed", made.id, "0.31")
            assert not np.array_equal(decoded((await videos.download_content(remix.id)).content), film)
            await videos.delete(made.id)
            with pytest.raises(openai.NotFoundError):
                await videos.download_content(made.id, variant="thumbnail")
            ids = [video.id async for video in await videos.list(limit=1)]
            assert ids[0] == remix.id
            assert made.id not in ids
            await videos.delete(remix.id)

            running = await videos.create(model="wan", prompt=PROMPT, extra_body={"num_inference_steps": 50})
            assert running.status != "completed"
            assert (await videos.delete(running.id)).deleted
            with pytest.raises(openai.NotFoundError):
                await videos.retrieve(running.id)

    on_cluster(scenario)


@pytest.mark.shared_cluster("models")
def test_a_video_with_sound_has_both(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> tuple[bytes, bytes]:
        async with client_of(cluster, "sound") as client:
            _, film = await client.make("with-sound", Output(), num_frames=9, frame_rate=30.0)
            _, archive = await client.make("frames-and-sound", Output("zip"), num_frames=9, frame_rate=30.0)
            return film, archive

    film, archive = on_cluster(scenario)
    with zipfile.ZipFile(io.BytesIO(archive)) as frames:
        assert frames.namelist() == [*(f"{k:05}.png" for k in range(9)), "sound.wav"]
        sound = frames.read("sound.wav")
    with av.open(io.BytesIO(film)) as container, av.open(io.BytesIO(sound)) as alone:
        (video,), (audio,), (pcm,) = container.streams.video, container.streams.audio, alone.streams.audio
        assert (video.frames, video.average_rate) == (9, 30), "as the request asks"
        assert (audio.codec_context.name, audio.rate, audio.channels) == ("aac", 16000, 2)
        assert (pcm.rate, pcm.channels) == (16000, 2)
        lengths = [stream.duration * stream.time_base for stream in (audio, pcm)]
        assert abs(lengths[0] - lengths[1]) < 0.001
