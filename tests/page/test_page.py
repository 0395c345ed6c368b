"""What people do with the page, with real clicks and keys, on a running system."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, Route, expect

from tests.page.conftest import PHONE, Background, launched
from tests.system.conftest import BOUND_S, SharedModel, write_models
from triptych.api.launch import Cluster

pytestmark = [pytest.mark.page, pytest.mark.timeout(300)]
expect.set_options(timeout=BOUND_S * 1000)
MANY = "2500"
"""Steps that take a while."""
PROMPT = "a large red circle on the left of a blue background"
LIST = re.compile(r"/v1/requests\?")
"""Of the gallery."""
RESTARTING: dict[str, dict[str, Any]] = {
    "error": {"message": "The head restarts.", "type": "server_error", "param": None, "code": "unavailable"}
}
"""An error of the API."""
COUNT_WHITE = """async image => {
    await image.decode();
    const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight), context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const {data} = context.getImageData(0, 0, canvas.width, canvas.height);
    return [canvas.width, canvas.height, data.filter((value, at) => at % 4 == 0 && value > 127).length];
}"""
"""Width and height of an image, and how many pixels of it are white."""
LAYOUT_SHIFT = """() => new Promise(resolve => {
    let sum = 0;
    const add = list => list.getEntries().forEach(entry => sum += entry.value);
    new PerformanceObserver(add).observe({type: "layout-shift", buffered: true});
    requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(() => resolve(sum))));
})"""
"""The cumulative layout shift of a page so far."""


def generate(page: Page, prompt: str = PROMPT, **fields: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for label, value in fields.items():
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_role("button", name="Generate").click()


def tiles(page: Page, state: str = "") -> Locator:
    return page.locator(f".tile[data-state={state}]" if state else ".tile")


def look_for_others(page: Page) -> None:
    """Have the gallery ask now what others have made, as when its tab is looked at again."""
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def image_file(data: bytes, size: tuple[int, int] = (64, 64)) -> dict[str, object]:
    """A file for a form."""
    return {"name": "start.png", "mimeType": "image/png", "buffer": data}


def png(color: str = "navy", size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def test_an_image_is_made_and_still_there_after_a_reload(page: Page, api: httpx.Client) -> None:
    expect(page.get_by_text("Nothing has been made yet.")).to_be_visible()
    generate(page, Steps="4", Seed="3")
    expect(tiles(page, "DONE").locator("img")).to_be_visible()
    expect(page.locator(".facts")).to_contain_text("4 steps · seed 3")
    page.reload()
    image = tiles(page, "DONE").locator("img")
    expect(image).to_be_visible()
    assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [64, 64]
    (request,) = api.get("/v1/requests").json()["data"]
    assert request["inputs"]["prompt"] == PROMPT
    assert (request["units"][0]["seed"], request["inputs"]["num_inference_steps"]) == (3, 4)


def test_what_others_make_appears_without_a_reload(page: Page, api: httpx.Client) -> None:
    api.post("/v1/images/generations", json={"prompt": "made elsewhere", "n": 2})
    expect(tiles(page, "DONE")).to_have_count(2)


def test_progress_shows_partial_images_and_can_be_cancelled(page: Page, api: httpx.Client) -> None:
    generate(page, Steps=MANY)
    tile = tiles(page, "DENOISING_RUNNING")
    expect(tile.locator(".words")).to_contain_text(f"of {MANY}")
    expect(tile.locator("img")).to_be_visible()  # a partial image, while it goes on
    page.reload()
    expect(tiles(page, "DENOISING_RUNNING").locator("img")).to_be_visible()
    tiles(page).get_by_role("button").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("progressbar")).to_be_visible()
    dialog.get_by_role("button", name="Cancel").click()
    expect(dialog.get_by_text("Cancelled", exact=True)).to_be_visible()
    assert api.get("/v1/requests").json()["data"][0]["state"] == "CANCELLED"


def test_again_vary_seed_download_and_delete(page: Page, api: httpx.Client) -> None:
    generate(page, Steps="7", Seed="11")
    expect(tiles(page, "DONE")).to_have_count(1)
    page.get_by_label("Prompt", exact=True).fill("something else")
    page.get_by_label("Steps", exact=True).fill("5")
    tiles(page).get_by_role("button").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_text(PROMPT)).to_be_visible()
    with page.expect_download() as waiting:
        dialog.get_by_role("link", name="Download").click()
    name = api.get("/v1/requests").json()["data"][0]["units"][0]["artifact"]["name"]
    assert waiting.value.suggested_filename == name
    assert waiting.value.path().read_bytes() == api.get(f"/v1/images/{name}").content

    dialog.get_by_role("button", name="Use again").click()
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
    expect(page.get_by_label("Steps", exact=True)).to_have_value("7")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("11")

    tiles(page).get_by_role("button").click()
    dialog.get_by_role("button", name="Vary seed").click()
    expect(tiles(page, "DONE")).to_have_count(2)
    first, second = (request for request in api.get("/v1/requests").json()["data"])
    assert first["inputs"] == second["inputs"]
    assert first["units"][0]["seed"] != second["units"][0]["seed"]

    tiles(page).first.get_by_role("button").click()
    dialog.get_by_role("button", name="Delete").click()
    dialog.get_by_role("button", name="Delete for good?").click()
    expect(tiles(page)).to_have_count(1)
    assert [request["id"] for request in api.get("/v1/requests").json()["data"]] == [second["id"]]


def test_a_painted_mask_says_what_is_made_anew(page: Page, api: httpx.Client) -> None:
    page.get_by_label("Model").select_option("inpainting")
    page.locator("[data-slot=image] input").set_input_files(image_file(png()))
    page.get_by_role("button", name="Paint a mask").click()
    painter = page.get_by_role("dialog")
    box = painter.locator("canvas").bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    painter.get_by_role("button", name="Use mask").click()
    slot = page.locator("[data-slot=mask_image]")
    width, height, white = slot.locator("img").evaluate(COUNT_WHITE)
    assert (width, height) == (64, 64)
    assert 13 * 8 < white < 64 * 20, "a stroke of 13 pixels with a brush of radius 8"

    generate(page, "a boat", Steps="4")
    expect(tiles(page, "DONE")).to_have_count(1)
    inputs = api.get("/v1/requests").json()["data"][0]["inputs"]
    assert inputs["mask_image"][0]["bytes"] > 0

    page.reload()  # the files of the request are kept in this browser
    tiles(page, "DONE").get_by_role("button").click()
    page.get_by_role("button", name="Vary seed").click()
    expect(tiles(page, "DONE")).to_have_count(2)
    assert api.get("/v1/requests").json()["data"][0]["inputs"] == inputs


def test_a_mask_can_be_made_with_keys_alone(page: Page) -> None:
    page.get_by_label("Model").select_option("inpainting")
    page.locator("[data-slot=image] input").set_input_files(image_file(png(size=(48, 32))))
    page.get_by_role("button", name="Paint a mask").focus()
    page.keyboard.press("Enter")
    painter = page.get_by_role("dialog")
    painter.get_by_text("By numbers").focus()
    page.keyboard.press("Enter")
    for label, value in {"Left": "8", "Top": "4", "Width": "16", "Height": "8"}.items():
        painter.get_by_label(label).focus()
        page.keyboard.press("Control+a")
        page.keyboard.type(value)
    painter.get_by_role("button", name="Fill rectangle").focus()
    page.keyboard.press("Enter")
    painter.get_by_role("button", name="Use mask").focus()
    page.keyboard.press("Enter")
    shown = page.locator("[data-slot=mask_image] img").evaluate(COUNT_WHITE)
    assert shown == [48, 32, 16 * 8]


def test_an_image_is_dropped_and_one_that_was_made_is_edited(page: Page, api: httpx.Client) -> None:
    generate(page, Seed="1")
    expect(tiles(page, "DONE")).to_have_count(1)
    page.get_by_label("Model").select_option("inpainting")
    dropped = page.evaluate_handle(
        """data => { const moved = new DataTransfer();
        moved.items.add(new File([new Uint8Array(data)], 'dropped.png', {type: 'image/png'})); return moved; }""",
        list(png("green")),
    )
    page.dispatch_event("#prompt", "drop", {"dataTransfer": dropped})
    expect(page.get_by_alt_text("dropped.png")).to_be_visible()
    tiles(page).get_by_role("button").click()
    page.get_by_role("button", name="Edit").click()
    expect(page.locator("[data-slot=image] img")).to_have_count(1)
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    expect(page.get_by_alt_text("dropped.png")).to_have_count(0)
    page.get_by_role("button", name="Remove image").click()
    expect(page.locator("[data-slot=image] img")).to_have_count(0)


def test_a_video_plays(page: Page) -> None:
    page.get_by_label("Model").select_option("wan")
    expect(page.get_by_placeholder("Describe a video")).to_be_visible()
    generate(page, "a boat", Steps="2", Frames="5")
    expect(tiles(page, "DONE").locator("video")).to_be_visible()
    tiles(page).get_by_role("button").click()
    page.wait_for_function("() => document.querySelector('.stage video')?.readyState > 1")


def test_what_is_wrong_is_said_beside_its_field(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert").first).to_contain_text("prompt")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.get_by_role("button", name="More parameters").click()
    page.get_by_label("Max sequence length").fill("17")  # the limit is 16
    generate(page)
    assert page.get_by_label("Max sequence length").evaluate("input => input.validity.rangeOverflow")
    expect(tiles(page)).to_have_count(0)


def test_a_prompt_is_text_whatever_it_says(page: Page) -> None:
    text = '<img src="x" onerror="document.title = 1"><b>bold</b>'
    generate(page, text)
    expect(tiles(page, "DONE").locator(".prompt")).to_have_text(text)
    tiles(page).get_by_role("button").click()
    expect(page.get_by_role("dialog").locator(".prompt")).to_have_text(text)
    assert page.title() == "Triptych"


def test_all_of_it_works_with_keys_alone(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.type(PROMPT)
    page.keyboard.press("Enter")
    expect(tiles(page, "DONE")).to_have_count(1)
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "frame":
            break
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).not_to_be_visible()
    assert page.evaluate("document.activeElement.className") == "frame"


def test_nothing_is_wider_than_a_phone(page: Page, cluster: Cluster, open_page: Callable[..., Page]) -> None:
    generate(page)
    expect(tiles(page, "DONE")).to_have_count(1)
    phone = open_page(cluster.url, viewport=PHONE, has_touch=True, is_mobile=True)
    phone.locator("#composer[data-state=ready]").wait_for()
    phone.get_by_role("button", name="More parameters").click()
    expect(tiles(phone, "DONE")).to_have_count(1)
    width = "[document.documentElement.scrollWidth, innerWidth]"
    assert phone.evaluate(width) == [360, 360]
    tiles(phone).get_by_role("button").click()
    assert phone.evaluate(width) == [360, 360]
    phone.get_by_role("button", name="Close").click()
    phone.get_by_role("link", name="System").click()
    assert phone.evaluate(width) == [360, 360]


def test_nothing_moves_while_it_loads(page: Page, cluster: Cluster, open_page: Callable[..., Page]) -> None:
    generate(page)
    expect(tiles(page, "DONE")).to_have_count(1)
    again = open_page(cluster.url)
    expect(tiles(again, "DONE").locator("img")).to_be_visible()
    assert again.evaluate(LAYOUT_SHIFT) == 0


def test_where_a_key_is_needed_it_is_asked_for_and_kept_in_the_tab(
    background: Background, models: Callable[[str], Path], tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    key = "ada-0123456789abcdef"
    (tmp_path / "keys").write_text(f"ada:{key}\n")
    (tmp_path / "keys").chmod(0o600)
    file = write_models(tmp_path, {"sdxl": SharedModel("sdxl", task="any")}, models)
    file.write_text(f'{file.read_text()}[api]\nkeys_file = "keys"\n')
    with launched(background, file) as cluster:
        page = open_page(cluster.url)
        dialog = page.get_by_role("dialog", name="API key")
        dialog.get_by_label("Key").fill("not-a-key-of-this-server")
        dialog.get_by_role("button", name="Use key").click()
        expect(dialog.get_by_text("does not know this key")).to_be_visible()
        dialog.get_by_label("Key").fill(key)
        dialog.get_by_role("button", name="Use key").click()
        generate(page, Steps="2")
        expect(tiles(page, "DONE").locator("img")).to_be_visible()
        assert page.evaluate("localStorage.length") == 0
        page.reload()
        expect(tiles(page, "DONE").locator("img")).to_be_visible()
        tiles(page).get_by_role("button").click()
        with page.expect_download() as waiting:
            page.get_by_role("link", name="Download").click()
        assert waiting.value.path().read_bytes().startswith(b"\x89PNG")
        page.get_by_role("button", name="Edit").click()
        expect(page.locator("[data-slot=image] img")).to_be_visible()
        assert page.locator("[data-slot=image] img").evaluate(COUNT_WHITE)[:2] == [64, 64]


def test_without_its_images_a_request_is_not_made_again(page: Page, api: httpx.Client) -> None:
    files = {name: (f"{name}.png", png(), "image/png") for name in ("image", "mask_image")}
    form = {"model": "inpainting", "prompt": "made elsewhere", "num_inference_steps": "4"}
    api.post("/v1/images/generations", data=form, files=files).raise_for_status()
    look_for_others(page)
    for name in ("Vary seed", "Use again"):
        tiles(page, "DONE").get_by_role("button").click()
        page.get_by_role("dialog").get_by_role("button", name=name).click()
        expect(page.locator("#problem")).to_contain_text("not in this browser")
        page.get_by_label("Prompt", exact=True).fill("something else")
        expect(page.locator("#problem")).to_be_empty()
    assert len(api.get("/v1/requests").json()["data"]) == 1


def test_enter_sends_one_request(page: Page, api: httpx.Client) -> None:
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": []}))
    page.reload()
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.keyboard.press("Enter")  # no model is known yet
    page.unroute("**/v1/models")
    page.locator("#composer[data-state=ready]").wait_for()
    sent = list[Route]()
    page.route("**/v1/images/generations", lambda route: sent.append(route))
    with page.expect_request("**/v1/images/generations"):
        page.keyboard.down("Enter")
    page.keyboard.down("Enter")  # it is held
    page.keyboard.up("Enter")
    page.keyboard.press("Enter")  # the first one has no answer yet
    sent[0].continue_()
    expect(tiles(page, "DONE")).to_have_count(1)
    assert len(sent) == 1


def test_the_gallery_is_loaded_although_it_failed_once(page: Page, api: httpx.Client) -> None:
    api.post("/v1/images/generations", json={"prompt": PROMPT, "num_inference_steps": 1}).raise_for_status()
    page.route(LIST, lambda route: route.fulfill(status=503, json=RESTARTING), times=1)
    page.reload()
    expect(tiles(page, "DONE")).to_have_count(1)
    expect(page.locator("#gallery-problem")).to_be_empty()


def test_requests_are_shown_by_their_age_whatever_their_ids_are(page: Page, api: httpx.Client) -> None:
    task = {"task_id": str(uuid4()), "prompt": "a task with a name", "model": "shapes", "infer_steps": 1}
    api.post("/v1/tasks/image/", json=task).raise_for_status()
    look_for_others(page)
    expect(tiles(page, "DONE")).to_have_count(1)
    body = {"prompt": "one without", "num_inference_steps": 1}
    api.post("/v1/images/generations", json=body).raise_for_status()
    look_for_others(page)
    expect(tiles(page, "DONE").locator(".prompt")).to_have_text(["one without", "a task with a name"])


def test_older_requests_follow_on_those_that_are_left(
    cluster: Cluster, api: httpx.Client, open_page: Callable[..., Page]
) -> None:
    for number in range(26):
        body = {"prompt": f"number {number}", "num_inference_steps": 1}
        api.post("/v1/images/generations", json=body).raise_for_status()
    page = open_page(cluster.url)
    expect(tiles(page)).to_have_count(24)
    tiles(page).last.get_by_role("button").click()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete for good?").click()
    expect(tiles(page)).to_have_count(23)
    elsewhere = tiles(page).last.get_attribute("data-request")
    api.delete(f"/v1/requests/{elsewhere}").raise_for_status()
    page.route(LIST, lambda route: route.fulfill(status=503, json=RESTARTING), times=1)
    older = page.get_by_role("button", name="Show older")
    older.click()
    expect(page.locator("#gallery-problem")).to_have_text(RESTARTING["error"]["message"])
    older.click()
    expect(tiles(page)).to_have_count(24)
    expect(tiles(page).last.locator(".prompt")).to_have_text("number 0")
    expect(older).to_be_hidden()
    expect(page.locator("#gallery-problem")).to_be_empty()


def test_the_images_of_the_oldest_requests_are_forgotten_first(page: Page) -> None:
    kept = page.evaluate(
        """async () => {
            const {filesOf, keepFiles} = await import("/page/kept.js");
            const ids = Array.from({length: 41}, (_, number) => `req_${99 - number}`);
            for (const id of ids) {
                const now = Date.now();
                await keepFiles(id, [["image", new File([id], "a.png")]]);
                while (Date.now() === now);
            }
            return Promise.all(ids.map(async id => (await filesOf(id)).length));
        }"""
    )
    assert kept == [0, *[1] * 40]


def test_an_error_of_the_page_ends_the_following_of_events(page: Page) -> None:
    with page.expect_event("requestfailed", lambda request: request.url.endswith("/v1/cluster/events")):
        ended = page.evaluate(
            """() => import("/page/api.js").then(({follow}) => new Promise(resolve => {
                let events = 0;
                const take = () => { if (events++) resolve("it went on"); throw new Error("an error"); };
                follow("v1/cluster/events", take, new AbortController().signal).catch(error => resolve(error.message));
            }))"""
        )
    assert ended == "an error"


def test_why_a_file_is_not_shown_is_said(page: Page, api: httpx.Client) -> None:
    files, answer = "**/v1/images/*.png", {"status": 503, "json": RESTARTING}
    page.route(files, lambda route: route.fulfill(**answer))
    api.post("/v1/images/generations", json={"prompt": PROMPT, "num_inference_steps": 1}).raise_for_status()
    for status, words in ((503, RESTARTING["error"]["message"]), (410, "This file is not kept any more")):
        answer["status"] = status
        page.reload()
        expect(tiles(page).locator(".words")).to_have_text(words)
        tiles(page).get_by_role("button").click()
        expect(page.locator(".viewer > .stage")).to_have_text(words)


def test_what_keeps_a_timeline_from_going_on_is_said(page: Page) -> None:
    generate(page, Steps="20000")
    tiles(page, "DENOISING_RUNNING").get_by_role("button").click()
    head = page.locator(".timeline-head")
    expect(head).to_contain_text("Under way for")
    one = re.compile("/v1/requests/[^/]+$")
    page.route(one, lambda route: route.fulfill(status=503, json=RESTARTING))
    expect(head).to_have_text(RESTARTING["error"]["message"])
    page.unroute(one)
    expect(head).to_contain_text("Under way for")


def test_a_priority_and_a_deadline_are_under_advanced(page: Page, api: httpx.Client) -> None:
    page.get_by_role("button", name="More parameters").click()
    priority, deadline = page.get_by_label("Priority", exact=True), page.get_by_label("Deadline", exact=True)
    expect(priority).to_be_hidden()
    fold = page.get_by_text("Advanced", exact=True)
    fold.click()
    priority.fill("101")
    fold.click()
    generate(page, Steps="1")
    expect(priority).to_be_focused()  # it is shown again, since it is wrong
    priority.fill("7")
    deadline.fill("60")
    generate(page)
    expect(tiles(page, "DONE")).to_have_count(1)
    (request,) = api.get("/v1/requests").json()["data"]
    assert (request["priority"], request["deadline_s"]) == (7, 60)
    priority.fill("")
    tiles(page).get_by_role("button").click()
    page.get_by_role("dialog").get_by_role("button", name="Use again").click()
    expect(priority).to_have_value("7")
    expect(deadline).to_have_value("60")
