"""Stages with a dtype of their own: what crosses is converted; and with the files of their own components alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import AutoencoderKLWan

from tests.engines.families import all_families
from tests.engines.results import same
from tests.engines.stage_pipelines import Models, Stages, expected, plain, through_codec
from triptych.engines.pipelines.dtype_conversion import DTYPE, convert_dtype
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import ModelError, Stage
from triptych.tools.families.stage_processes import CPU

STEPS = {"num_inference_steps": 2}
HALF = torch.bfloat16


class Mixed(Stages):
    def __init__(self, model: Path, **dtypes: torch.dtype) -> None:
        self.model = model
        self.pipelines = {
            stage: StagePipeline.load(model, (stage,), dtype=dtypes.get(stage.value, HALF), device=CPU)
            for stage in Stage
        }


def test_a_decoder_in_full_precision_is_a_pipeline_with_such_a_vae(models: Models) -> None:
    model = models("wan")
    pipeline = plain(model, HALF, blocks=True)
    pipeline.update_components(vae=AutoencoderKLWan.from_pretrained(str(model), subfolder="vae"))
    ours = Mixed(model, decoder=torch.float32).make(3, **STEPS)
    assert same(ours, expected(pipeline, model, 3, **STEPS))
    assert not same(ours, Mixed(model).make(3, **STEPS))


@pytest.mark.parametrize("family", all_families(["flux", "sdxl", "sana", "cogvideox"], ("flux", "sana")))
@pytest.mark.parametrize("stage", list(Stage))
def test_any_stage_may_have_another_dtype(family: str, stage: Stage, models: Models) -> None:
    model = models(family)
    mixed = Mixed(model, **{stage.value: torch.float32})
    state = mixed.encode(3, **STEPS)
    latents = mixed.denoise(state)
    assert state[DTYPE] is mixed.pipelines[Stage.ENCODER].placement.dtype
    assert latents[DTYPE] is mixed.pipelines[Stage.DENOISER].placement.dtype
    pixels = mixed.decode(latents)
    assert pixels.dtype in ("uint8", "float32")
    # The same on the way back, where full precision meets half.
    others = {other.value: torch.float32 for other in Stage if other is not stage}
    assert Mixed(model, **others).make(3, **STEPS).shape == pixels.shape


def test_what_was_made_in_another_dtype_for_a_reason_stays() -> None:
    class Pair(NamedTuple):
        left: object
        right: object

    half, single, index = torch.ones(2, dtype=HALF), torch.ones(2), torch.ones(2, dtype=torch.int64)
    state: dict[str, Any] = {
        DTYPE: HALF,
        "deep": [{"a": half, "b": (single, Pair(half, "x"))}],
        "dtype": HALF,
        "index": index,
        "generator": torch.Generator(),
    }
    values = convert_dtype(through_codec({**state, "deep": [{"a": half, "b": (single, [half, "x"])}]}), torch.float16)
    assert DTYPE not in values
    values = convert_dtype(state, torch.float16)
    deep: Any = values["deep"]
    assert deep[0]["a"].dtype is torch.float16
    assert deep[0]["b"][0] is single
    assert isinstance(deep[0]["b"][1], Pair)
    assert deep[0]["b"][1].left.dtype is torch.float16  # type: ignore[attr-defined]
    assert values["dtype"] is torch.float16
    assert values["index"] is index
    assert values["generator"] is state["generator"]
    assert half.dtype is HALF
    same_state = convert_dtype(state, HALF)
    assert same_state == {name: value for name, value in state.items() if name != DTYPE}


@pytest.mark.parametrize(
    ("family", "gone"), [("flux", ["text_encoder", "text_encoder_2", "vae"]), ("sana", ["text_encoder", "vae"])]
)
def test_a_role_needs_the_weights_of_its_own_components_alone(
    family: str, gone: list[str], models: Models, tmp_path: Path
) -> None:
    model = models(family)
    part = Path(shutil.copytree(model, tmp_path / "model"))
    for name in gone:
        for weights in (part / name).glob("*.safetensors"):
            weights.unlink()
    state = Stages(model).encode(2, **STEPS)
    made = []
    for folder in (model, part):
        denoising = StagePipeline.load(folder, (Stage.DENOISER,), dtype=torch.float32, device=CPU).denoise(state)
        while denoising.advance():
            pass
        made.append(denoising.result()["latents"])
    assert torch.equal(*made)
    with pytest.raises(ModelError, match=r"text_encoder .*fetch the weights of this component"):
        StagePipeline.load(part, (Stage.ENCODER,), dtype=torch.float32, device=CPU)
