"""Calls of a denoiser wait outside of their run, and the run is the same as without."""

from __future__ import annotations

import gc
import inspect
import weakref
from typing import Any

import pytest
import torch

from tests.engines.steps.runs import Models, finish, latents_of, payload, pipeline_of
from triptych.engines.steps.denoiser_calls import CacheContextArguments, DenoiserCall, parking
from triptych.engines.steps.denoising import Denoising


def shared_transformer(model: Any) -> Any:
    return pipeline_of(model)._runner.pipeline.transformer


def steps_of_calls(runs: list[Denoising]) -> list[list[DenoiserCall]]:
    """Run all of them, each call alone, and return the calls that waited at the same time."""
    rounds, live = [], list(runs)
    while live:
        waiting = [call for run in live if (call := run.proceed()) is not None]
        for call in waiting:
            call.compute()
        rounds.append(waiting)
        live = [run for run in live if not run.over]
    return rounds


@pytest.mark.parametrize("family", ["flux-kl", "wan", "pixart"])
def test_runs_whose_calls_wait_are_those_without(family: str, models: Models) -> None:
    model = models(family)
    pipeline = pipeline_of(model)
    payloads = [payload(model, number) for number in range(3)]
    expected = [finish(pipeline.denoise(each)) for each in payloads]
    runs = [pipeline.denoise(each, bucket=2) for each in payloads]
    rounds = steps_of_calls(runs)
    for run, latents in zip(runs, expected, strict=True):
        assert torch.equal(latents_of(run), latents)
        assert run.pipeline is None
    calls = rounds[0]
    assert [call.run for call in calls] == runs
    assert all(call.module is shared_transformer(model) and call.number == 0 for call in calls)
    assert torch.equal(finish(pipeline.denoise(payloads[0], bucket=2)), expected[0])


def test_a_twin_is_like_its_module(models: Models) -> None:
    module = shared_transformer(models("wan"))
    twin = parking(module)
    assert isinstance(twin, type(module))
    assert type(twin).__name__ == type(module).__name__
    assert (twin.config, twin.dtype, twin.device) == (module.config, module.dtype, module.device)
    assert inspect.signature(twin.forward) == inspect.signature(module.forward)
    assert twin.state_dict().keys() == module.state_dict().keys()
    assert all(map(lambda left, right: left is right, twin.parameters(), module.parameters()))
    assert [name for name, _ in twin.named_modules()] == [name for name, _ in module.named_modules()]


def test_a_cache_context_is_recorded_and_does_not_reach_the_shared_module(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = shared_transformer(models("flux-kl"))
    twin = parking(module)
    seen: list[object] = []

    def work() -> dict[str, object]:
        with twin.cache_context("cond", step_index=2):
            first = twin("x")
        twin._reset_stateful_cache()
        return {"first": first, "second": twin("y")}

    run = Denoising(work)
    monkeypatch.setattr(type(module), "forward", lambda _self, value: value * 2)
    monkeypatch.setattr("diffusers.hooks.hooks._set_cache_context", lambda _module, context: seen.append(context))
    first = run.proceed()
    assert first is not None
    assert first.cache_context == CacheContextArguments("cond", {"step_index": 2})
    assert seen == []
    first.compute()
    assert [context and context.name for context in seen] == ["cond", None]
    second = run.proceed()
    assert second is not None
    assert (second.cache_context, second.number) == (None, 1)
    second.compute()
    assert run.proceed() is None
    assert run.result() == {"first": "xx", "second": "yy"}


def test_a_guider_that_adds_hooks_to_the_shared_module_computes_its_calls_at_once(models: Models) -> None:
    model = models("wan")
    options = {"skip_layer_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    hooked = payload(model, 0, guider="SkipLayerGuidance", guider_options=options)
    plain = payload(model, 1)
    # Of its own: the guider leaves an empty registry of hooks behind.
    pipeline = pipeline_of.__wrapped__(model)
    expected = [finish(pipeline.denoise(each)) for each in (hooked, plain)]
    runs = [pipeline.denoise(each, bucket=2) for each in (hooked, plain)]
    calls = [call for waiting in steps_of_calls(runs) for call in waiting]
    assert calls
    assert all(call.run is runs[1] for call in calls)
    for run, latents in zip(runs, expected, strict=True):
        assert torch.equal(latents_of(run), latents)


def test_an_error_of_a_call_is_raised_inside_its_run_alone(models: Models) -> None:
    model = models("flux-kl")
    pipeline = pipeline_of(model)
    broken = pipeline.denoise({**payload(model, 0), "pooled_prompt_embeds": torch.zeros(1, 7)}, bucket=2)
    other = pipeline.denoise(payload(model, 1), bucket=2)
    for run in (broken, other):
        call = run.proceed()
        assert call is not None
        call.compute()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        broken.proceed()
    assert broken.over
    assert other.proceed() is None
    assert torch.equal(finish(other), finish(pipeline.denoise(payload(model, 1))))


def test_cancel_while_a_call_waits_frees_everything(models: Models) -> None:
    model = models("flux-kl")
    gc.collect()
    gc.disable()
    try:
        run = pipeline_of(model).denoise(payload(model, 0), bucket=2)
        run.advance()
        call = run.proceed()
        assert call is not None
        latents = weakref.ref(call.kwargs["hidden_states"])
        del call
        assert latents() is not None
        run.cancel()
        assert latents() is None
    finally:
        gc.enable()


def test_gradients_are_off_for_each_part_of_a_step(models: Models) -> None:
    model = models("flux-kl")
    run = pipeline_of(model).denoise(payload(model, 0), bucket=2)
    call = run.proceed()
    while call is not None:
        with torch.enable_grad():
            call.compute()
            assert not call.output[0].requires_grad
            call = run.proceed()
