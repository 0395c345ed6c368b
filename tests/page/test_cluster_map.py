"""The live map and the timeline in Chromium, on a running system whose processes are killed while the page is open."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.page.conftest import DESKTOP, PHONE, Background
from tests.page.test_accessibility import violations
from tests.page.test_page import generate, tiles
from tests.system.conftest import BOUND_S
from triptych.api.launch import Cluster

pytestmark = [pytest.mark.page, pytest.mark.timeout(300)]
expect.set_options(timeout=BOUND_S * 1000)
MANY = 20_000
"""Steps that take a while."""
PROMPT = "a large red circle on the left of a blue background"
WATCH = """card => {
  window.states = [card.dataset.state];
  new MutationObserver(() => window.states.push(card.dataset.state)).observe(card, {attributeFilter: ["data-state"]});
}"""


def submit(api: httpx.Client, *, steps: int, n: int = 1, prompt: str = PROMPT) -> str:
    body = {"prompt": prompt, "num_inference_steps": steps, "n": n, "seed": 3}
    answer = api.post("/v1/images/generations", json=body, headers={"Prefer": "respond-async"}).raise_for_status()
    return str(answer.json()["id"])


def kill(background: Background, cluster: Cluster, name: str) -> int:
    """Kill the process of a component; return its generation."""
    child = background.run(cluster.children())[name]
    os.kill(child.pid, signal.SIGKILL)
    return int(child.generation)


def card(page: Page, name: str) -> Locator:
    return page.locator(f".card[data-component={name}]")


def knock_down(page: Page, background: Background, cluster: Cluster, name: str) -> None:
    """Kill a process until its supervisor waits before it starts it again, which it does from the second time on."""
    for _ in range(6):
        kill(background, cluster, name)
        expect(card(page, name)).not_to_have_attribute("data-group", "up")
        with contextlib.suppress(AssertionError):
            expect(card(page, name)).to_have_attribute("data-group", "down", timeout=1500)
            return
        expect(card(page, name)).to_have_attribute("data-group", "up")
    raise AssertionError(f"{name} was always back at once")


def open_map(open_page: Callable[..., Page], cluster: Cluster, **options: Any) -> Page:
    page = open_page(cluster.url, "/#/system", **options)
    for name in ("encoder-0", "denoiser-0", "denoiser-1", "decoder-0", "head", "api", "pool"):
        expect(card(page, name)).to_have_attribute("data-state", "ready")
    return page


def test_a_killed_process_is_seen_to_fall_and_to_come_back(
    small: Cluster, background: Background, open_page: Callable[..., Page]
) -> None:
    page = open_map(open_page, small)
    victim = card(page, "denoiser-1")
    victim.evaluate(WATCH)
    generation = kill(background, small, "denoiser-1")
    log = page.get_by_role("log", name="What happened")
    expect(log).to_contain_text("denoiser-1 was killed (SIGKILL).")
    expect(log).to_contain_text("denoiser-1 is back after")
    expect(victim).to_have_attribute("data-state", "ready")
    expect(victim).not_to_contain_text(f"generation {generation}")
    expect(victim).to_contain_text(f"generation {background.run(small.children())['denoiser-1'].generation}")
    states = page.evaluate("window.states")
    assert (states[0], states[-1]) == ("ready", "ready")
    assert set(states[1:-1]) & {"backoff", "starting", "loading", "joining"}
    assert "ready" not in states[1:-1], "it does not seem to stand up and fall again"
    assert log.locator("li").count() == 2


def test_the_map_comes_back_with_the_api(
    small: Cluster, background: Background, open_page: Callable[..., Page]
) -> None:
    page = open_map(open_page, small)
    kill(background, small, "api")
    expect(page.get_by_role("log")).to_contain_text("api is back")
    expect(page.locator(".map[data-link=live]")).to_be_visible()


def test_queues_slots_and_the_pool_are_those_of_the_moment(
    small: Cluster, made: httpx.Client, open_page: Callable[..., Page]
) -> None:
    page = open_map(open_page, small)
    queue = page.locator(".queue[data-stage=denoiser]")
    expect(queue).to_contain_text("0 waiting, 0 assigned")
    ids = [submit(made, steps=MANY + number, n=2) for number in range(3)]
    expect(queue).to_contain_text("2 waiting, 4 assigned")
    expect(queue.locator(".dots i")).to_have_count(2)
    for name in ("denoiser-0", "denoiser-1"):
        expect(card(page, name)).to_contain_text("2 of 2 slots busy, 0 credits")
        expect(card(page, name).locator("[data-use=busy]")).to_have_count(2)
    expect(card(page, "pool")).not_to_contain_text("0 B of 16.0 MiB leased")
    for id_ in ids:
        made.delete(f"/v1/requests/{id_}").raise_for_status()
    expect(queue).to_contain_text("0 waiting, 0 assigned")
    expect(card(page, "denoiser-0")).to_contain_text("0 of 2 slots busy, 2 credits")


def test_the_timeline_of_a_finished_and_of_a_running_request(
    small: Cluster, made: httpx.Client, open_page: Callable[..., Page]
) -> None:
    page = open_page(small.url)
    page.locator("#composer[data-state=ready]").wait_for()
    generate(page, f"a prompt that is not cached: {uuid4()}", Steps="8", Seed="3")
    expect(tiles(page, "DONE")).to_have_count(1)
    tiles(page).get_by_role("button").click()
    chart = page.locator(".request-timeline")
    expect(chart).to_contain_text("Done in")
    tracks = chart.locator(".timeline-track")
    for track, text in zip(tracks.all(), ("encoder-0: computed", "denoiser", "decoder-0: computed"), strict=True):
        expect(track).to_have_attribute("aria-label", re.compile(text))
        expect(track.locator("[data-phase=computing]")).to_have_count(1)
    assert tracks.nth(1).locator(".tick").count() >= 6
    tracks.nth(1).locator("[data-phase=computing]").hover()
    expect(chart.locator(".timeline-tip")).to_contain_text("steps 1 to 8")
    page.mouse.move(0, 0)
    expect(chart.locator(".timeline-tip")).to_be_hidden()
    tracks.nth(0).focus()
    page.keyboard.press("Tab")
    expect(chart.locator(".timeline-tip")).to_contain_text("computed")
    sentences = (tracks.nth(1).get_attribute("aria-label") or "").partition(": ")[2].split("; ")
    for key, sentence in (("ArrowLeft", sentences[0]), ("ArrowRight", sentences[-1])):
        for _ in sentences:
            page.keyboard.press(key)
        expect(chart.locator(".timeline-tip")).to_have_text(sentence)
    page.keyboard.press("Escape")
    expect(chart.locator(".timeline-tip")).to_be_hidden()
    chart.get_by_text("All times").click()
    expect(chart.get_by_role("row")).not_to_have_count(1)
    page.keyboard.press("Escape")

    running = submit(made, steps=MANY)
    tiles(page, "DENOISING_RUNNING").get_by_role("button").click()
    expect(chart).to_contain_text("Under way for")
    expect(tracks.nth(1).locator("[data-open=true]")).to_have_count(1)
    expect(tracks.nth(1).locator(".tick")).not_to_have_count(0)
    made.delete(f"/v1/requests/{running}").raise_for_status()
    expect(chart).to_contain_text("Cancelled in")
    expect(tracks.nth(1).locator(".lost-mark")).to_have_count(1)


def test_the_timeline_shows_the_run_that_was_lost_and_the_one_that_went_on(
    small: Cluster, made: httpx.Client, background: Background, open_page: Callable[..., Page]
) -> None:
    id_ = submit(made, steps=1000)
    page = open_page(small.url)
    tiles(page, "DENOISING_RUNNING").get_by_role("button").click()
    track = page.locator(".request-timeline .timeline-track").nth(1)
    expect(track.locator(".tick")).not_to_have_count(0)
    instance = made.get(f"/v1/requests/{id_}").json()["units"][0]["instances"]["denoiser"]
    kill(background, small, instance)
    expect(track.locator(".lost-mark")).to_have_count(1)
    expect(track.locator("[data-phase=computing]")).to_have_count(2)
    expect(page.locator(".request-timeline")).to_contain_text("Done in")
    expect(track).to_have_attribute("aria-label", re.compile("computed, and was lost: its process ended.*attempt 2"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_on_the_map_and_the_timeline(
    small: Cluster, made: httpx.Client, background: Background, open_page: Callable[..., Page], scheme: str,
    viewport: dict[str, Any],
) -> None:  # fmt: skip
    id_ = submit(made, steps=MANY)
    page = open_map(open_page, small, viewport=viewport, color_scheme=scheme)
    found = list[str]()
    knock_down(page, background, small, "denoiser-1")
    found += violations(page, "fallen")
    expect(page.get_by_role("log")).to_contain_text("denoiser-1 is back")
    found += violations(page, "back")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.get_by_role("link", name="Create").click()
    tiles(page, "DENOISING_RUNNING").get_by_role("button").click()
    expect(page.locator(".request-timeline .tick")).not_to_have_count(0)
    found += violations(page, "a running timeline")
    made.delete(f"/v1/requests/{id_}").raise_for_status()
    expect(page.locator(".request-timeline")).to_contain_text("Cancelled in")
    page.get_by_text("All times").click()
    found += violations(page, "an ended timeline")
    assert not found
