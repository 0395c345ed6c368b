"""Read a component from a single file: its own, or a checkpoint of several components.

diffusers converts the names of tensors (`from_single_file`); only local files are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from diffusers import GGUFQuantizationConfig, ModelMixin
from diffusers.loaders import FromOriginalModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import (
    create_diffusers_clip_model_from_ldm,
    create_diffusers_t5_model_from_checkpoint,
    fetch_diffusers_config,
    is_clip_model_in_single_file,
    is_t5_in_single_file,
)
from diffusers.utils import is_gguf_available
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from triptych.engines.stages import ModelError

_SCALED: Final = (".scale_weight", ".weight_scale", ".scale_input", ".comfy_quant", "scaled_fp8")
"""Suffixes of tensor names that mean that the weights are scaled."""


def read_single_file(name: str, kind: Any, file: Path, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """Read a component from a safetensors or a GGUF file.

    Args:
        name: The name of the component in the pipeline.
        kind: Its class.
        file: The file with its weights, and maybe those of others.
        folder: The folder with its configuration.
        dtype: The dtype of the weights; for a GGUF file, whose weights are kept, the dtype that computes.

    Returns:
        The component; parameters that the file does not have are on the "meta" device.

    Raises:
        ModelError: The component cannot be read from such a file.
        Exception: Whatever the libraries raise for a broken file.
    """
    if file.suffix == ".gguf":
        return _read_gguf(name, kind, file, folder, dtype)
    weights = load_file(file)  # mapped, so that unused tensors are not read
    if scaled := next((key for key in weights if key.endswith(_SCALED)), ""):
        raise ModelError(
            f"The {name} cannot be read from {file}: its weights are scaled ({scaled}), which diffusers does not"
            " support. Use a file with plain weights, such as float16 or bfloat16."
        )
    if not isinstance(kind, type):
        raise _unreadable(name, "a component without a class", file)
    if issubclass(kind, PreTrainedModel):
        text_encoder: torch.nn.Module = _read_text_encoder(kind, weights, folder, dtype)
        return text_encoder
    if not _can_convert(kind):
        return _read_plain(name, kind, weights, file, folder, dtype)
    loader: Any = kind
    made: torch.nn.Module = loader.from_single_file(weights, config=str(folder), dtype=dtype, local_files_only=True)
    return made


def configuration_of(checkpoint: Path) -> str:
    """Return the repository with the configurations for a checkpoint, as diffusers knows it, from its tensor shapes.

    Raises:
        ModelError: The file is not a safetensors file.
    """
    try:
        shapes = load_file(checkpoint)  # mapped, so that only the header is read
    except (OSError, SafetensorError) as error:
        raise ModelError(f"The checkpoint {checkpoint} cannot be read: {error}.") from error
    return str(fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])


def _can_convert(kind: type) -> bool:
    return issubclass(kind, FromOriginalModelMixin) and any(
        base.__name__ in SINGLE_FILE_LOADABLE_CLASSES for base in kind.__mro__
    )


def _read_gguf(name: str, kind: Any, file: Path, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    if not is_gguf_available():
        raise ModelError(f'The {name} is in {file}, which needs the package gguf: pip install "triptych[gguf]".')
    if not isinstance(kind, type) or not _can_convert(kind):
        raise _unreadable(name, getattr(kind, "__name__", str(kind)), file)
    loader: Any = kind
    made: torch.nn.Module = loader.from_single_file(
        str(file),
        config=str(folder),
        dtype=dtype,
        local_files_only=True,
        quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
    )
    return made


def _read_text_encoder(kind: Any, weights: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype) -> Any:
    if is_clip_model_in_single_file(kind, weights):
        return create_diffusers_clip_model_from_ldm(
            kind, checkpoint=weights, config=str(folder), torch_dtype=dtype, local_files_only=True
        )
    if is_t5_in_single_file(weights):
        made = create_diffusers_t5_model_from_checkpoint(
            kind, checkpoint=weights, config=str(folder), torch_dtype=dtype, local_files_only=True
        )
        # Its embeddings are one tensor with two names; some files have only one of them.
        made.tie_weights()
        return made.eval()
    # Otherwise it is a file as ComfyUI has them, with the names of transformers.
    config = kind.config_class.from_pretrained(str(folder), local_files_only=True)
    made, report = kind.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"it has no {missing[0]}, and {len(missing)} in all are missing")
    return made


def _read_plain(
    name: str, kind: Any, weights: dict[str, torch.Tensor], file: Path, folder: Path, dtype: torch.dtype
) -> torch.nn.Module:
    """Read a component for which diffusers converts no names: the file has its own."""
    if not issubclass(kind, ModelMixin):
        raise _unreadable(name, kind.__name__, file)
    made: torch.nn.Module = kind.from_config(kind.load_config(str(folder)))
    made.load_state_dict(weights, strict=True)
    return made.to(dtype).eval()


def _unreadable(name: str, kind: str, file: Path) -> ModelError:
    return ModelError(
        f"The {name} ({kind}) cannot be read from {file}: diffusers does not read it from such a file. Give its folder."
    )
