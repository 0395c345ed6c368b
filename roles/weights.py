"""How an instance holds its weights: what the topology says, for the engines, and what came of it, for the log."""

from __future__ import annotations

from actors import Topology
from engines.lora import LoraFile
from engines.placing import Placement
from engines.quantization import Quantization


def lora_files(topology: Topology) -> tuple[LoraFile, ...]:
    """The adapters of a topology."""
    return tuple(
        LoraFile(
            name=lora.name,
            path=topology.lora_path(lora.path),
            scale=lora.scale,
            path_2=topology.lora_path(lora.path_2) if lora.path_2 else None,
        )
        for lora in topology.model.lora
    )


def weights_facts(placement: Placement) -> dict[str, object]:
    """What the log says of weights: their bytes, those before they were quantized, and adapters."""
    facts: dict[str, object] = {"weights_bytes": placement.held_bytes}
    if placement.quantization is not Quantization.NONE:
        facts |= {"quantization": placement.quantization.value, "bytes_before": placement.read_bytes}
    if placement.adapters.files:
        facts["loras"] = [file.name for file in placement.adapters.files]
    return facts
