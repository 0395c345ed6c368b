"""Steps of a scheduler and of its copies are seen, and counted once for each timestep."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from triptych.engines.pipelines.classic import NonIteratingTimesteps
from triptych.engines.pipelines.classic_call import CallDenoising, intercept

STEPS = 3


class Pipeline:
    """What `CallDenoising` looks at."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler


def scheduler(cls: type[Any]) -> Any:
    made = cls()
    made.set_timesteps(STEPS)
    return made


def counted(run: CallDenoising) -> list[tuple[int, int | None]]:
    seen = []
    while run.advance():
        seen.append((run.step, run.total_steps))
    return [*seen, (run.step, run.total_steps)]


@pytest.mark.parametrize("cls", [DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler])
def test_a_copy_of_a_scheduler_steps_itself_and_is_seen(cls: type[Any]) -> None:
    ours = scheduler(cls)
    plain = scheduler(cls)
    calls: list[Any] = []

    def around(caller: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(caller)
        return method(*args, **kwargs)

    intercept(ours, "step", around)
    other = copy.deepcopy(ours)
    sample, noise = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 0.5)
    for t in plain.timesteps:
        expected = plain.step(noise, t, sample).prev_sample
        for each in (ours, other):
            assert torch.equal(each.step(noise, t, sample).prev_sample, expected)
        sample = expected
    assert [calls.index(caller) for caller in calls] == [0, 1] * STEPS
    assert calls[0] is ours
    assert calls[1] is other
    assert type(ours) is cls
    assert inspect.signature(ours.step) == inspect.signature(plain.step)


@pytest.mark.parametrize("cls", [DDIMScheduler, UniPCMultistepScheduler])
def test_one_scheduler_for_several_parts_of_the_latents_makes_one_step_of_them(cls: type[Any]) -> None:
    def run(pipeline: Pipeline) -> dict[str, object]:
        mine = pipeline.scheduler
        views = [copy.deepcopy(mine.__dict__) for _ in range(2)]
        for t in mine.timesteps:
            for number in range(2):
                mine.__dict__.update(views[number])
                mine.step(torch.ones(1, 1), t, torch.ones(1, 1))
                views[number] = copy.deepcopy(mine.__dict__)
        return {}

    pipeline = Pipeline(scheduler(cls))
    seen = counted(CallDenoising(lambda: run(pipeline), pipeline, torch.Generator()))
    # The others of a step come at the start of the next.
    assert seen == [(1, STEPS), (2, STEPS), (STEPS, STEPS)]


def test_a_second_loop_is_stepped_through_as_well() -> None:
    def run(pipeline: Pipeline) -> dict[str, object]:
        for _ in range(2):
            pipeline.scheduler.set_timesteps(STEPS)
            for t in pipeline.scheduler.timesteps:
                pipeline.scheduler.step(torch.ones(1, 1), t, torch.ones(1, 1))
        return {}

    pipeline = Pipeline(FlowMatchEulerDiscreteScheduler())
    seen = counted(CallDenoising(lambda: run(pipeline), pipeline, torch.Generator()))
    assert seen == [(1, STEPS), (2, STEPS), (4, None), (5, None), (6, None), (6, None)]


def test_timesteps_without_steps_stay_so_when_they_are_copied_or_cut() -> None:
    timesteps = torch.arange(4).as_subclass(NonIteratingTimesteps)
    for some in (
        timesteps,
        copy.deepcopy(timesteps),
        timesteps[:-1],
        copy.deepcopy({"t": timesteps})["t"].to(torch.float),
    ):
        assert list(some) == []
        assert len(some) in (3, 4)
    assert int(timesteps[2]) == 2
