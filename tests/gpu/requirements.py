"""Packages without which the tests of this folder cannot be imported."""

from __future__ import annotations

import pytest

BY_ALL = (
    "accelerate", "diffusers", "greenlet", "msgspec", "numpy", "peft", "PIL", "safetensors", "structlog", "tokenizers",
    "transformers", "uvloop", "xxhash", "zmq",
)  # fmt: skip
BY_PROCESSES = ("av", "ftfy", "httpx", "multipart", "rich", "setproctitle", "starlette", "typer", "uvicorn")


def require(*more: str) -> None:
    """Skip the file that calls this, with the name of what is missing."""
    for package in (*BY_ALL, *more):
        pytest.importorskip(package)
