"""What has changed in a run, frozen so that it can be packed, and put into another run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from diffusers.schedulers import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from PIL import Image

from tests.engines.stage_pipelines import through_codec
from triptych.engines.steps.checkpoint import (
    CheckpointError,
    ComponentName,
    ObjectState,
    changed,
    component_names,
    find_class,
    freeze,
    mark_each,
    thaw,
)

PIPELINE = SimpleNamespace(scheduler=EulerDiscreteScheduler(), transformer=torch.nn.Linear(1, 1), steps=3)


def crossed(value: object) -> Any:
    return through_codec({"value": freeze(value, component_names(PIPELINE))})["value"]


def test_only_what_was_written_to_or_replaced_has_changed() -> None:
    values: dict[str, Any] = {
        "kept": torch.zeros(2),
        "written": torch.zeros(2),
        "replaced": torch.zeros(2),
        "seen": [torch.zeros(1), {"deep": torch.zeros(1)}],
        "unused": torch.Generator(),
        "drawn": torch.Generator(),
        "buffer": MomentumBuffer(0.5),
        "calm": MomentumBuffer(0.5),
        "array": np.zeros(2),
        "same_array": np.zeros(2),
        "number": 1,
        "fraction": 1.0,
        "image": Image.new("RGB", (1, 1)),
        "model": PIPELINE.transformer,
        "dtype": torch.float32,
        "size": torch.Size((1, 2)),
        "unknown": {1, 2},
    }
    marks = mark_each(values)
    values["written"][0] = 1
    values["replaced"] = torch.zeros(2)
    values["seen"][1]["deep"] += 1
    torch.rand(1, generator=values["drawn"])
    values["buffer"].update(torch.ones(1))
    values["array"][0] = 1
    values["number"] = 2
    values["fraction"] = 1
    values["new"] = None
    assert list(changed(marks, values)) == [
        *("written", "replaced", "seen", "drawn", "buffer", "array", "number", "fraction", "unknown", "new"),
    ]


def test_what_was_frozen_is_the_same_elsewhere() -> None:
    expanded = torch.tensor(3.0).expand(2)
    image = torch.rand(1, 3, 4, 4).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(5)
    torch.rand(2, generator=generator)
    value = {
        "tensors": (expanded, image),
        "generator": generator,
        "size": torch.Size((4, 5)),
        "device": torch.device("cpu"),
        "list": [1, 2.5, None, "text", b"bytes", slice(1, 2), torch.bfloat16, np.arange(3)],
        "component": PIPELINE.transformer,
        "scheduler": PIPELINE.scheduler,
        "output": EulerDiscreteSchedulerOutput(prev_sample=torch.ones(1), pred_original_sample=torch.zeros(1)),
    }
    now = thaw(crossed(value), None, PIPELINE)
    assert torch.equal(now["tensors"][0], expanded)
    assert torch.equal(now["tensors"][1], image)
    assert now["tensors"][1].stride() == image.stride()
    assert torch.equal(now["generator"].get_state(), generator.get_state())
    assert (now["size"], now["device"]) == (torch.Size((4, 5)), torch.device("cpu"))
    assert type(now["size"]) is torch.Size
    assert now["list"][:-1] == value["list"][:-1]  # type: ignore[index]
    assert now["component"] is PIPELINE.transformer
    assert now["scheduler"] is PIPELINE.scheduler
    assert isinstance(now["output"], EulerDiscreteSchedulerOutput)
    assert torch.equal(now["output"].prev_sample, torch.ones(1))


def test_what_is_frozen_does_not_follow_the_run() -> None:
    tensor, generator = torch.zeros(2), torch.Generator().manual_seed(1)
    frozen = freeze({"tensor": tensor, "generator": generator}, {})
    tensor += 1
    torch.rand(1, generator=generator)
    assert torch.equal(frozen["tensor"], torch.zeros(2))
    assert torch.equal(frozen["generator"].get_state(), torch.Generator().manual_seed(1).get_state())


def test_generators_and_objects_are_set_in_place_since_others_hold_them() -> None:
    drawn = torch.Generator().manual_seed(1)
    torch.rand(1, generator=drawn)
    buffer, scheduler = MomentumBuffer(0.5), EulerDiscreteScheduler()
    buffer.update(torch.full((1,), 3.0))
    scheduler.set_timesteps(3)
    scheduler._step_index = 2
    saved = crossed({"generator": drawn, "buffer": buffer, "scheduler": scheduler})
    mine: dict[str, Any] = {
        "generator": torch.Generator().manual_seed(1),
        "buffer": MomentumBuffer(0.5),
        "scheduler": EulerDiscreteScheduler(),
    }
    now = thaw(saved, mine, PIPELINE)
    assert all(now[name] is mine[name] for name in mine)
    assert torch.equal(mine["generator"].get_state(), drawn.get_state())
    assert torch.equal(mine["buffer"].running_average, torch.full((1,), 3.0))
    assert mine["scheduler"]._step_index == 2
    assert torch.equal(mine["scheduler"].sigmas, scheduler.sigmas)


def test_an_object_that_is_not_there_yet_is_made_without_its_constructor() -> None:
    buffer = MomentumBuffer(0.25)
    now = thaw(crossed(buffer), None, PIPELINE)
    assert type(now) is MomentumBuffer
    assert vars(now) == {"momentum": 0.25, "running_average": 0}


@pytest.mark.parametrize(
    "name",
    [
        *("", "diffusers", "os:system", "builtins:eval", "diffusers.utils:os", "diffusers:DiffusersNothing"),
        *("diffusers.models.unets.unet_2d:UNet2DModel", "diffusers.utils.torch_utils:randn_tensor"),
    ],
)
def test_only_loaded_classes_of_diffusers_are_made(name: str) -> None:
    with pytest.raises(CheckpointError, match="class"):
        find_class(name)
    with pytest.raises(CheckpointError, match="class"):
        thaw(ObjectState(name, {}), None, PIPELINE)


def test_what_cannot_be_saved_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"the run\['a'\]\[0\] is a builtins\.set"):
        freeze({"a": [{1}]}, {})
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(CheckpointError, match="nested deeper"):
        freeze(endless, {})
    with pytest.raises(CheckpointError, match="no component 'vae'"):
        thaw(ComponentName("vae"), None, PIPELINE)
