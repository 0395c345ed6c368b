"""What a pipeline does with its loop and its components, read off its source."""

from __future__ import annotations

import diffusers
import pytest

from triptych.engines.partition.source_analysis import computes, ends_without_steps, runs, runs_before


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPipeline",
        "StableDiffusionPanoramaPipeline",
        # Its comprehension after the loop has a variable of the same name.
        "FluxInpaintPipeline",
        "CogVideoXPipeline",
        "AnimateDiffPipeline",
    ],
)
def test_most_pipelines_come_to_their_end_without_a_step(name: str) -> None:
    assert ends_without_steps(getattr(diffusers, name))


@pytest.mark.parametrize(
    "name",
    [
        # They decode what only the loop sets.
        "LatentConsistencyModelPipeline",
        "SanaSprintImg2ImgPipeline",
        # Over the number of timesteps; over sections that are each decoded; in another method.
        "AmusedInpaintPipeline",
        "HunyuanVideoFramepackPipeline",
        "TextToVideoZeroPipeline",
    ],
)
def test_some_pipelines_do_not(name: str) -> None:
    assert not ends_without_steps(getattr(diffusers, name))


def test_a_pipeline_that_runs_what_its_loop_runs_elsewhere_does_not() -> None:
    assert ends_without_steps(diffusers.StableDiffusionAdapterPipeline, {"unet", "adapter"})
    assert runs(diffusers.StableDiffusionAdapterPipeline, {"unet", "adapter"}, (), in_loops=False) == {"adapter"}
    assert not ends_without_steps(diffusers.AnyFlowFARPipeline, {"transformer"})


def test_what_comes_before_the_last_encoding_is_known() -> None:
    # The embeddings of one are noised before the other loop; images are encoded before the prompt; and not.
    components = {"prior", "vae", "unet", "transformer"}
    assert runs_before(diffusers.StableUnCLIPPipeline, components, {"encode_prompt"}) == {"prior"}
    assert runs_before(diffusers.HunyuanVideoImageToVideoPipeline, components, {"encode_prompt"}) == {"vae"}
    assert runs_before(diffusers.StableDiffusionImg2ImgPipeline, components, {"encode_prompt"}) == frozenset()


def test_to_compute_with_a_component_is_not_to_look_at_it() -> None:
    assert computes(diffusers.StableDiffusionGLIGENPipeline, "__call__", "text_encoder")
    assert computes(diffusers.StableDiffusionPipeline, "encode_prompt", "text_encoder")
    assert not computes(diffusers.CogVideoXPipeline, "__call__", "text_encoder")
    assert not computes(diffusers.StableDiffusionPipeline, "no_such_method", "text_encoder")
