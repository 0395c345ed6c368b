"""Make a LoRA of random weights for a model, to try adapters out: `python -m triptych.tools.make_lora MODEL OUT`.

The file has the format of diffusers, as `save_lora_weights` of its pipelines writes it. The same seed makes the same
file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import diffusers
import torch
import transformers
import typer
from accelerate import init_empty_weights
from safetensors.torch import save_file

from triptych.engines.parameters.serving_config import load_index
from triptych.engines.partition.strategy import lora_class

_LAYERS: Final = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
"""The linear layers of attention, as transformers and UNets of diffusers and text encoders call them."""
_LIBRARIES: Final = {"diffusers": diffusers, "transformers": transformers}


def make_lora(
    model: Path, out: Path, *, rank: int = 4, seed: int = 0, strength: float = 0.5, components: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Write a LoRA for the attention of a model.

    Args:
        model: Its folder; just the configurations are read.
        out: The `.safetensors` file.
        rank: Of its matrices.
        seed: Of its weights.
        strength: About how large the change of a layer's output is, beside an input of ones in size.
        components: Which ones it changes; none stands for all that the pipeline can load a LoRA into.

    Returns:
        The components that it changes.

    Raises:
        ValueError: diffusers loads no LoRA into such a pipeline, or into those components.
    """
    index = load_index(model)
    mixin = lora_class(index)
    able = [name for name in getattr(mixin, "_lora_loadable_modules", ()) if _entry(index, name)]
    wanted = components or tuple(able)
    if not wanted or not set(wanted) <= set(able):
        raise ValueError(f"diffusers loads LoRAs for {index['_class_name']} into: {', '.join(able) or 'nothing'}.")
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for component in wanted:
        for path, layer in _linear(_empty(model / component, *_entry(index, component))):
            down = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
            up = torch.randn(layer.out_features, rank, generator=generator) * strength / rank**0.5
            tensors[f"{component}.{path}.lora_A.weight"] = down
            tensors[f"{component}.{path}.lora_B.weight"] = up
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out, metadata={"format": "pt"})
    return wanted


def _entry(index: dict[str, object], name: str) -> tuple[str, ...]:
    entry = index.get(name)
    parts = entry[:2] if isinstance(entry, list) else []
    return tuple(parts) if all(isinstance(part, str) for part in parts) else ()


def _empty(folder: Path, library: str, name: str) -> Any:
    # Any other library that an index names is a folder of pipelines.
    cls: Any = getattr(_LIBRARIES.get(library) or getattr(diffusers.pipelines, library), name)
    with init_empty_weights():
        if issubclass(cls, diffusers.ModelMixin):
            return cls.from_config(cls.load_config(str(folder)))
        return cls(cls.config_class.from_pretrained(str(folder)))


def _linear(module: torch.nn.Module) -> list[tuple[str, torch.nn.Linear]]:
    return [
        (path, layer)
        for path, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and path.endswith(tuple(f".{name}" for name in _LAYERS))
    ]


def main(
    model: Annotated[Path, typer.Argument(help="The folder of the model.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    rank: Annotated[int, typer.Option(help="Of the matrices.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    strength: Annotated[float, typer.Option(help="How large the change is.")] = 0.5,
    component: Annotated[list[str] | None, typer.Option(help="One that it changes; default all.")] = None,
) -> None:
    """Make a LoRA of random weights."""
    try:
        made = make_lora(model, out, rank=rank, seed=seed, strength=strength, components=tuple(component or ()))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    print(f"A LoRA for {', '.join(made)} of {model} is in {out}.")


if __name__ == "__main__":
    typer.run(main)
