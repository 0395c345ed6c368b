from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Models = Callable[[str], Path]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The folder of a tiny model by its family, made when first asked for. Not to be changed by a test."""
    from triptych.tools.make_model import Family, make_model

    made: dict[str, Path] = {}

    def model(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_model(made[family], Family(family))
        return made[family]

    return model


@pytest.fixture(scope="session")
def classic_models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Likewise, of pipelines without blocks."""
    from triptych.tools.make_classic import ClassicFamily, make_classic

    made: dict[str, Path] = {}

    def model(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_classic(made[family], ClassicFamily(family))
        return made[family]

    return model


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """Each test starts with gradients on: a denoise turns them off on its thread, for good."""
    import torch

    torch.set_grad_enabled(True)
    yield
    torch.set_grad_enabled(True)
