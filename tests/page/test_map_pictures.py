"""Pictures of the map and of a timeline for the documentation; `make page-pictures` puts them into docs/images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.page.conftest import Background
from tests.page.test_cluster_map import MANY, card, kill, knock_down, open_map, submit
from tests.page.test_page import tiles
from tests.page.test_pictures import save
from tests.system.conftest import BOUND_S
from triptych.api.launch import Cluster

pytestmark = [pytest.mark.page, pytest.mark.timeout(300)]
expect.set_options(timeout=BOUND_S * 1000)


def test_pictures_of_a_kill_and_of_a_timeline(
    small: Cluster, made: httpx.Client, background: Background, open_page: Callable[..., Page], folder: Path
) -> None:
    ids = [submit(made, steps=MANY + number, n=2) for number in range(4)]
    page = open_map(open_page, small, viewport={"width": 1280, "height": 980})
    expect(page.locator(".queue[data-stage=denoiser]")).to_contain_text("4 waiting, 4 assigned")
    knock_down(page, background, small, "denoiser-1")
    save(page, folder / "page-kill.png")
    for id_ in ids:
        made.delete(f"/v1/requests/{id_}").raise_for_status()
    expect(card(page, "denoiser-1")).to_have_attribute("data-state", "ready")

    id_ = submit(made, steps=400, prompt="a small yellow square on the right of a black background")
    page = open_page(small.url, viewport={"width": 1280, "height": 920})
    tiles(page, "DENOISING_RUNNING").get_by_role("button").click()
    expect(page.locator(".request-timeline .tick").nth(12)).to_be_attached()
    kill(background, small, made.get(f"/v1/requests/{id_}").json()["units"][0]["instances"]["denoiser"])
    chart = page.locator(".request-timeline")
    expect(chart).to_contain_text("Done in")
    expect(page.locator(".stage img").first).to_be_visible()
    chart.locator(".timeline-track .bar[data-lost=true][data-phase=computing]").hover()
    expect(chart.locator(".timeline-tip")).to_contain_text("was lost")
    save(page, folder / "page-timeline.png")
