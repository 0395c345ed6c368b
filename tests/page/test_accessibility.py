"""What axe-core finds, in each view of the page, in light and dark, on a desktop and on a phone: nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.page.conftest import DESKTOP, PHONE
from tests.page.test_page import MANY, generate, image_file, png, tiles
from tests.system.conftest import BOUND_S
from triptych.api.launch import Cluster

pytestmark = [pytest.mark.page, pytest.mark.timeout(300)]
expect.set_options(timeout=BOUND_S * 1000)


def violations(page: Page, view: str) -> list[str]:
    """What is wrong with the page as it is."""
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = Axe().run(page, options={"runOnly": {"type": "tag", "values": tags}})
    return [
        f"{view}: {rule['id']}: {node['html']} {node['failureSummary']}"
        for rule in found.response["violations"]
        for node in rule["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing(
    cluster: Cluster, api: httpx.Client, open_page: Callable[..., Page], scheme: str, viewport: dict[str, Any]
) -> None:
    page = open_page(cluster.url, viewport=viewport, color_scheme=scheme)
    page.locator("#composer[data-state=ready]").wait_for()
    found = list[str]()
    found += violations(page, "empty")
    generate(page, Steps="4")
    expect(tiles(page, "DONE")).to_have_count(1)
    generate(page, Steps=MANY)
    expect(tiles(page, "DENOISING_RUNNING").locator("img")).to_be_visible()
    page.get_by_role("button", name="More parameters").click()
    page.get_by_text("Advanced", exact=True).click()
    found += violations(page, "gallery")
    tiles(page, "DENOISING_RUNNING").get_by_role("button").click()
    found += violations(page, "in progress")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("dialog").get_by_text("Cancelled", exact=True)).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".stage > img")).to_be_visible()
    found += violations(page, "image")
    page.keyboard.press("Escape")
    page.get_by_label("Model").select_option("inpainting")
    page.locator("[data-slot=image] input").set_input_files(image_file(png()))
    page.get_by_role("button", name="Paint a mask").click()
    page.get_by_text("By numbers").click()
    found += violations(page, "painter")
    page.keyboard.press("Escape")
    found += violations(page, "images in")
    page.get_by_role("link", name="System").click()
    found += violations(page, "system")
    assert not found
