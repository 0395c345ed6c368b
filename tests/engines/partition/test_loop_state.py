"""Which loops can go on from a saved step, read off their source."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
from diffusers.modular_pipelines.wan.denoise import WanDenoiseLoopWrapper

from triptych.engines.partition.loop_state import block_problem, call_problem


def problem(name: str) -> str:
    return call_problem(getattr(diffusers, name))


@pytest.mark.parametrize(
    "name",
    [
        *("PixArtAlphaPipeline", "SanaPipeline", "ChromaPipeline", "CogVideoXPipeline", "StableDiffusionPipeline"),
        *("StableDiffusionXLInpaintPipeline", "FluxPipeline", "HunyuanVideoPipeline", "MochiPipeline"),
    ],
)
def test_loops_that_carry_only_what_the_scheduler_returns(name: str) -> None:
    assert problem(name) == ""


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("HunyuanImagePipeline", "guider"),
        ("AceStepPipeline", "momentum_buffer"),
        ("SemanticStableDiffusionPipeline", "edit_momentum"),
        ("IFInpaintingPipeline", "intermediate_images"),
        ("KarrasVePipeline", "sample"),
        ("LTX2Pipeline", "does not have one loop"),
        ("AnimateDiffPipeline", "does not have one loop"),
        ("KandinskyV22CombinedPipeline", "does not have one loop"),
    ],
)
def test_loops_that_carry_more_say_what(name: str, why: str) -> None:
    assert why in problem(name)


def loop(before: str, after: str, end: str = "") -> type:
    source = f"""
def __call__(self, latents, timesteps, mask, other):
    for i, t in enumerate(timesteps):
        {before}
        noise = self.transformer(latents, t)
        if self.guided:
            negative = self.transformer(latents, t)
            noise = noise + negative
        latents = self.scheduler.step(noise, t, latents)[0]
        {after}
    {end}
    return latents
"""
    return _class(source)


def _class(source: str) -> type:
    import linecache

    name = f"<loop {abs(hash(source))}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names: dict[str, Any] = {}
    exec(compile(source, name, "exec"), names)
    return type("Loop", (), {"__call__": names["__call__"]})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("pass", "pass"),
        ("size = latents.shape", "latents = latents.to(other.dtype)"),
        ("scaled = latents * t", "latents = latents * mask + other"),
        ("pass", "latents[0] = other"),
        ("pass", "if i < 3: latents = latents + other"),
        ("callback = None", "if callback is not None: latents = noise"),
        ("if self.interrupt: other = latents", "self._current_timestep = t"),
        ("parts = []", "parts.append(noise)"),
        ("pass", "for k in range(2): latents = latents + self.vae.scale(k)"),
        ("pass", "with self.context(t) as entered: latents = latents + entered"),
    ],
)
def test_what_is_made_of_the_result_of_the_step_is_right(before: str, after: str) -> None:
    assert call_problem(loop(before, after)) == ""


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("other = other + latents", "pass", "other"),
        ("pass", "latents = latents + noise", "latents"),
        ("pass", "if i == 2: latents = noise", "latents"),
        ("pass", "if noise.mean() > 0: latents = latents + other", "latents"),
        ("previous = latents", "latents = latents * mask + previous", "latents"),
        ("pass", "other.append(noise)", "other"),
        ("pass", "other[i] = noise", "other"),
        ("pass", "self.seen = noise", "self.seen"),
        ("drawn = draw(generator)", "latents = latents + drawn", "latents"),
        ("noise = self.scheduler.step(noise, t, latents)", "pass", "one loop"),
        ("if i: continue", "pass", "one loop"),
        ("for k in range(2): self.scheduler.step(k)", "pass", "one loop"),
    ],
)
def test_what_is_made_of_anything_else_is_not(before: str, after: str, why: str) -> None:
    assert why in call_problem(loop(before, after))


def test_what_only_some_steps_set_is_not_right_after_the_loop() -> None:
    assert "last" in call_problem(loop("pass", "if i == 2: last = noise", "latents = latents + last"))
    assert call_problem(loop("pass", "last = noise", "latents = latents + last")) == ""


def test_the_loop_of_blocks_keeps_all_in_the_state_of_the_block() -> None:
    assert block_problem(WanDenoiseLoopWrapper) == ""
    source = """
def __call__(self, components, state):
    block_state, total = state.block, 0
    for i, t in enumerate(block_state.timesteps):
        components, block_state = self.loop_step(components, block_state, i=i, t=t)
        {}
    return components, state
"""
    assert block_problem(_class(source.format("block_state.last = i"))) == ""
    assert "total" in block_problem(_class(source.format("total = total + block_state.change")))
