"""What a stranger, and a peer with wrong values, can do to the head: nothing."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
import tempfile
from asyncio.subprocess import PIPE
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors import Topology
from actors.system import Inspect, Shutdown
from bus import Envelope, Kind
from bus.wire import encode
from roles.messages import requests, stages
from tests.ports import free_ports
from tests.roles.test_head import finished, play, playing, topology

__all__ = ["topology"]  # the fixture


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_of_the_host_changes_nothing_over_tcp_and_learns_nothing(
    topology: Callable[..., Topology],
) -> None:
    def forged(sender: str, generation: int, message: Any) -> str:
        envelope = Envelope("head", sender, Kind.ASK, 1, 0, 60.0, generation, "")
        return base64.b64encode(encode(envelope, message, 1 << 20)).decode()

    async def scenario(state: str) -> None:
        place = topology(f"port = {free_ports(8)}", bus='transport = "tcp"', state=state)
        async with playing(place) as stage:
            for name in stage.workers:
                await stage.hello(name)
            await stage.submit()
            work = await stage.next_work("encoder-0")
            found = await knock(
                address=place.component("head").address,
                frames=[
                    forged("encoder-0", 2**62, Inspect()),
                    forged("decoder-0", 1, finished(work)),
                    forged("nobody", 0, requests.CancelRequest("r")),
                    forged("nobody", 0, requests.ClusterQuery()),
                    forged("nobody", 0, Shutdown("for fun")),
                ],
                paths=[state, *map(str, place.state_dir.iterdir())],
            )
            for events, answers in (found["plain"], found["curve"]):
                assert (events[-1] in ("hung up on", "no CURVE"), answers) == (True, 0)
            assert f"{state}/bus.key" in found["unreadable"]
            assert set(found["unreadable"].values()) == {"PermissionError"}
            await stage.report(stages.InstanceAlive("encoder-0", 1))
            assert (await stage.view()).units[0].state == "ENCODER_WAITING"

    with tempfile.TemporaryDirectory() as open_to_all:
        Path(open_to_all).chmod(0o755)
        play(scenario(f"{open_to_all}/state"))


async def knock(**task: Any) -> dict[str, Any]:
    """What another user finds; see `tests.roles.stranger`."""
    arguments = (sys.executable, "-m", "tests.roles.stranger")
    process = await asyncio.create_subprocess_exec(*arguments, stdin=PIPE, stdout=PIPE)
    answer, _ = await process.communicate(json.dumps(task).encode())
    found: dict[str, Any] = json.loads(answer)
    return found
