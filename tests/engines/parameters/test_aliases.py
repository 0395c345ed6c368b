"""Other names of parameters: the rules, and what they make of requests to tiny models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.results import media, same
from triptych.engines.parameters.aliases import conflicting_names, public_names, to_pipeline_names, with_aliases
from triptych.engines.parameters.schema import Parameter, ParameterKind, names
from triptych.engines.pipelines.pipeline import InputError, StagePipeline
from triptych.engines.stages import Stage

Models = Callable[[str], Path]
PROMPT = Parameter("prompt", ParameterKind.TEXT, required=True)
SCALE = Parameter("guidance_scale", ParameterKind.NUMBER)
RATE = Parameter("frame_rate", ParameterKind.INTEGER, 25)
SMALL = {"prompt": "a red ship", "height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 32}


def test_a_guider_has_two_names() -> None:
    found = {item.name: item for item in with_aliases([PROMPT], guided=True, guidance=4.0)}
    assert found["guidance_scale"].default == 4.0
    assert found["true_cfg_scale"].alias_of == "guidance_scale"
    assert list(found) == sorted(found)


def test_a_pipeline_that_has_the_names_keeps_them() -> None:
    own = [SCALE, Parameter("true_cfg_scale", ParameterKind.NUMBER, 1.0), RATE, Parameter("fps", ParameterKind.NUMBER)]
    assert set(with_aliases(own, guided=True, fps=16.0)) == set(own)
    assert names(with_aliases([SCALE])) == {"guidance_scale"}, "an argument is not a guider"


def test_the_rate_of_frames() -> None:
    assert names(with_aliases([PROMPT])) == {"prompt"}
    (alias, _, _) = with_aliases([PROMPT, RATE], fps=25.0)
    assert (alias.kind, alias.alias_of) == (ParameterKind.INTEGER, "frame_rate")
    own = with_aliases([PROMPT], fps=16.0)
    assert own[0] == Parameter("fps", ParameterKind.NUMBER, 16.0)
    assert to_pipeline_names({"prompt"}, {"prompt": "x", "fps": 8}, own) == {"prompt": "x"}, "of the file alone"


def test_requests_by_the_names_of_the_pipeline() -> None:
    parameters = with_aliases([RATE], guided=True, fps=16.0)
    taken = {"frame_rate", "guidance_scale", "latents"}
    given = {"fps": 8, "true_cfg_scale": 2.0, "latents": 0}
    assert to_pipeline_names(taken, given, parameters) == {"frame_rate": 8, "guidance_scale": 2.0, "latents": 0}
    assert public_names({"guidance_scale"}, parameters) == ("guidance_scale", "true_cfg_scale")
    assert conflicting_names({"fps": 8, "frame_rate": 8.0}, parameters) is None
    assert conflicting_names({"fps": 8, "frame_rate": 9}, parameters) == ("fps", "frame_rate")
    assert conflicting_names({"fps": 8, "true_cfg_scale": 9}, parameters) is None


@cache
def load(model: Path) -> StagePipeline:
    return StagePipeline.load(model, tuple(Stage), dtype=torch.float32, device=torch.device("cpu"))


def run(pipeline: StagePipeline, **inputs: Any) -> Any:
    denoising = pipeline.denoise(pipeline.encode({**SMALL, **inputs}, 5))
    while denoising.advance():
        pass
    return media(pipeline.decode(denoising.result()))


def test_true_cfg_scale_is_the_scale_of_the_guider(models: Models) -> None:
    pipeline = load(models("qwenimage"))
    more = {"negative_prompt": "grey", "max_sequence_length": 512}
    by_name = run(pipeline, true_cfg_scale=3.0, **more)
    plain = pipeline._runner.pipeline
    scale, plain.guider = plain.guider, plain.guider.new(guidance_scale=3.0)
    set_by_hand = run(pipeline, **more)
    plain.guider = scale
    assert same(by_name, set_by_hand)
    assert not same(by_name, run(pipeline, **more)), "the guider's own scale is another"
    assert same(by_name, run(pipeline, guidance_scale=3.0, true_cfg_scale=3.0, **more))
    with pytest.raises(InputError, match="true_cfg_scale and guidance_scale"):
        run(pipeline, guidance_scale=3.0, true_cfg_scale=4.0, **more)


def test_fps_is_the_frame_rate(models: Models) -> None:
    pipeline = load(models("ltx"))
    small = {**SMALL, "num_frames": 9}
    assert pipeline.encode({**small, "fps": 12}, 1)["frame_rate"] == 12
    assert pipeline.encode({**small, "frame_rate": 12}, 1)["frame_rate"] == 12
    assert pipeline.encode(small, 1)["frame_rate"] == 25
    assert not same(run(pipeline, num_frames=9, fps=4), run(pipeline, num_frames=9))
    with pytest.raises(InputError, match="fps and frame_rate"):
        pipeline.encode({**small, "fps": 12, "frame_rate": 25}, 1)


def test_a_video_has_a_rate_though_the_pipeline_asks_for_none(models: Models) -> None:
    pipeline = load(models("wan"))
    assert pipeline.signature.parameter("fps") == Parameter("fps", ParameterKind.NUMBER, 16.0)
    assert "fps" not in pipeline.signature.encodes
    assert same(run(pipeline, num_frames=5, fps=8), run(pipeline, num_frames=5))


@pytest.mark.parametrize("name", ["negative_prompt", "fps", "true_cfg_scale", "strength", "num_frames", "image"])
def test_what_a_family_does_not_take_is_refused_by_name(models: Models, name: str) -> None:
    pipeline = load(models("flux"))
    assert pipeline.signature.parameter(name) is None
    with pytest.raises(InputError, match=f"The pipeline takes no {name}"):
        pipeline.encode({**SMALL, name: 1}, 1)


@pytest.mark.parametrize("family", ["qwenimage", "ltx", "flux"])
def test_every_stage_says_the_same(models: Models, family: str) -> None:
    device = torch.device("cpu")
    signatures = [StagePipeline.load(models(family), (p,), dtype=torch.float32, device=device).signature for p in Stage]
    assert signatures == [load(models(family)).signature] * 3


@pytest.mark.parametrize(("family", "guidance"), [("pixart", 4.5), ("chroma", 5.0)])
def test_the_classic_strategy_has_the_same_names(models: Models, family: str, guidance: float) -> None:
    signature = load(models(family)).signature
    scale = signature.parameter("guidance_scale")
    assert scale is not None
    assert scale.default == guidance
    assert {"negative_prompt", "height", "num_inference_steps"} <= names(signature.parameters)
    assert signature.parameter("true_cfg_scale") is signature.parameter("fps") is None
