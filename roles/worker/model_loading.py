"""Load the weights of an instance as the topology says, and summarize them for the log.

Importing this module imports no torch; most of its functions do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from triptych.actors import Component, Model
from triptych.engines.model_options import ComponentOptions, EmbeddingFile, ModelOptions
from triptych.engines.parameters.lora import LoraFile
from triptych.engines.parameters.serving_config import load_index
from triptych.engines.weights.files import component_files
from triptych.engines.weights.inspection import component_entries

if TYPE_CHECKING:
    import torch

    from triptych.engines.pipelines.pipeline import StagePipeline
    from triptych.engines.weights.placement import Placement
    from triptych.engines.weights.read_ahead import ReadProgress


def lora_files(model: Model) -> tuple[LoraFile, ...]:
    """Return the LoRA adapters of a model."""
    return tuple(
        LoraFile(
            name=lora.name,
            path=model.absolute(lora.path),
            scale=lora.scale,
            path_2=model.absolute(lora.path_2) if lora.path_2 else None,
        )
        for lora in model.section.lora
    )


def model_options(model: Model) -> ModelOptions:
    """Return how to read and partition a model, as the topology says."""
    section, source = model.section, model.source
    return ModelOptions(
        task=section.task,
        route=section.route,
        variant=section.variant,
        scheduler=ComponentOptions.of(section.scheduler),
        guider=ComponentOptions.of(section.guider),
        vae_tiling=section.vae_tiling,
        vae_tiling_options=tuple(sorted(section.vae_tiling_options.items())),
        vae_slicing=section.vae_slicing,
        step_cache=model.step_cache,
        checkpoint=source.checkpoint,
        components=tuple(sorted(source.components.items())),
        trust_remote_code=section.trust_remote_code,
        embeddings=tuple(EmbeddingFile(each.token, model.absolute(each.path)) for each in section.embeddings),
    )


def describe_model(model: Model) -> tuple[str, str]:
    """Return how a model would be served, and a problem or ""; see `engines.partition.strategy.describe_serving`."""
    from triptych.engines.partition.strategy import describe_serving

    disaggregated = all(role.kind != "monolithic" for role in model.section.roles)
    options = model_options(model)
    sentence, problem = describe_serving(model.path, options, disaggregated=disaggregated)
    return (sentence if problem else f"{sentence}{_notes(model.path, options)}"), problem


def _notes(model: Path, options: ModelOptions) -> str:
    """List the components whose weights are not plain files of the model's folder; "" for none."""
    found = [
        f"{entry.name} from {note}"
        for entry in component_entries(model, load_index(model), options)
        if entry.has_weights and (note := component_files(entry.name, entry.folder, options).note)
    ]
    return f"; weights of {', '.join(found)}" if found else ""


def load_stages(
    component: Component, model: Model, device: torch.device, progress: ReadProgress | None = None
) -> StagePipeline:
    """Load the stages that an instance runs, as the topology says, and report progress to `progress`.

    Raises:
        ModelError: The model cannot be served.
    """
    import torch

    from triptych.engines.pipelines.pipeline import StagePipeline
    from triptych.roles.worker.attempts import STAGES_OF_ROLE

    return StagePipeline.load(
        model.path,
        STAGES_OF_ROLE[component.kind],
        dtype=getattr(torch, component.dtype),
        device=device,
        quantization=component.quantization,
        offload=component.offload,
        adapters=lora_files(model),
        options=model_options(model),
        progress=progress,
    )


def weights_stats(placement: Placement) -> dict[str, object]:
    """Summarize weights for the log: their bytes, the bytes before quantization, and adapters."""
    from triptych.engines.weights.offload import Offload
    from triptych.engines.weights.quantization import Quantization

    facts: dict[str, object] = {"weights_bytes": placement.held_bytes}
    if placement.quantization is not Quantization.NONE:
        facts |= {"quantization": placement.quantization.value, "bytes_before": placement.read_bytes}
    if placement.notes:
        facts["weights_from"] = ", ".join(f"{name}: {note}" for name, note in sorted(placement.notes.items()))
    if placement.offload is not Offload.NONE and placement.device.type == "cpu":
        facts["offload"] = f"{placement.offload.value}, which does nothing on the CPU"
    if placement.adapters.files:
        facts["loras"] = [file.name for file in placement.adapters.files]
    return facts
