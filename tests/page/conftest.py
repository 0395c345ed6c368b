"""The page in Chromium, on a running system that serves tiny models for images, edits and videos."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from tests.system.conftest import BOUND_S, FREE_PORTS, ROOT, SharedModel, any_steps, write_models, write_topology
from triptych.api.launch import Cluster, launch

MODELS = {
    "shapes": SharedModel("shapes"),
    "inpainting": SharedModel("sdxl", task="inpainting"),
    "wan": SharedModel("wan"),
}
DESKTOP = {"width": 1280, "height": 860}
PHONE = {"width": 360, "height": 740}


class Background:
    """An event loop in a thread: playwright runs one of its own in this one."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture(scope="session")
def background() -> Iterator[Background]:
    background = Background()
    yield background
    background.close()


@contextmanager
def launched(background: Background, file: Path, **options: Any) -> Iterator[Cluster]:
    """A cluster whose methods are to be called in the background."""
    manager = launch(file, FREE_PORTS, **options)
    cluster = background.run(manager.__aenter__())
    try:
        yield cluster
    finally:
        background.run(manager.__aexit__(None, None, None))


@pytest.fixture(scope="session")
def cluster(
    background: Background, models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("page")
    shapes = any_steps(ROOT / "examples" / "shapes", folder)  # so many that an image can be seen to become one
    file = write_models(folder, MODELS, lambda family: shapes if family == "shapes" else models(family))
    with launched(background, file) as cluster:
        yield cluster


@pytest.fixture
def api(cluster: Cluster) -> Iterator[httpx.Client]:
    """The API without the page; nothing has been made yet."""
    with httpx.Client(base_url=cluster.url, timeout=BOUND_S) as client:
        remove_all(client)
        yield client
        remove_all(client)


def remove_all(client: httpx.Client) -> None:
    for _ in range(2):  # what is active is cancelled first
        for request in client.get("/v1/requests", params={"limit": 100}).json()["data"]:
            client.delete(f"/v1/requests/{request['id']}")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "make test-page installs chromium"
    with sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page of a server in a context of its own; whatever the browser complains of fails the test."""
    contexts, problems = [], list[str]()

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            problems.append(message.text)

    def open_(url: str, path: str = "/", **options: Any) -> Page:
        context = browser.new_context(
            base_url=url, **{"viewport": DESKTOP, "reduced_motion": "reduce", "color_scheme": "light", **options}
        )
        contexts.append(context)
        context.set_default_timeout(BOUND_S * 1000)
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture
def page(open_page: Callable[..., Page], cluster: Cluster, api: httpx.Client) -> Page:
    """The page of a server on which nothing has been made."""
    page = open_page(cluster.url)
    page.locator("#composer[data-state=ready]").wait_for()
    return page


@pytest.fixture(scope="session")
def small(
    background: Background, models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """One model, with two denoisers of two slots each."""
    folder = tmp_path_factory.mktemp("map")
    shapes = any_steps(ROOT / "examples" / "shapes", folder)
    sections: dict[str, dict[str, Any]] = {
        "supervision": {"intensity": 100},
        "role_keys": {"denoiser": {"slots": 2, "checkpoint_s": 0.1}},
    }
    roles = {"encoder": 1, "denoiser": 2, "decoder": 1}
    with launched(background, write_topology(folder, shapes, roles, sections)) as cluster:
        yield cluster


@pytest.fixture
def made(small: Cluster) -> Iterator[httpx.Client]:
    """Its API."""
    with httpx.Client(base_url=small.url, timeout=BOUND_S) as client:
        yield client
        remove_all(client)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where pictures go."""
    return Path(os.environ.get("TRIPTYCH_PAGE_PICTURES", tmp_path))
