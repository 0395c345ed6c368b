"""Models with random weights, made on the device that they compute on, and their inputs.

The seconds of a step do not depend on what the weights are, so random ones at the shapes of the original give its
timings without a download. On the CPU the same code runs with tiny shapes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, FluxTransformer2DModel, QwenImageTransformer2DModel, WanTransformer3DModel
from transformers import PreTrainedModel

from triptych.engines.memory.arena import available_memory
from triptych.tools.gpu_report.row_context import RowContext, RowSkippedError
from triptych.tools.make_model import flux, vaes
from triptych.tools.make_model.recipe import Recipe

DTYPE: Final = torch.bfloat16
WRITERS: Final = 8
"""Threads that write weights."""
WRITE_CHUNK: Final = 64 << 20
_SAFETENSORS: Final = {torch.bfloat16: "BF16", torch.float32: "F32"}
SPREAD: Final = 0.02
"""Standard deviation of random weights: a linear layer of 3,000 inputs then keeps the size of what goes through it."""


def with_random_weights(make: Callable[[], Any], device: torch.device, dtype: torch.dtype = DTYPE) -> Any:
    """Make a component on a device without the initialisation of its class, which takes minutes for 12 billion weights.

    Args:
        make: Makes it; what is no module (a tokenizer, a scheduler) stays as it is made.
        device: Where it is to compute.
        dtype: Of its weights.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            module = make()
    finally:
        torch.set_default_dtype(before)
    if not isinstance(module, torch.nn.Module):
        return module
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            part.register_parameter(name, torch.nn.Parameter(_random(name, weight, device, dtype), requires_grad=False))
    if isinstance(module, PreTrainedModel):
        module.tie_weights()
    return module.to(device).eval()


def _random(name: str, weight: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    values = torch.empty(weight.shape, dtype=dtype, device=device)
    # A weight of one dimension is the scale of a norm.
    return values.fill_(1.0) if weight.ndim == 1 and name == "weight" else values.normal_(0.0, SPREAD)


def prepare(transformer: Any, context: RowContext) -> None:
    """Give a denoiser the attention backend and the compilation that the run asks for.

    Raises:
        ValueError, RuntimeError, ImportError: The backend is not known, or not usable here.
    """
    if context.settings.attention:
        transformer.set_attention_backend(context.settings.attention)
    if context.settings.compile:
        compile_blocks(transformer, context)


def compile_blocks(transformer: Any, context: RowContext) -> None:
    """Compile the repeated blocks; on the CPU they are just traced, as a compiler there takes a minute."""
    transformer.compile_repeated_blocks(fullgraph=True, **({} if context.cuda else {"backend": "aot_eager"}))


# -- Flux


@dataclass(frozen=True)
class FluxShapes:
    """The shapes of an image of Flux.

    Attributes:
        recipe: Makes its components.
        side: Of the images, in pixels.
        steps: Of an image.
        long: Steps of an image in whose middle a process can be killed.
        nbytes: About what its files take.
        gpu_gib: Memory of the GPU that one process needs.
    """

    recipe: Recipe
    side: int
    steps: int
    long: int
    nbytes: int
    gpu_gib: float


def flux_shapes(context: RowContext) -> FluxShapes:
    """Return the shapes of FLUX.1-dev, or tiny ones."""
    if context.full:
        return FluxShapes(flux.full(), 1024, 28, 28, 34 << 30, 42)
    recipe = replace(flux.flux(vaes.kl, guidance_embeds=True), dtype=DTYPE)
    return FluxShapes(recipe, 64, 4, 50, 4 << 20, 0)


def flux_step(transformer: Any, context: RowContext) -> Callable[[], torch.Tensor]:
    """Return what runs one step of the transformer at the shapes of an image (guidance is an input, so one pass)."""
    config = transformer.config
    pixels, words = ((1024 // 16) ** 2, 512) if context.full else ((64 // 8) ** 2, 64)
    given: dict[str, Any] = {"device": context.device, "dtype": DTYPE}
    image_ids = torch.zeros(pixels, 3, **given)
    image_ids[:, 1] = torch.arange(pixels, **given) // pixels**0.5
    inputs = {
        "hidden_states": torch.randn(1, pixels, config.in_channels, **given),
        "encoder_hidden_states": torch.randn(1, words, config.joint_attention_dim, **given),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, **given),
        "timestep": torch.full((1,), 0.5, **given),
        "guidance": torch.full((1,), 3.5, **given),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(words, 3, **given),
    }
    return lambda: _tensor(transformer(**inputs, return_dict=False)[0])


def flux_transformer(context: RowContext) -> FluxTransformer2DModel:
    """Return the transformer of Flux."""
    context.needs(28 if context.full else 0)
    make = flux_shapes(context).recipe.components["transformer"]
    if make is None:
        raise TypeError("a recipe of Flux has a transformer")
    return with_random_weights(make, context.device)


# -- Qwen-Image


def qwen_transformer(context: RowContext) -> QwenImageTransformer2DModel:
    """Return the transformer of Qwen-Image, 20 billion weights, or a tiny one."""
    context.needs(46 if context.full else 0)
    tiny: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    }
    return with_random_weights(lambda: QwenImageTransformer2DModel(**({} if context.full else tiny)), context.device)


QWEN_SIDE: Final = 512
QWEN_TEXT: Final = 64
"""Tokens of a prompt of some 50 words."""


def qwen_step(transformer: Any, context: RowContext, batch: int) -> Callable[[], None]:
    """Return what runs one step for `batch` images of 512 x 512: a pass with the prompt and one without."""
    side = QWEN_SIDE // 16 if context.full else 4
    given: dict[str, Any] = {"device": context.device, "dtype": DTYPE}
    inputs = {
        "hidden_states": torch.randn(batch, side * side, transformer.config.in_channels, **given),
        "timestep": torch.full((batch,), 0.5, **given),
        "img_shapes": [[(1, side, side)]] * batch,
    }
    texts = [torch.randn(batch, QWEN_TEXT, transformer.config.joint_attention_dim, **given) for _ in range(2)]
    mask = torch.ones(batch, QWEN_TEXT, dtype=torch.bool, device=context.device)

    def step() -> None:
        for text in texts:
            transformer(**inputs, encoder_hidden_states=text, encoder_hidden_states_mask=mask, return_dict=False)

    return step


# -- Wan 2.1


@dataclass(frozen=True)
class VideoShape:
    """The shape of a video.

    Attributes:
        name: For the report.
        height: In pixels.
        width: In pixels.
        frames: How many.
    """

    name: str
    height: int
    width: int
    frames: int

    def latents(self, channels: int) -> tuple[int, ...]:
        """Return the shape [1, channels, frames, height, width] of its latents."""
        return (1, channels, (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8)


def videos(context: RowContext) -> tuple[VideoShape, ...]:
    """Return the videos that are measured."""
    if context.full:
        return (VideoShape("480p, 81 frames", 480, 832, 81), VideoShape("1024 x 1024, 81 frames", 1024, 1024, 81))
    return (VideoShape("32 x 32, 5 frames", 32, 32, 5),)


def wan_transformer(context: RowContext) -> WanTransformer3DModel:
    """Return the transformer of Wan2.1-1.3B, or a tiny one."""
    context.needs(40 if context.full else 0)
    full: dict[str, Any] = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
    tiny: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 64, "num_layers": 2}
    tiny |= {"text_dim": 32, "freq_dim": 32}
    return with_random_weights(lambda: WanTransformer3DModel(**(full if context.full else tiny)), context.device)


def wan_vae(context: RowContext) -> AutoencoderKLWan:
    """Return the autoencoder of Wan, in float32 as in its pipeline."""
    tiny: dict[str, Any] = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return with_random_weights(
        lambda: AutoencoderKLWan(**({} if context.full else tiny)), context.device, torch.float32
    )


def wan_step(transformer: Any, context: RowContext, video: VideoShape) -> Callable[[], None]:
    """Return what runs one step of a video: a pass with the prompt and one without."""
    given: dict[str, Any] = {"device": context.device, "dtype": DTYPE}
    latents = torch.randn(video.latents(transformer.config.in_channels), **given)
    texts = [torch.randn(1, 512, transformer.config.text_dim, **given) for _ in range(2)]
    timestep = torch.full((1,), 500, device=context.device)

    def step() -> None:
        for text in texts:
            transformer(hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)

    return step


# -- files


def folder_with_space(context: RowContext, nbytes: int) -> Path:
    """Return a folder of this run that can take so many bytes: one in memory where there is room, else on disk.

    Raises:
        RowSkippedError: There is none.
    """
    for folder in scratch_folders(context.scratch):
        with suppress(OSError):
            folder.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder.parent).free
            if _in_memory(folder):
                # The processes that read the files need as much again for a moment.
                free = min(free, available_memory() // 2)
            if free > nbytes * 1.05:
                folder.mkdir(exist_ok=True)
                return folder
    wanted = " or ".join(str(folder.parent) for folder in scratch_folders(context.scratch))
    raise RowSkippedError(f"Its weights take {nbytes / 2**30:.0f} GiB of files, and {wanted} has no room for them.")


def scratch_folders(scratch: Path) -> tuple[Path, ...]:
    """Return the folders that may contain large files of a run; the starter of the run removes them."""
    return (Path("/dev/shm") / scratch.name, scratch / "files")  # noqa: S108 - a name that is the run's own


def _in_memory(folder: Path) -> bool:
    return folder.is_relative_to("/dev/shm")  # noqa: S108


def save(component: Any, folder: Path) -> None:
    """Write a component as its `save_pretrained` does, the weights with many threads.

    What takes the time is new pages of memory for the files: one thread fills about a gigabyte a second.
    """
    if not isinstance(component, torch.nn.Module):
        component.save_pretrained(folder)
        return
    folder.mkdir(exist_ok=True)  # A row that was ended may have begun it.
    if isinstance(component, PreTrainedModel):
        component.config.save_pretrained(folder)
        _write_weights(component, folder / "model.safetensors")
    else:
        component.save_config(folder)  # type: ignore[operator]
        _write_weights(component, folder / "diffusion_pytorch_model.safetensors")


def _write_weights(module: torch.nn.Module, file: Path) -> None:
    """Write a safetensors file: the length of a JSON header, the header, the tensors end to end."""
    # Embeddings that two modules share are written once.
    state: dict[str, torch.Tensor] = module.state_dict()
    named = {
        name: state[name] for name in {weight.data_ptr(): name for name, weight in reversed(state.items())}.values()
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends = list(accumulate(weight.nbytes for weight in named.values()))
    for (name, weight), end in zip(named.items(), ends, strict=True):
        dtype = _SAFETENSORS[weight.dtype]
        header[name] = {"dtype": dtype, "shape": list(weight.shape), "data_offsets": [end - weight.nbytes, end]}
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.pwrite(descriptor, len(text).to_bytes(8, "little") + text, 0)
        with ThreadPoolExecutor(WRITERS) as writers:
            futures = [
                writers.submit(_write_tensor, descriptor, weight, begin + end - weight.nbytes)
                for weight, end in zip(named.values(), ends, strict=True)
            ]
            for future in futures:
                future.result()
    finally:
        os.close(descriptor)


def _write_tensor(descriptor: int, weight: torch.Tensor, offset: int) -> None:
    values: Any = weight.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
    rest = memoryview(values)
    while rest:
        written = os.pwrite(descriptor, rest[:WRITE_CHUNK], offset)
        rest, offset = rest[written:], offset + written


def recipe_of_components(recipe: Recipe, parts: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a model from components that exist already."""
    return replace(recipe, components={name: _given(part) for name, part in parts.items()})


def _given(part: Any) -> Callable[[], Any]:
    return lambda: part


def _tensor(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"a model made {type(value).__name__}, no tensor")
    return value
