"""Files as the authors of models publish them: the names of tensors are theirs, and one file has several components.

diffusers converts such names to its own, and not back; here is the way back, for tiny models.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_FLUX = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
}
_FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "proj_out": "linear2",
}
_FLUX_JOINED = {
    "double_blocks": {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    },
    "single_blocks": {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")},
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def save_sdxl(model: Path, file: Path) -> None:
    """A checkpoint with all that a model has of Stable Diffusion XL."""
    read = {name: weights_of(model / name) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
    save(
        file,
        _prefixed(_unet(read["unet"]), "model.diffusion_model."),
        _prefixed(_vae(read["vae"]), "first_stage_model."),
        _prefixed(_clip(read["text_encoder"]), "conditioner.embedders.0.transformer."),
        _prefixed(_open_clip(read["text_encoder_2"]), "conditioner.embedders.1.model."),
    )


def save_flux(model: Path, file: Path) -> None:
    """The same of Flux, as ComfyUI keeps it."""
    read = {name: weights_of(model / name) for name in ("transformer", "vae", "text_encoder", "text_encoder_2")}
    # Published files have this one twice.
    read["text_encoder_2"]["encoder.embed_tokens.weight"] = read["text_encoder_2"]["shared.weight"]
    save(
        file,
        _prefixed(_flux(read["transformer"]), "model.diffusion_model."),
        _prefixed(_vae(read["vae"]), "vae."),
        _prefixed(_clip(read["text_encoder"]), "text_encoders.clip_l.transformer."),
        _prefixed(read["text_encoder_2"], "text_encoders.t5xxl.transformer."),
    )


def narrow_flux(width: int) -> Any:
    """The conversion that diffusers has for Flux, which knows the width of the original alone, for another width."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert "inner_dim = 3072\n" in source
    names = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072\n", f"inner_dim = {width}\n"), names)
    return names["convert_flux_transformer_checkpoint_to_diffusers"]


def save_gguf(weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """Weights in blocks of eight bits where their shape allows that, as in files that are called Q8_0."""
    writer = gguf.GGUFWriter(str(file), "flux")
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, value in weights.items():
        array = value.float().numpy()
        if array.ndim == 2 and array.shape[-1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weights_of(folder: Path) -> Weights:
    return load_file(next(folder.glob("*model.safetensors")))


def save(file: Path, *parts: Weights) -> None:
    save_file({name: value.contiguous().clone() for part in parts for name, value in part.items()}, file)


def _prefixed(weights: Weights, prefix: str) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    return next((new + name.removeprefix(old) for old, new in names.items() if name.startswith(f"{old}.")), name)


def _unet(weights: Weights) -> Weights:
    """With one layer in each block, so that each takes two places."""
    made = {}
    for name, value in weights.items():
        found = re.fullmatch(r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", name)
        if not found:
            made[_renamed(name, _UNET)] = value
            continue
        side, block, what, layer, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
        rest = _renamed(rest, _RESNET) if what == "resnets" else rest
        if side == "mid_block":
            place = f"middle_block.{2 * layer if what == 'resnets' else 1}"
        elif side == "down_blocks":
            number = 2 + 2 * block if what == "downsamplers" else 1 + 2 * block + layer
            place = f"input_blocks.{number}.{1 if what == 'attentions' else 0}"
            rest = rest.replace("conv.", "op.") if what == "downsamplers" else rest
        else:
            attends = f"up_blocks.{block}.attentions.0.norm.weight" in weights
            number = 2 * block + (1 if what == "upsamplers" else layer)
            inner = {"resnets": 0, "attentions": 1, "upsamplers": 2 if attends else 1}[what]
            place = f"output_blocks.{number}.{inner}"
        made[f"{place}.{rest}"] = value
    return made


def _flux(weights: Weights) -> Weights:
    made: Weights = {}
    for name, value in weights.items():
        if not (found := re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.*)", name)):
            if name.startswith("norm_out"):
                scale, shift = value.chunk(2)
                value = torch.cat([shift, scale])
            made[_renamed(name, _FLUX)] = value
            continue
        kind = "single_blocks" if found[1] else "double_blocks"
        mine, place, rest = f"{name.removesuffix(found[3])}", f"{kind}.{found[2]}", found[3]
        names = _FLUX_SINGLE if found[1] else _FLUX_DOUBLE
        for joined, parts in _FLUX_JOINED[kind].items():
            if rest in (f"{parts[0]}.weight", f"{parts[0]}.bias"):
                end = rest.rpartition(".")[2]
                made[f"{place}.{joined}.{end}"] = torch.cat([weights[f"{mine}{part}.{end}"] for part in parts])
        if not any(rest.startswith(f"{part}.") for parts in _FLUX_JOINED[kind].values() for part in parts):
            made[f"{place}.{names.get(rest) or _renamed(rest, names)}"] = value
    return made


def _vae(weights: Weights) -> Weights:
    levels = 1 + max(int(found[1]) for name in weights if (found := re.match(r"decoder\.up_blocks\.(\d+)", name)))
    made = {}
    for name, value in weights.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        if found := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.*)", new):
            new = f"{found[1]}.mid.attn_1.{_renamed(found[2], _VAE_ATTENTION)}"
            value = value[:, :, None, None] if value.ndim == 2 else value
        made[new] = value
    return made


def _clip(weights: Weights) -> Weights:
    return {name if name.startswith("text_model.") else f"text_model.{name}": value for name, value in weights.items()}


def _open_clip(weights: Weights) -> Weights:
    made: Weights = {}
    for name, value in weights.items():
        name = name.removeprefix("text_model.")
        if found := re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)", name):
            block, rest = f"transformer.resblocks.{found[1]}", _renamed(found[2], _OPEN_CLIP)
            if part := re.fullmatch(r"self_attn\.q_proj\.(\w+)", rest):
                sides = [weights[_sibling(weights, found[1], side, part[1])] for side in "qkv"]
                made[f"{block}.attn.in_proj_{part[1]}"] = torch.cat(sides)
            elif not re.match(r"self_attn\.[kv]_proj", rest):
                made[f"{block}.{rest.replace('self_attn', 'attn')}"] = value
        elif name == "text_projection.weight":
            made["text_projection"] = value.T
        elif name == "embeddings.position_embedding.weight":
            made["positional_embedding"] = value
        elif name == "embeddings.token_embedding.weight":
            made["token_embedding.weight"] = value
        elif name.startswith("final_layer_norm."):
            made[name.replace("final_layer_norm", "ln_final")] = value
    return made


def _sibling(weights: Weights, layer: str, side: str, part: str) -> str:
    return next(name for name in weights if name.endswith(f"layers.{layer}.self_attn.{side}_proj.{part}"))
