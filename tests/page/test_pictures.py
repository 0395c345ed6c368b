"""Pictures of the page for the documentation; `make page-pictures` puts them into docs/images."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.page.conftest import PHONE
from tests.page.test_page import generate, image_file, tiles
from tests.system.conftest import BOUND_S
from triptych.api.launch import Cluster

pytestmark = [pytest.mark.page, pytest.mark.timeout(300)]
expect.set_options(timeout=BOUND_S * 1000)
MAX_BYTES = 200_000
PROMPTS = (
    "a large red circle on the left of a blue background",
    "a small yellow square on the right of a black background",
    "a large purple triangle on the left of a yellow background",
    "a small white circle in the centre of a red background",
    "a large cyan triangle on the right of a black background",
    "a large orange circle in the centre of a purple background",
    "a small blue square in the centre of a pink background",
    "a large green square on the left of a white background",
    "a small pink circle on the right of a green background",
    "a large black triangle in the centre of a cyan background",
    "a large white square on the right of an orange background",
    "a small red triangle on the left of a cyan background",
    "a large blue circle on the right of a white background",
    "a large yellow triangle in the centre of a blue background",
)


def save(page: Page, path: Path) -> None:
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    # Seven bits of each colour: nobody sees it, and the file is a quarter smaller.
    image.point(lambda value: value & 0xFE | value >> 7).save(path, optimize=True)
    assert path.stat().st_size < MAX_BYTES


def test_pictures(cluster: Cluster, api: httpx.Client, open_page: Callable[..., Page], folder: Path) -> None:
    for seed, prompt in enumerate(PROMPTS):
        body = {"prompt": prompt, "seed": seed, "num_inference_steps": 16}
        api.post("/v1/images/generations", json=body).raise_for_status()
    desktop = {"viewport": {"width": 1280, "height": 860}}
    light = open_page(cluster.url, **desktop)
    expect(tiles(light, "DONE")).to_have_count(len(PROMPTS))
    light.locator("#composer[data-state=ready]").wait_for()
    generate(light, "a large green circle in the centre of a yellow background", Steps="2500", Seed="7")
    expect(tiles(light, "DENOISING_RUNNING").locator("img")).to_be_visible()
    expect(light.locator(".words").first).to_contain_text("Denoising")
    save(light, folder / "page-light.png")

    dark = open_page(cluster.url, color_scheme="dark", **desktop)
    expect(tiles(dark, "DONE").locator("img")).to_have_count(len(PROMPTS))
    tiles(dark, "DONE").nth(8).get_by_role("button").click()
    expect(dark.locator(".stage > img")).to_be_visible()
    expect(dark.get_by_text("Loading")).to_have_count(0)
    save(dark, folder / "page-dark.png")

    phone = open_page(cluster.url, color_scheme="dark", viewport=PHONE, device_scale_factor=2, is_mobile=True)
    expect(tiles(phone, "DONE").locator("img")).to_have_count(len(PROMPTS))
    save(phone, folder / "page-phone.png")

    first = api.get("/v1/requests", params={"order": "asc"}).json()["data"][0]
    start = api.get(f"/v1/images/{first['units'][0]['artifact']['name']}").content
    light.get_by_label("Model").select_option("inpainting")
    light.locator("[data-slot=image] input").set_input_files(image_file(start))
    light.get_by_role("button", name="Paint a mask").click()
    box = light.locator("canvas").bounding_box()
    assert box
    points = [(0.2, 0.5), (0.3, 0.35), (0.42, 0.42), (0.38, 0.6), (0.25, 0.62)]
    for number, (x, y) in enumerate(points):
        light.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] * y, steps=6)
        if not number:
            light.mouse.down()
    light.mouse.up()
    save(light, folder / "page-mask.png")
