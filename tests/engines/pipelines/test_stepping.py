from __future__ import annotations

import gc
import threading
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from diffusers.modular_pipelines.modular_pipeline import (
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam

from triptych.engines.pipelines.block_denoising import BlockDenoising
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage
from triptych.engines.steps.denoising import Denoising

INPUTS: dict[str, dict[str, Any]] = {
    "flux-kl": {"height": 32, "width": 32, "max_sequence_length": 16},
    "wan": {"height": 32, "width": 32, "num_frames": 3, "max_sequence_length": 16},
}
Pipelines = Callable[[str], StagePipeline]


@pytest.fixture(scope="module")
def pipelines(models: Callable[[str], Path]) -> Pipelines:
    """Encoder and denoiser of a family, shared by all requests of these tests."""
    loaded: dict[str, StagePipeline] = {}

    def pipeline(family: str) -> StagePipeline:
        if family not in loaded:
            loaded[family] = StagePipeline.load(
                models(family),
                (Stage.ENCODER, Stage.DENOISER),
                dtype=torch.float32,
                device=torch.device("cpu"),
            )
        return loaded[family]

    return pipeline


def begin(pipeline: StagePipeline, family: str, prompt: str, steps: int, seed: int, **more: object) -> Denoising:
    inputs = {"prompt": prompt, "num_inference_steps": steps, **INPUTS[family], **more}
    return pipeline.denoise(pipeline.encode(inputs, seed))


def finish(denoising: Denoising) -> torch.Tensor:
    while denoising.advance():
        pass
    latents = denoising.result()["latents"]
    assert isinstance(latents, torch.Tensor)
    return latents


@pytest.fixture(params=["flux-kl", "wan"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_each_advance_is_one_step(family: str, pipelines: Pipelines) -> None:
    pipeline = pipelines(family)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    denoising = begin(pipeline, family, "a cat", 4, seed=1, guidance_scale=1.0)
    assert (denoising.step, denoising.total_steps) == (0, None)
    hook = pipeline._runner.pipeline.transformer.register_forward_pre_hook(count)
    seen = []
    for _ in range(4):
        more = denoising.advance()
        seen.append((more, calls, denoising.step, denoising.total_steps))
    hook.remove()
    assert seen == [(True, 1, 1, 4), (True, 2, 2, 4), (True, 3, 3, 4), (False, 4, 4, 4)]
    assert denoising.advance() is False
    assert calls == 4


def test_requests_that_take_turns_are_identical_to_runs_alone(family: str, pipelines: Pipelines) -> None:
    pipeline = pipelines(family)
    asked = [("a cat", 4, 1, 2.0), ("a red ship at night", 6, 2, 6.0), ("a cat", 3, 1, 6.0)]
    alone = [finish(begin(pipeline, family, p, n, s, guidance_scale=g)) for p, n, s, g in asked]
    turns = [begin(pipeline, family, p, n, s, guidance_scale=g) for p, n, s, g in asked]
    running = list(turns)
    while running:
        running = [denoising for denoising in running if denoising.advance()]
    for denoising, expected in zip(turns, alone, strict=True):
        assert torch.equal(finish(denoising), expected)
    assert not torch.equal(alone[0], alone[2])


def test_a_payload_can_be_run_again(family: str, pipelines: Pipelines) -> None:
    pipeline = pipelines(family)
    state = pipeline.encode({"prompt": "a cat", "num_inference_steps": 2, **INPUTS[family]}, 4)
    first = pipeline.denoise(state)
    second = pipeline.denoise(state)
    assert torch.equal(finish(first), finish(second))
    assert torch.equal(finish(pipeline.denoise(state)), finish(first))


class Probe(ModularPipelineBlocks):  # type: ignore[misc]
    """A block of a loop that relies on the loop for gradients to be off."""

    model_name = "probe"

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("gradients")]

    def __call__(self, components: Any, block_state: Any, **position: Any) -> tuple[Any, Any]:
        block_state.gradients.append(torch.is_grad_enabled())
        return components, block_state


class ProbeLoop(LoopSequentialPipelineBlocks):  # type: ignore[misc]
    """A loop over timesteps, or over chunks where there are none."""

    model_name = "probe"
    block_classes: ClassVar = [Probe]
    block_names: ClassVar = ["probe"]

    @property
    def loop_inputs(self) -> list[InputParam]:
        return [InputParam("timesteps"), InputParam("chunks", default=0)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block_state = self.get_block_state(state)
        for i, t in enumerate(block_state.timesteps or ()):
            components, block_state = self.loop_step(components, block_state, i=i, t=t)
        for k in range(block_state.chunks):
            components, block_state = self.loop_step(components, block_state, k=k)
        return components, state


def probe(**values: object) -> Denoising:
    state = PipelineState(values={"gradients": [], **values})
    block = SequentialPipelineBlocks.from_blocks_dict({"denoise": ProbeLoop()})
    return BlockDenoising(block, SimpleNamespace(), state, lambda after: {"gradients": after.get("gradients")})


def test_gradients_stay_off_whoever_ends_first() -> None:
    with torch.enable_grad():
        short, long = probe(timesteps=[1, 2]), probe(timesteps=[1, 2, 3, 4])
        assert short.advance()
        assert long.advance()
        assert not short.advance()
        while long.advance():
            pass
    assert short.result() == {"gradients": [False] * 2}
    assert long.result() == {"gradients": [False] * 4}


def test_a_loop_over_chunks_has_steps_but_no_known_number_of_them() -> None:
    denoising = probe(chunks=3)
    assert [denoising.advance() for _ in range(3)] == [True, True, False]
    assert (denoising.step, denoising.total_steps) == (3, None)


def test_two_loops_one_after_the_other_are_counted_together() -> None:
    block = SequentialPipelineBlocks.from_blocks_dict({"coarse": ProbeLoop(), "fine": ProbeLoop()})
    denoising = BlockDenoising(
        block, SimpleNamespace(), PipelineState(values={"gradients": [], "timesteps": [1, 2]}), vars
    )
    seen = []
    while True:
        more = denoising.advance()
        seen.append((denoising.step, denoising.total_steps))
        if not more:
            break
    assert seen == [(1, 2), (2, 4), (3, 4), (4, 4)]


def test_a_loop_without_steps_ends_at_once() -> None:
    denoising = probe()
    assert denoising.advance() is False
    assert denoising.step == 0
    assert denoising.result() == {"gradients": []}


def test_cancel_in_mid_loop_frees_everything_and_disturbs_nobody(family: str, pipelines: Pipelines) -> None:
    pipeline = pipelines(family)
    expected = finish(begin(pipeline, family, "a dog", 4, seed=2))
    # At a scale of 1 what the transformer returns is held from one step to the next, by both families.
    doomed = begin(pipeline, family, "a cat", 5, seed=1, guidance_scale=1.0)
    other = begin(pipeline, family, "a dog", 4, seed=2)
    kept: list[weakref.ref[torch.Tensor]] = []
    hook = pipeline._runner.pipeline.transformer.register_forward_hook(
        lambda _module, _args, output: kept.append(weakref.ref(output[0]))
    )
    doomed.advance()
    hook.remove()
    other.advance()
    assert kept
    assert kept[0]() is not None
    doomed.cancel()
    assert doomed.cancelled
    assert kept[0]() is None
    assert doomed.advance() is False
    doomed.cancel()
    with pytest.raises(RuntimeError, match="1 of 5 steps"):
        doomed.result()
    assert torch.equal(finish(other), expected)
    assert torch.equal(finish(begin(pipeline, family, "a dog", 4, seed=2)), expected)


def test_a_run_lets_go_of_its_tensors_by_itself(family: str, pipelines: Pipelines) -> None:
    pipeline = pipelines(family)
    gc.collect()
    gc.disable()
    try:
        denoising = begin(pipeline, family, "a cat", 2, seed=1)
        latents = weakref.ref(finish(denoising))
        assert latents() is not None
        del denoising
        assert latents() is None
    finally:
        gc.enable()


def test_cancel_before_the_first_step_and_after_the_last(pipelines: Pipelines) -> None:
    pipeline = pipelines("flux-kl")
    early = begin(pipeline, "flux-kl", "a cat", 2, seed=1)
    early.cancel()
    assert early.cancelled
    assert early.advance() is False
    late = begin(pipeline, "flux-kl", "a cat", 2, seed=1)
    latents = finish(late)
    late.cancel()
    assert not late.cancelled
    assert torch.equal(finish(late), latents)


def test_an_error_of_the_block_reaches_the_caller_with_its_traceback(pipelines: Pipelines) -> None:
    pipeline = pipelines("flux-kl")
    state = pipeline.encode({"prompt": "a cat", "num_inference_steps": 4, **INPUTS["flux-kl"]}, 1)
    broken = pipeline.denoise({**state, "pooled_prompt_embeds": torch.zeros(1, 7)})
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        broken.advance()
    frames = traceback.extract_tb(raised.value.__traceback__)
    assert any("transformer_flux" in frame.filename for frame in frames)
    assert broken.advance() is False
    with pytest.raises(RuntimeError, match="no result"):
        broken.result()


def test_an_error_in_a_later_step_leaves_the_others_alone(pipelines: Pipelines) -> None:
    pipeline = pipelines("flux-kl")
    expected = finish(begin(pipeline, "flux-kl", "a dog", 3, seed=2))
    failing = begin(pipeline, "flux-kl", "a cat", 4, seed=1)
    other = begin(pipeline, "flux-kl", "a dog", 3, seed=2)
    assert failing.advance()
    assert other.advance()

    def fail(*_: object) -> None:
        raise ZeroDivisionError("the device is on fire")

    hook = pipeline._runner.pipeline.transformer.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError, match="on fire"):
        failing.advance()
    hook.remove()
    assert failing.step == 1
    assert torch.equal(finish(other), expected)


def test_a_denoising_stays_on_its_thread(pipelines: Pipelines) -> None:
    denoising = begin(pipelines("flux-kl"), "flux-kl", "a cat", 3, seed=1)
    denoising.advance()
    errors: list[str] = []

    def elsewhere() -> None:
        for call in (denoising.advance, denoising.cancel):
            try:
                call()
            except RuntimeError as error:
                errors.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(30)
    assert errors == ["A denoise must run on the thread that has begun it."] * 2
    finish(denoising)
