"""Video files as inputs: which are taken, and how they reach the head."""

from __future__ import annotations

import msgspec
import pytest

from tests.api.image_inputs import PNG, check, submitted, text
from tests.video_files import film
from triptych.api import uploads as uploads_module
from triptych.engines.parameters.schema import Parameter, ParameterKind
from triptych.roles.media.video_input import VideoLimits

pytestmark = pytest.mark.anyio
URL = "/v1/videos"


@pytest.fixture(autouse=True)
def model_of_videos(fake_head):
    parameters = (
        Parameter("last_image", ParameterKind.IMAGE),
        Parameter("prompt", ParameterKind.TEXT, required=True),
        Parameter("video", ParameterKind.IMAGE_LIST, required=True),
    )
    fake_head.description = msgspec.structs.replace(
        fake_head.description, parameters=parameters, medium="video", fps=16.0
    )


async def test_a_video_is_one_upload_in_a_form_and_in_json_under_openais_name_too(client, fake_head, uploads):
    sent = ("input_reference", ("clip.mp4", film(), "video/mp4"))
    for answer in (
        await client.post(URL, data={"prompt": "x"}, files=[sent]),
        await client.post(URL, json={"prompt": "x", "video": f"data:video/mp4;base64,{text(film())}"}),
    ):
        assert answer.status_code == 200, answer.text
    for accepted in fake_head.journal.values():
        (file,) = accepted.submit.inputs["video"].files
        assert file.name.endswith(".mp4")
        assert file.pixels == 3 * 32 * 16, "of all frames"
        assert uploads.read(file) == film()


async def test_frames_as_images_are_still_taken(client, fake_head):
    await client.post(URL, json={"prompt": "x", "video": [text(PNG)] * 3})
    assert len((await submitted(fake_head)).inputs["video"].files) == 3
    model = (await client.get("/v1/models")).json()["data"][0]
    assert [(each["name"], each.get("video")) for each in model["parameters"]] == [
        ("last_image", None), ("prompt", None), ("video", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"last_image": film()}, 415, "last_image", "must be an image, a PNG, JPEG or WebP"),
        ({"video": b"GIF89a"}, 415, "video", "or a video, an MP4 or WebM"),
        ({"video": film()[:300]}, 422, "video", "video is damaged or not complete"),
        ({"video": film(container="mov", codec="mjpeg")}, 415, "video", "video is mjpeg: send one of"),
        ({"video": film(5)}, 413, "video", "video must have at most 4 frames"),
        ({"video": [film(), film()]}, 422, "video", "must be one video, or images"),
    ],
    ids=["an image", "another format", "damaged", "another codec", "too many frames", "two"],
)
async def test_what_is_no_video_names_the_field(client, fake_head, uploads, monkeypatch, fields, status, param, words):
    monkeypatch.setattr(uploads_module, "VIDEO_LIMITS", VideoLimits(frames=4))
    files = [(name, data) for name, value in fields.items() for data in (value if isinstance(value, list) else [value])]
    check(await client.post(URL, data={"prompt": "x"}, files=files), status, param, words)
    assert not fake_head.journal
    assert not uploads.files.folder.exists()
