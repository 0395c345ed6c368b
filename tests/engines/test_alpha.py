from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from triptych.engines.panels import Panel
from triptych.engines.parameters import Signature
from triptych.engines.pipeline import PanelPipeline
from triptych.engines.placing import Placement
from triptych.engines.routes import Route
from triptych.tools.make_model import flux, qwen, vaes
from triptych.tools.make_model.recipe import Recipe

HERE = Placement(torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("recipe", "alpha"),
    [(qwen.layered(), True), (qwen.edit(), False), (flux.flux(vaes.kl, guidance_embeds=True), False)],
)
def test_the_vae_tells_whether_pictures_have_alpha(recipe: Recipe, alpha: bool) -> None:
    make = recipe.components["vae"]
    assert make
    parts = SimpleNamespace(
        pipeline=SimpleNamespace(vae=make()), components=frozenset(), inputs=frozenset(), signature=Signature()
    )
    assert PanelPipeline((Panel.ENCODER,), Route.MODULAR, parts, HERE, None).alpha is alpha


def test_a_pipeline_without_a_vae_takes_no_alpha() -> None:
    parts = SimpleNamespace(
        pipeline=SimpleNamespace(), components=frozenset(), inputs=frozenset(), signature=Signature()
    )
    assert not PanelPipeline((Panel.ENCODER,), Route.MODULAR, parts, HERE, None).alpha
