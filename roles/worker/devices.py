"""Find the device of a role, set it up, and classify the errors that it raises."""

from __future__ import annotations

import ctypes
import gc
import traceback
from collections.abc import Sequence
from typing import Final

import torch

from triptych.actors import Component, StartError
from triptych.engines.pipelines.pipeline import InputError
from triptych.engines.stages import Stage
from triptych.roles.media.uploads import UploadError

_libc: Final = ctypes.CDLL(None)
_MEMORY_ERRORS: Final = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",  # cuDNN, where no workspace fits
)
_DEVICE_ERRORS: Final = (
    "CUDA error",
    "CUDA driver error",
    "Triton Error [CUDA]",
    "cuDNN error",
    "cuBLAS error",
    "CUBLAS_STATUS",
    "CUDNN_STATUS",
    "device-side assert",
)
_SHAPE_ERRORS: Final = (
    "must match the size of tensor",
    "Sizes of tensors must match",
    "is invalid for input of size",
    "cannot reshape tensor",
)
"""Messages of torch about shapes that do not match; it has no error class for them."""
_COMPONENT_MISMATCHES: Final = (
    "incorrect config",
    "Incorrect config",
    "unet.config",
    "transformer.config",
    "vae.config",
    " channels, but got ",
)
"""Messages of diffusers about components that do not match each other, and of torch about a first layer."""
_DETERMINISTIC: Final = (
    TypeError,
    AttributeError,
    NameError,
    LookupError,
    AssertionError,
    NotImplementedError,
    ValueError,
)
_LIBRARIES: Final = ("diffusers.", "transformers.", "triptych.engines.")
_LEAK_BYTES: Final = 1 << 30
"""Bytes, or a quarter of the weights if that is more, that requests and library caches may keep allocated."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the device ran out of memory; the tensors that it held before are intact."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MEMORY_ERRORS)


def is_device_lost(error: BaseException) -> bool:
    """Return whether the device, or this process's context on it, cannot be used after `error`."""
    if is_out_of_memory(error):
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _DEVICE_ERRORS)


def is_component_mismatch(error: BaseException) -> bool:
    """Return whether components of the model do not match each other; no request can change that."""
    text = str(error)
    return isinstance(error, (ValueError, RuntimeError)) and any(words in text for words in _COMPONENT_MISMATCHES)


def is_deterministic(error: BaseException) -> bool:
    """Return whether the same request would fail again: the libraries or the engine raised the error.

    Errors that depend on the machine (memory, the device, files) have other classes.
    """
    return isinstance(error, _DETERMINISTIC) and _raised_in(error).startswith(_LIBRARIES)


def is_invalid_request(error: BaseException) -> bool:
    """Return whether the request itself is wrong, so that it would fail on any instance.

    Such errors are those of the engine about inputs, a ValueError that diffusers raises, and sizes that do not match,
    as of an image and the requested size. The same classes raised elsewhere are defects, and a component mismatch is
    a fault of the model.
    """
    if isinstance(error, (InputError, UploadError)):
        return True
    if is_component_mismatch(error):
        return False
    if isinstance(error, ValueError):
        return _raised_in(error).partition(".")[0] == "diffusers"
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SHAPE_ERRORS)


def _raised_in(error: BaseException) -> str:
    """Return the name of the module whose code raised `error`."""
    name = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = frame.f_globals.get("__name__", "")
    return name


def must_restart(*, in_a_row: int, allocated: int, after_loading: int) -> bool:
    """Return whether this process must end to free a device that ran out of memory.

    The memory of a request that was too large is freed with it. What stays allocated beside the weights has leaked.
    The process also ends when one stage after the other runs out of memory.

    Args:
        in_a_row: Stages that ran out of memory since the last success, this one included.
        allocated: Bytes of tensors on the device, after everything was dropped.
        after_loading: Bytes of tensors on the device right after the weights were loaded.
    """
    return in_a_row > 1 or allocated > after_loading + max(_LEAK_BYTES, after_loading // 4)


def releases_cached_memory(stage: Stage, component: Component, *, shared: bool) -> bool:
    """Return whether to release cached memory after a stage: the GPU is shared, and the stage used much."""
    return shared and (stage is Stage.DECODER or component.offload == "model")


def gpu_of(component: Component, gpus: int) -> int:
    """Return the GPU number of a component: N for `device` "cuda:N"; for "cuda", instance k has GPU k mod `gpus`."""
    _, _, number = component.device.partition(":")
    return int(number) if number else component.index % max(gpus, 1)


def shares_gpu(component: Component, components: Sequence[Component], gpus: int) -> bool:
    """Return whether another component computes on the same GPU."""
    others = (other for other in components if other.on_gpu and other.name != component.name)
    return component.on_gpu and any(gpu_of(other, gpus) == gpu_of(component, gpus) for other in others)


def usable_device(component: Component) -> torch.device:
    """Return the device of a component; a CUDA device always has its number.

    Raises:
        StartError: The host has no such device; the message says what to do.
    """
    name = component.device
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StartError(f'[[roles]] device is "{name}", which is no device: write "cpu" or "cuda:0"') from error
    if device.type not in ("cpu", "cuda"):
        raise StartError(f'[[roles]] device is "{name}": roles run on "cpu" and on "cuda" devices')
    return device if device.type == "cpu" else _usable_gpu(component)


def _usable_gpu(component: Component) -> torch.device:
    name = component.device
    if torch.cuda._is_in_bad_fork():
        raise StartError(
            f'[[roles]] device is "{name}", but this process was forked from one that had opened the CUDA driver:'
            " run a role on a GPU as an interpreter of its own"
            " (python -m triptych.actors.supervision.component_process)"
        )
    # The count may come from the management library while the driver can use none of them.
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = gpu_of(component, gpus)
    if number >= gpus:
        raise StartError(
            f'[[roles]] device is "{name}", but torch finds {gpus} CUDA devices on this host:'
            ' write "cpu", or install a build of torch that supports this host\'s devices'
        )
    return torch.device("cuda", number)


def use_exact_kernels() -> None:
    """Select deterministic kernels; for cuBLAS, the environment of the process does.

    The setting for TF32 stays that of torch, so that the result equals that of diffusers in one process.
    """
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def clear_frames(error: BaseException) -> None:
    """Clear the frames that `error` passed through, which would keep their tensors alive."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__


def release_cached_memory(device: torch.device) -> None:
    """Return memory that no tensor uses to the GPU, for other processes; takes milliseconds.

    Call it on the thread that computes there.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Free unreferenced memory; return the bytes of this process's tensors on the GPU, 0 for the CPU.

    Call it on the thread that computes there.
    """
    gc.collect()
    release_cached_memory(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def trim_host() -> None:
    """Return free memory of this process's allocator to the system."""
    if hasattr(_libc, "malloc_trim"):  # glibc; other allocators keep little
        _libc.malloc_trim(0)


def memory_stats(device: torch.device) -> dict[str, int | float | str | bool]:
    """Return the bytes of the GPU that this process uses now, and its peaks; nothing for the CPU."""
    if device.type != "cuda":
        return {}
    return {
        "device_allocated_bytes": torch.cuda.memory_allocated(device),
        "device_reserved_bytes": torch.cuda.memory_reserved(device),
        "device_peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "device_peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Run a small operation of each kind, so that the first request does not wait for libraries to load.

    Call it on the thread that computes there; takes a second or two on a GPU. Raises whatever a broken device raises.
    """
    square = torch.ones(1, 1, 64, 64, device=device, dtype=dtype)
    torch.nn.functional.scaled_dot_product_attention(square, square, square)
    torch.nn.functional.conv2d(square @ square, square[..., :3, :3])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
