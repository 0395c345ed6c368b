"""What only a GPU can show. `TRIPTYCH_GPU_TESTS_ON=cpu` runs what can be run without one, to try the tests themselves.

A machine with a GPU may lack packages: what needs a missing one is skipped with its name, and nothing here is imported
before its time.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Read when torch first uses the GPU, as in the processes of roles.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

try:
    from tests.roles.conftest import inbox, local_cluster, make_topology, plain_tracebacks, run, tiny_model
except ImportError:  # each file says which package it lacks
    local_cluster = inbox = make_topology = plain_tracebacks = run = tiny_model = None

__all__ = [
    "inbox",
    "local_cluster",
    "make_topology",
    "plain_tracebacks",
    "run",
    "tiny_model",
]  # fmt: skip

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def gpu() -> torch.device:
    """A CUDA device, and nothing else."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", 0)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """A CUDA device, or what stands in for it."""
    if os.environ.get("TRIPTYCH_GPU_TESTS_ON") == "cpu":
        return torch.device("cpu")
    return request.getfixturevalue("gpu")


@pytest.fixture(autouse=True)
def exact() -> None:
    """The settings of a role on a GPU."""
    from triptych.roles.worker.devices import use_exact_kernels

    use_exact_kernels()
