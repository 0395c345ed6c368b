from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """Each test starts with gradients on: a denoise turns them off on its thread, for good."""
    import torch

    torch.set_grad_enabled(True)
    yield
    torch.set_grad_enabled(True)
