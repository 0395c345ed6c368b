from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from triptych.engines.parameters.schema import Signature
from triptych.engines.partition.strategy import PartitionStrategy
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage
from triptych.engines.weights.placement import Placement
from triptych.tools.make_model import flux, qwen, vaes
from triptych.tools.make_model.recipe import Recipe

HERE = Placement(torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("recipe", "alpha"),
    [(qwen.layered(), True), (qwen.edit(), False), (flux.flux(vaes.kl, guidance_embeds=True), False)],
)
def test_the_vae_tells_whether_images_have_alpha(recipe: Recipe, alpha: bool) -> None:
    make = recipe.components["vae"]
    assert make
    parts = SimpleNamespace(
        pipeline=SimpleNamespace(vae=make()), components=frozenset(), inputs=frozenset(), signature=Signature()
    )
    assert StagePipeline((Stage.ENCODER,), PartitionStrategy.MODULAR, parts, HERE, None).alpha is alpha


def test_a_pipeline_without_a_vae_takes_no_alpha() -> None:
    parts = SimpleNamespace(
        pipeline=SimpleNamespace(), components=frozenset(), inputs=frozenset(), signature=Signature()
    )
    assert not StagePipeline((Stage.ENCODER,), PartitionStrategy.MODULAR, parts, HERE, None).alpha
