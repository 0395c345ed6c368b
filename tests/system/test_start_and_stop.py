"""Starting in any order, refusing what cannot start, and leaving nothing behind."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.actors.supervision.test_launcher import folder_of_strange_code
from tests.system.conftest import BOUND_S, FREE_PORTS, ROOT, any_steps
from tests.system.test_resilience import client_of, post, under_way
from triptych.actors import load_topology
from triptych.actors.supervision import module_command
from triptych.actors.topology import free_port
from triptych.api.client import ClientError
from triptych.api.launch import Cluster, launch

TRIPTYCH = module_command("triptych.actors.command")
KEY = "0123456789abcdef"


def named_memory(pids: set[int]) -> set[Path]:
    """The files in /dev/shm that processes have mapped."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {Path(line.split(maxsplit=5)[5]) for line in lines if " /dev/shm/" in line}


def descendants(pid: int) -> set[int]:
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(tuple(map(int, line.split())) for line in listed.splitlines())
    found, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return found


def wait_for_the_end(pids: set[int]) -> None:
    """Of processes that are not our children: a pidfd turns readable when its process ends."""
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ended, _, _ = select.select([handle], [], [], 10)
        os.close(handle)
        assert ended, f"{pid} still runs"


def test_the_end_leaves_nothing_behind_and_the_next_start_resumes_what_was_under_way(
    topology_file: Callable[..., Path], models: Callable[[str], Path], tmp_path: Path
) -> None:
    model = {"path": str(any_steps(models("flux"), tmp_path)), "dtype": "float32"}
    # Without overrides, so that both starts have the same topology, and with it the same state folder.
    path = with_keys(topology_file(model=model, api={"port": free_port(), "keys_file": "keys"}))

    async def end(cluster: Cluster, ending: signal.Signals) -> None:
        family = descendants(cluster.process.pid)
        assert len(family) >= 7
        memory = named_memory(family)
        cluster.process.send_signal(ending)
        await asyncio.wait_for(cluster.process.wait(), 30)
        await asyncio.to_thread(wait_for_the_end, family)
        assert not {file for file in memory if file.exists()}

    async def scenario() -> None:
        key = {"Authorization": f"Bearer {KEY}"}
        async with launch(path) as cluster, client_of(cluster, **key) as http:
            asked = post(http, 200)
            request = await under_way(http)
            await end(cluster, signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                await asked
        async with launch(path) as cluster, client_of(cluster, **key) as http:
            async with asyncio.timeout(BOUND_S):
                while (state := (await http.get(f"/v1/requests/{request['id']}")).json()["state"]) != "DONE":
                    assert state not in ("FAILED", "TIMED_OUT", "CANCELLED")
            await cluster.generate("a red circle", seed=1)  # with the first key of the file
            await end(cluster, signal.SIGINT)  # SIGTERM ends each shared cluster
            assert cluster.process.returncode == 0
            assert not list(cluster.topology.run_dir.glob("*")), "its sockets are gone"

    asyncio.run(scenario())


@pytest.mark.long
def test_components_started_one_by_one_and_last_first_find_each_other(topology_file: Callable[..., Path]) -> None:
    path = with_keys(topology_file(api={"port": free_port(), "keys_file": "keys"}))
    names = [component.name for component in load_topology(path).components][::-1]
    strange = folder_of_strange_code(path.parent)
    running = [subprocess.Popen([*TRIPTYCH, "up", str(path), "--only", name], cwd=strange) for name in names]
    try:
        out = path.parent / "image.png"
        url = f"http://127.0.0.1:{load_topology(path).api.port}"
        wait_until_ready(url)
        without_key = [*TRIPTYCH, "generate", "a red circle", "--url", url]
        (path.parent / "key").write_text(KEY)
        generate = [*without_key, "--key-file", str(path.parent / "key")]
        subprocess.run([*generate, "-o", str(out), "--set", "guidance_scale=2.5"], cwd=ROOT, check=True)
        assert out.read_bytes().startswith(b"\x89PNG")
        for command, words in (
            ([*generate, "--set", "strength=0.5"], "strength is not a parameter of"),
            (without_key, "a key is needed"),
        ):
            refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert refused.returncode == 1
            assert words in refused.stderr
        assert not (strange / "RAN").exists()
    finally:
        for process in running:
            process.send_signal(signal.SIGINT)
        assert [process.wait(30) for process in running] == [0] * len(running)


def with_keys(topology: Path) -> Path:
    """The topology, with its file of keys beside it."""
    keys = topology.parent / "keys"
    keys.write_text(f"somebody:{KEY}\n")
    keys.chmod(0o600)
    return topology


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/ready", timeout=5).is_success:
                return
        except httpx.HTTPError:
            continue
    pytest.fail("not ready within 90 s")


def test_a_model_that_cannot_load_ends_the_start_with_a_sentence_and_no_retry(
    topology_file: Callable[..., Path], models: Callable[[str], Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", str(models("flux")), str(broken)], check=True)
    for weights in (broken / "transformer").glob("*.safetensors"):
        weights.write_bytes(b"not weights")

    async def scenario() -> None:
        path = topology_file(model={"path": str(broken), "dtype": "float32"})
        with pytest.raises(ClientError, match=r"exit code 2 .*denoiser-0 cannot start: .*transformer"):
            async with launch(path, FREE_PORTS, ready_timeout_s=90):
                pass

    asyncio.run(scenario())
