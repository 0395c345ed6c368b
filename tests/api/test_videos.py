"""Videos are jobs: begun, asked about, fetched, remixed, cancelled, removed."""

from __future__ import annotations

import asyncio
import base64
import errno
import io

import msgspec
import pytest
from PIL import Image

from tests.video_files import film
from triptych.engines.parameters.schema import Parameter, ParameterKind
from triptych.roles.messages import requests as wire

pytestmark = pytest.mark.anyio
URL = "/v1/videos"
PARAMETERS = (
    Parameter("fps", ParameterKind.NUMBER),
    Parameter("image", ParameterKind.IMAGES),
    Parameter("last_image", ParameterKind.IMAGE),
    Parameter("num_frames", ParameterKind.INTEGER, every=4),
    Parameter("prompt", ParameterKind.TEXT, required=True),
)


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def model_of_videos(fake_head):
    fake_head.description = msgspec.structs.replace(
        fake_head.description, parameters=PARAMETERS, medium="video", fps=16.0, defaults={"height": 64, "width": 48}
    )


async def submitted(fake_head) -> wire.SubmitRequest:
    (submit,) = await fake_head.received(wire.SubmitRequest)
    return submit


def refused(answer, status: int, param: str | None, *words: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    for word in words:
        assert word in error["message"]


async def test_a_video_is_a_job_from_its_beginning_to_its_file(client, fake_head):
    fake_head.hold = True
    begun = await client.post(
        URL, json={"prompt": "x", "seconds": "2", "size": "64x32", "seed": 7, "model": "tiny/shapes"}
    )
    assert begun.status_code == 200, begun.text
    job = begun.json()
    assert begun.headers["x-request-id"] == job["id"]
    submit = await submitted(fake_head)
    assert (submit.seed, submit.n, submit.output.format) == (7, 1, "mp4")
    assert submit.inputs == {"prompt": "x", "num_frames": 33, "height": 32, "width": 64}
    assert job == {
        "id": submit.request_id, "object": "video", "status": "in_progress", "progress": 50, "model": "tiny/shapes",
        "created_at": job["created_at"], "completed_at": None, "seconds": "2.06", "size": "64x32", "error": None,
        "prompt": "x", "expires_at": None, "remixed_from_video_id": None,
    }  # fmt: skip
    refused(await client.get(f"{URL}/{job['id']}/content"), 409, None, "in progress")
    fake_head.finish(job["id"])
    done = (await client.get(f"{URL}/{job['id']}")).json()
    assert (done["status"], done["progress"]) == ("completed", 100)
    assert done["completed_at"] >= done["created_at"]
    assert done["expires_at"] == done["completed_at"] + 86_400, "the request is kept for a day, the file for a week"
    content = await client.get(f"{URL}/{job['id']}/content")
    assert (content.headers["content-type"], content.content) == ("video/mp4", film())


@pytest.mark.parametrize(
    ("state", "status", "progress"),
    [("PENDING", "queued", 0), ("ENCODER_WAITING", "queued", 0), ("DECODER_RUNNING", "in_progress", 99)],
)
async def test_how_far_it_is(client, fake_head, state, status, progress):
    fake_head.hold = True
    job = (await client.post(URL, json={"prompt": "x"})).json()
    accepted = fake_head.journal[job["id"]]
    accepted.state = state
    if status == "queued":
        fake_head.steps = (0, 0)
    shown = (await client.get(f"{URL}/{job['id']}")).json()
    assert (shown["status"], shown["progress"]) == (status, progress)


@pytest.mark.parametrize(("state", "word"), [("FAILED", "failed"), ("TIMED_OUT", "failed"), ("CANCELLED", "failed")])
async def test_one_that_ends_without_a_file_says_why(client, fake_head, state, word):
    fake_head.hold = True
    job = (await client.post(URL, json={"prompt": "x"})).json()
    fake_head.finish(job["id"], state, ("encoder-0: a reason",))
    shown = (await client.get(f"{URL}/{job['id']}")).json()
    assert (shown["status"], shown["completed_at"]) == (word, None)
    if word == "failed":
        assert shown["error"] == {"code": state.lower(), "message": "encoder-0: a reason"}
    refused(await client.get(f"{URL}/{job['id']}/content"), 409, None, word)


async def test_cancel_keeps_what_is_known_and_ends_the_polling(client, fake_head):
    fake_head.hold = True
    begun = await client.post(URL, json={"prompt": "x"})
    assert int(begun.headers["openai-poll-after-ms"]) > 0
    for _ in range(2):
        answer = await client.post(f"{URL}/{begun.json()['id']}/cancel")
        assert (answer.json()["status"], answer.json()["error"]["code"]) == ("failed", "cancelled")
        assert "openai-poll-after-ms" not in answer.headers
    assert (await client.post(f"{URL}/video_none/cancel")).status_code == 404


@pytest.mark.parametrize("hold", [True, False])
async def test_delete_removes_it_also_while_it_runs(client, fake_head, hold):
    fake_head.hold = hold
    job = (await client.post(URL, json={"prompt": "x"})).json()
    gone = {"id": job["id"], "object": "video.deleted", "deleted": True}
    assert (await client.delete(f"{URL}/{job['id']}")).json() == gone
    await fake_head.received(wire.DeleteRequest)
    for method, path in (("DELETE", ""), ("GET", ""), ("GET", "/content")):
        refused(await client.request(method, f"{URL}/{job['id']}{path}"), 404, None)


async def test_videos_are_listed_page_by_page(client, fake_head):
    ids = [(await client.post(URL, json={"prompt": f"{k}"})).json()["id"] for k in range(3)]
    assert (await client.get(URL)).json()["has_more"] is False
    page = (await client.get(URL, params={"limit": 2})).json()
    assert [video["id"] for video in page["data"]] == ids[:0:-1]
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[2], ids[1], True)
    last = (await client.get(URL, params={"limit": 2, "after": ids[1]})).json()
    assert ([video["id"] for video in last["data"]], last["has_more"]) == ([ids[0]], False)
    assert [video["id"] for video in (await client.get(URL, params={"order": "asc"})).json()["data"]] == ids
    empty = (await client.get(URL, params={"after": ids[0]})).json()
    assert (empty["data"], empty["first_id"], empty["last_id"]) == ([], None, None)


@pytest.mark.parametrize(
    ("query", "status", "param", "words"),
    [
        ({"limit": 0}, 422, "limit", "limit must be a whole number from 1 to 100"),
        ({"limit": "all"}, 422, "limit", "a whole number"),
        ({"order": "up"}, 422, "order", "order must be one of asc, desc"),
        ({"after": "nothing"}, 404, "after", "no video nothing"),
    ],
)
async def test_a_list_names_what_is_wrong_with_its_query(client, fake_head, query, status, param, words):
    refused(await client.get(URL, params=query), status, param, words)


async def test_a_form_with_a_first_and_a_last_frame(client, fake_head, uploads):
    files = {"input_reference": png(), "last_image": png()}
    answer = await client.post(URL, data={"prompt": "x", "seconds": "0.5", "fps": "8", "seed": "3"}, files=files)
    assert answer.status_code == 200, answer.text
    submit = await submitted(fake_head)
    assert (submit.seed, submit.inputs["num_frames"], submit.inputs["fps"]) == (3, 5, 8.0)
    assert submit.inputs["image"] == submit.inputs["last_image"]
    assert uploads.read(submit.inputs["image"].files[0]) == png()


async def test_a_first_frame_in_json(client, fake_head):
    image = base64.b64encode(png()).decode()
    await client.post(URL, json={"prompt": "x", "num_frames": 5, "input_reference": image})
    submit = await submitted(fake_head)
    assert submit.inputs["num_frames"] == 5
    assert len(submit.inputs["image"].files) == 1


async def test_a_key_sent_again_gives_the_same_job(client, fake_head):
    jobs = [(await client.post(URL, json={"prompt": "x"}, headers={"Idempotency-Key": "k"})).json() for _ in range(2)]
    assert jobs[0]["id"] == jobs[1]["id"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 3}, "prompt"),
        ({"seconds": 0}, "seconds"),
        ({"seconds": "long"}, "seconds"),
        ({"seconds": 1e9}, "seconds"),
        ({"seconds": 2, "num_frames": 5}, "seconds"),
        ({"seconds": 2, "fps": "many"}, "seconds"),
        ({"seconds": 2, "fps": -1}, "seconds"),
        ({"seconds": 2, "fps": 0}, "seconds"),
        ({"size": "large"}, "size"),
        ({"last_image": "https://example.org/a.png"}, "last_image"),
    ],
)
async def test_422_names_the_field(client, fake_head, fields, param):
    answer = await client.post(URL, json={"prompt": "x", **fields})
    refused(answer, 422, param)
    assert not fake_head.journal


async def test_seconds_need_frames_per_second(client, fake_head):
    fake_head.description = msgspec.structs.replace(fake_head.description, fps=0.0)
    refused(await client.post(URL, json={"prompt": "x", "seconds": 2}), 422, "seconds", "give fps")
    assert (await client.post(URL, json={"prompt": "x", "seconds": 2, "fps": 8})).status_code == 200


async def test_a_model_of_images_makes_no_videos(client, fake_head):
    fake_head.description = msgspec.structs.replace(fake_head.description, medium="image")
    refused(await client.post(URL, json={"prompt": "x"}), 422, "model", "/v1/images/generations")
    made = (await client.post("/v1/images/generations", json={"prompt": "x"})).json()
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("POST", "/cancel"), ("POST", "/remix")):
        refused(await client.request(method, f"{URL}/{made['id']}{path}"), 404, None)
    assert len(fake_head.journal) == 1


async def test_503_before_the_model_is_known(client, fake_head):
    fake_head.description = msgspec.structs.replace(fake_head.description, parameters=(), medium="image")
    answer = await client.post(URL, json={"prompt": "x"})
    refused(answer, 503, None, "no instance")
    assert answer.headers["retry-after"] == "1"


async def test_what_is_not_there(client, fake_head):
    for method, path in (("GET", "nothing"), ("DELETE", "nothing"), ("GET", "nothing/content")):
        refused(await client.request(method, f"{URL}/{path}"), 404, None)
    refused(await client.post(URL, json={"prompt": "x", "model": "sora-2"}), 404, "model", "sora-2")
    made = (await client.post(URL, json={"prompt": "x"})).json()
    refused(await client.get(f"{URL}/{made['id']}/content", params={"variant": "poster"}), 422, "variant", "one of")
    refused(await client.post(f"{URL}/{made['id']}"), 405, None)


async def test_a_file_that_is_gone(client, fake_head, store):
    made = (await client.post(URL, json={"prompt": "x"})).json()
    for file in store.files.folder.iterdir():
        file.unlink()
    for variant in ("video", "thumbnail", "spritesheet"):
        refused(await client.get(f"{URL}/{made['id']}/content", params={"variant": variant}), 410, None)


async def test_a_variant_is_made_once_and_goes_with_its_video(client, store):
    made = (await client.post(URL, json={"prompt": "x"})).json()
    url = f"{URL}/{made['id']}/content"
    asked = [client.get(url, params={"variant": "thumbnail"}) for _ in range(4)]
    answers = await asyncio.gather(*asked)
    assert len({answer.content for answer in answers}) == 1
    assert {answer.headers["etag"] for answer in answers} == {answers[0].headers["etag"]}, "one file"
    sheet = await client.get(url, params={"variant": "spritesheet"}, headers={"Range": "bytes=0-3"})
    assert (sheet.status_code, sheet.content) == (206, b"\xff\xd8\xff\xe0")
    name = f"{made['id']}_0"
    files = [f"{name}.mp4", f"{name}.spritesheet.jpeg", f"{name}.thumbnail.webp"]
    assert sorted(path.name for path in store.files.folder.iterdir()) == files
    await client.delete(f"{URL}/{made['id']}")
    assert not list(store.files.folder.iterdir())


async def test_a_variant_of_a_video_that_is_deleted_meanwhile_stays_nowhere(client, fake_head, store, monkeypatch):
    made = (await client.post(URL, json={"prompt": "x"})).json()
    save = store.save

    def deleted_first(*args):
        del fake_head.journal[made["id"]]
        store.discard(f"{made['id']}/0")
        return save(*args)

    monkeypatch.setattr(store, "save", deleted_first)
    refused(await client.get(f"{URL}/{made['id']}/content", params={"variant": "thumbnail"}), 404, None)
    assert not list(store.files.folder.iterdir())


async def test_a_variant_that_cannot_be_kept_or_asked_about_leaves_nothing(client, fake_head, store, monkeypatch):
    made = (await client.post(URL, json={"prompt": "x"})).json()
    save, url = store.save, f"{URL}/{made['id']}/content"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "save", full)
    answer = await client.get(url, params={"variant": "thumbnail"})
    refused(answer, 503, "variant", "the server's disk is full: retry later")
    assert answer.json()["error"]["code"] == "disk_full"

    def unanswered(*args):
        fake_head.failures[wire.QueryRequest] = ["unavailable"]
        return save(*args)

    monkeypatch.setattr(store, "save", unanswered)
    refused(await client.get(url, params={"variant": "thumbnail"}), 503, None)
    assert [path.suffix for path in store.files.folder.iterdir()] == [".mp4"]


async def test_a_remix_has_all_of_the_other_one_but_the_prompt(client, fake_head, uploads):
    files = {"input_reference": png()}
    sent = {"prompt": "x", "seconds": "0.5", "fps": "8", "seed": "3"}
    old = (await client.post(URL, data=sent, files=files)).json()
    new = await client.post(f"{URL}/{old['id']}/remix", json={"prompt": "y"})
    assert new.status_code == 200, new.text
    assert (new.json()["prompt"], new.json()["remixed_from_video_id"]) == ("y", old["id"])
    first, second = await fake_head.received(wire.SubmitRequest, 2)
    assert (second.inputs, second.seed) == ({**first.inputs, "prompt": "y"}, 3)
    assert second.output == first.output
    uploads.files.remove(path.name for path in uploads.files.folder.iterdir())
    answer = await client.post(f"{URL}/{old['id']}/remix", json={"prompt": "y"})
    refused(answer, 410, "image", "is not kept any more")


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "is required"),
        ({"prompt": ""}, "prompt", "text of 1 to"),
        ({"prompt": "y", "size": "8x8"}, "size", "cannot be given here: this takes prompt"),
    ],
)
async def test_a_remix_takes_a_prompt_alone(client, fake_head, body, param, words):
    old = (await client.post(URL, json={"prompt": "x"})).json()
    refused(await client.post(f"{URL}/{old['id']}/remix", json=body), 422, param, words)
    assert len(fake_head.journal) == 1


async def test_images_among_the_videos_do_not_end_the_list(client, fake_head):
    first = (await client.post(URL, json={"prompt": "x"})).json()["id"]
    for _ in range(3):
        await client.post("/v1/images/generations", json={"prompt": "x"})
    last = (await client.post(URL, json={"prompt": "x"})).json()["id"]
    page = (await client.get(URL, params={"limit": 1})).json()
    assert ([video["id"] for video in page["data"]], page["has_more"]) == ([last], True)
    page = (await client.get(URL, params={"limit": 1, "after": last})).json()
    assert ([video["id"] for video in page["data"]], page["has_more"]) == ([first], False)


async def test_videos_of_a_model_that_is_served_no_more_are_still_there(client, fake_head, services):
    made = (await client.post(URL, json={"prompt": "x", "num_frames": 17})).json()
    view = fake_head.view
    fake_head.view = lambda request_id: msgspec.structs.replace(view(request_id), model="another")
    services.head.forget_descriptions()
    shown = (await client.get(f"{URL}/{made['id']}")).json()
    assert (shown["status"], shown["model"], shown["seconds"]) == ("completed", "another", None)
    assert (await client.get(URL)).json()["data"] == [shown]


async def test_what_the_model_chooses_is_shown_where_it_is_known(client, fake_head, services):
    parameters = (*PARAMETERS[:3], Parameter("num_frames", ParameterKind.INTEGER, 81), *PARAMETERS[4:])
    sides = tuple(Parameter(name, ParameterKind.INTEGER) for name in ("height", "width"))
    fake_head.description = msgspec.structs.replace(fake_head.description, parameters=(*parameters, *sides))
    made = (await client.post(URL, json={"prompt": "x"})).json()
    assert (made["seconds"], made["size"]) == ("5.06", "48x64")
    # A model that makes as many frames as it is sent takes no number of them, whatever its serving config has.
    fake_head.description = msgspec.structs.replace(
        fake_head.description, parameters=PARAMETERS[4:], defaults={"num_frames": 5}, version="2"
    )
    services.head.forget_descriptions()
    made = (await client.post(URL, json={"prompt": "y"})).json()
    assert (made["seconds"], made["size"]) == (None, None)


async def test_a_long_video_has_plain_seconds(client, fake_head):
    fake_head.description = msgspec.structs.replace(fake_head.description, fps=1.0)
    made = (await client.post(URL, json={"prompt": "x", "num_frames": 2001})).json()
    assert made["seconds"] == "2001"
