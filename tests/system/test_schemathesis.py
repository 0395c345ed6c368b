"""What the OpenAPI document allows, and what it forbids, sent to running systems by schemathesis: `make test-contract`.

All its checks: no error of the server, no status, header, content type or body that the document does not have, nothing
taken that it forbids. Those that need two API keys are left out.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.conftest import FREE_PORTS, ROOT
from triptych.api.launch import launch

pytestmark = [pytest.mark.contract, pytest.mark.timeout(600)]
EXAMPLES = 30
"""Requests for each operation, of each kind."""
MAX_S = 200
NEED_KEYS = "ignored_auth,object_level_authorization"
# What a model takes, which ids there are and which bytes a file has is not in the document.
CONFIG = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", 304, 403, 404, 409, 410, 412, 416, 422, 429]
negative_data_rejection.expected-statuses = [400, 401, 403, 404, 405, 408, 409, 410, 412, 413, 415, 416, 421, 422]
missing_required_header.expected-statuses = [400, 422]
"""


async def attack(topology: Path, folder: Path) -> None:
    """Run schemathesis against a running system."""
    config = folder / "schemathesis.toml"
    config.write_text(CONFIG)
    own = {**FREE_PORTS, "state": {"path": str(folder / "state")}, "head": {"request_timeout_s": 60.0}}
    async with launch(topology, own) as cluster:
        command = [
            sys.executable, "-P", "-m", "schemathesis.cli", "--config-file", str(config), "--no-color",
            "run", f"{cluster.url}/openapi.json", "--checks", "all", "--exclude-checks", NEED_KEYS,
            "--phases", "coverage,fuzzing,stateful", "--max-examples", str(EXAMPLES), "--max-time", str(MAX_S),
            "--seed", "1", "--request-timeout", "90", "--continue-on-failure", "--no-shrink",
            "--suppress-health-check", "all", "--warnings", "off",
        ]  # fmt: skip
        run = await asyncio.create_subprocess_exec(
            *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        report, _ = await run.communicate()
        assert run.returncode == 0, report.decode()[-20_000:]
        print(report.decode()[-2000:])
        assert {child.restarts for child in (await cluster.children()).values()} == {0}


def test_the_demo_keeps_its_contract(tmp_path: Path) -> None:
    asyncio.run(attack(ROOT / "examples/demo.toml", tmp_path))


def test_a_model_of_videos_keeps_its_contract(topology_file: Callable[..., Path], tmp_path: Path) -> None:
    asyncio.run(attack(topology_file("wan"), tmp_path))
