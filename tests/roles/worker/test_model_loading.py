from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from triptych.actors import Component, StartError, Topology, load_topology
from triptych.actors.topology import LoraSection
from triptych.engines.parameters.lora import LoraFile
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.roles.worker.model_loading import lora_files, model_options, weights_stats
from triptych.roles.worker.process_context import ProcessContext
from triptych.roles.worker.stream_worker import StreamWorker
from triptych.tools.make_lora import make_lora


def adapted(topology: Topology, *loras: LoraSection) -> Topology:
    (model,) = topology.models
    section = msgspec.structs.replace(model.section, lora=loras)
    return msgspec.structs.replace(topology, models=(msgspec.structs.replace(model, section=section),))


def held(component: Component, **changes: str) -> Component:
    return msgspec.structs.replace(component, **changes)


def test_files_are_found_from_the_topology(make_topology: Callable[..., Topology], tmp_path: Path) -> None:
    topology = adapted(
        make_topology(),
        LoraSection(name="a", path="a.safetensors", scale=0.5),
        LoraSection(name="b", path="/b", path_2="c"),
    )
    assert lora_files(topology.models[0]) == (
        LoraFile("a", tmp_path / "a.safetensors", 0.5),
        LoraFile("b", Path("/b"), 1.0, tmp_path / "c"),
    )


@pytest.mark.parametrize(
    ("written", "task"), [('"any"', "any"), ('["text2image", "inpainting"]', ("text2image", "inpainting"))]
)
def test_tasks_and_the_route_come_from_the_topology(written: str, task: str | tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "one.toml"
    path.write_text(f'[model]\npath = "m"\ntask = {written}\nroute = "classic"\n[[roles]]\nkind = "monolithic"\n')
    options = model_options(load_topology(path).models[0])
    assert (options.task, options.route) == (task, "classic")


def test_an_instance_holds_its_weights_as_its_role_says(
    make_topology: Callable[..., Topology], tiny_model: Path, tmp_path: Path
) -> None:
    make_lora(tiny_model, tmp_path / "a.safetensors")
    topology = adapted(make_topology(tiny_model, kind="monolithic"), LoraSection(name="a", path="a.safetensors"))
    component = held(topology.component("monolithic-0"), dtype="bfloat16", quantization="int8", offload="model")
    loaded: StagePipeline = StreamWorker(component, topology, ProcessContext(component))._load(torch.device("cpu"))
    facts = weights_stats(loaded.placement)
    assert facts["quantization"] == "int8"
    assert facts["loras"] == ["a"]
    assert 0 < int(str(facts["weights_bytes"])) < int(str(facts["bytes_before"]))
    assert loaded._offloader is not None
    assert loaded.placement.dtype is torch.bfloat16
    plain = StreamWorker(
        held(component, quantization="none"), make_topology(tiny_model), ProcessContext(component)
    )._load(torch.device("cpu"))
    offload = "model, which does nothing on the CPU"
    assert weights_stats(plain.placement) == {"weights_bytes": facts["bytes_before"], "offload": offload}


def test_an_adapter_that_does_not_fit_is_a_failed_start(
    make_topology: Callable[..., Topology],
    local_cluster: Callable[..., object],
    run: Callable[..., None],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no")
    topology = adapted(make_topology(tiny_model, kind="monolithic"), LoraSection(name="a", path="a.safetensors"))

    async def scenario() -> None:
        component = topology.component("monolithic-0")
        worker = StreamWorker(component, topology, ProcessContext(component))
        with pytest.raises(StartError, match=r"The LoRA .*a\.safetensors cannot be read"):
            await worker.started()

    run(scenario())
