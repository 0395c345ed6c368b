"""Starting in any order, refusing what cannot start, and leaving nothing behind."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.actors.supervision.test_launcher import folder_of_strange_code
from tests.system.conftest import FREE_PORTS, ROOT
from triptych.actors import load_topology
from triptych.actors.supervision import module_command
from triptych.actors.topology import free_port
from triptych.api.client import ClientError
from triptych.api.launch import launch

TRIPTYCH = module_command("triptych.actors.command")
KEY = "0123456789abcdef"


def shared_memory() -> set[Path]:
    return set(Path("/dev/shm").iterdir())


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


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])  # SIGTERM ends each shared cluster
def test_the_end_leaves_no_process_no_socket_and_no_shared_memory(
    ending: signal.Signals, topology_file: Callable[..., Path]
) -> None:
    async def scenario() -> None:
        path = with_keys(topology_file(api={"keys_file": "keys"}))
        before = shared_memory()
        async with launch(path, FREE_PORTS) as cluster:
            await cluster.generate("a red circle", seed=1)  # with the first key of the file
            family = descendants(cluster.process.pid)
            assert len(family) >= 7
            run_dir = cluster.topology.run_dir
            cluster.process.send_signal(ending)
            await asyncio.wait_for(cluster.process.wait(), 30)
            await asyncio.to_thread(wait_for_the_end, family)
            if ending is not signal.SIGKILL:
                assert not list(run_dir.glob("*"))
                assert cluster.process.returncode == 0
            assert shared_memory() == before

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
    import time

    import httpx

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
