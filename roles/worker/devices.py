"""Which devices a role can run on, how it is set up there, and what an error on one of them means."""

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
"""What torch says of shapes that do not fit; it has no class of error for that."""
_COMPONENT_MISMATCHES: Final = (
    "incorrect config",
    "Incorrect config",
    "unet.config",
    "transformer.config",
    "vae.config",
    " channels, but got ",
)
"""How diffusers says that the parts of a model do not fit each other, and how torch says it of a first layer."""
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
"""Bytes of requests in hand; and a quarter of the weights, for what the libraries make once and keep."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had no room for something. What was there before is whole."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MEMORY_ERRORS)


def is_device_lost(error: BaseException) -> bool:
    """Whether `error` leaves the device, or this process's context on it, in a state that nothing can be built on."""
    if is_out_of_memory(error):
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _DEVICE_ERRORS)


def is_component_mismatch(error: BaseException) -> bool:
    """Whether parts of the model do not fit each other, as diffusers says it; no request can mend that."""
    text = str(error)
    return isinstance(error, (ValueError, RuntimeError)) and any(words in text for words in _COMPONENT_MISMATCHES)


def is_deterministic(error: BaseException) -> bool:
    """Whether the same request would fail in the same way again: code of the libraries or of the engine cannot do it.

    What depends on the machine (memory, the device, files) comes as other classes of errors.
    """
    return isinstance(error, _DETERMINISTIC) and _raised_in(error).startswith(_LIBRARIES)


def is_invalid_request(error: BaseException) -> bool:
    """Whether the request itself is wrong, and would fail anywhere.

    What this engine says of inputs is, what diffusers says by a ValueError of its own, and sizes that do not fit each
    other: of an image and the size asked for, for one. The same classes of error from elsewhere are defects, and what
    is said of the model's configuration is about the model.
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
    """Whether a device that ran out of memory is to be freed by the end of this process.

    A request that was too large is over, and its memory with it. What is still there beside the weights is a leak,
    or held by something that nobody knows; likewise when nothing succeeds any more.

    Args:
        in_a_row: Stages that ran out of memory since one has succeeded, this one included.
        allocated: Bytes of tensors on the device, after everything was dropped.
        after_loading: The same, when the weights had been loaded.
    """
    return in_a_row > 1 or allocated > after_loading + max(_LEAK_BYTES, after_loading // 4)


def releases_cached_memory(stage: Stage, component: Component, *, shared: bool) -> bool:
    """Whether memory that a stage has used goes back to the GPU when it ends: others want it, and it was much."""
    return shared and (stage is Stage.DECODER or component.offload == "model")


def gpu_of(component: Component, gpus: int) -> int:
    """Number of the GPU for a component whose `device` is "cuda:N", or "cuda": instance k has GPU k mod `gpus`."""
    _, _, number = component.device.partition(":")
    return int(number) if number else component.index % max(gpus, 1)


def shares_gpu(component: Component, components: Sequence[Component], gpus: int) -> bool:
    """Whether another component computes on the same GPU."""
    others = (other for other in components if other.on_gpu and other.name != component.name)
    return component.on_gpu and any(gpu_of(other, gpus) == gpu_of(component, gpus) for other in others)


def usable_device(component: Component) -> torch.device:
    """Find the device of a component; a CUDA device always with its number.

    Raises:
        StartError: there is none; the sentence says what to do.

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
    # The count may be that of the management library alone; the driver can still find none of them usable.
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = gpu_of(component, gpus)
    if number >= gpus:
        raise StartError(
            f'[[roles]] device is "{name}", but torch finds {gpus} CUDA devices on this host:'
            ' write "cpu", or install a torch that knows this host\'s devices'
        )
    return torch.device("cuda", number)


def use_exact_kernels() -> None:
    """Choose kernels that give the same bits each time; cuBLAS is told in the environment of the process.

    Whether TF32 is used is left as torch has it, so that the result is that of diffusers in one process.
    """
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def clear_frames(error: BaseException) -> None:
    """Drop what the calls that `error` went through hold: their tensors would outlive them with it."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__


def release_cached_memory(device: torch.device) -> None:
    """Give memory that no tensor uses back to the GPU, where other processes can have it; takes milliseconds.

    Called by the thread that computes there.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Free what nothing refers to any more; returns the bytes that tensors of this process take on the GPU.

    Called by the thread that computes there. Returns 0 on the CPU.
    """
    gc.collect()
    release_cached_memory(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def trim_host() -> None:
    """Give memory that the allocator of this process keeps free back to the system."""
    if hasattr(_libc, "malloc_trim"):  # of glibc; other libraries keep little
        _libc.malloc_trim(0)


def memory_stats(device: torch.device) -> dict[str, int | float | str | bool]:
    """Bytes of the GPU that this process has now, and the most that it has had; none for the CPU."""
    if device.type != "cuda":
        return {}
    return {
        "device_allocated_bytes": torch.cuda.memory_allocated(device),
        "device_reserved_bytes": torch.cuda.memory_reserved(device),
        "device_peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "device_peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Compute a little of each kind, so that the first request does not wait for libraries to be loaded and set up.

    Called by the thread that computes there; takes a second or two on a GPU. Raises what a broken device raises.
    """
    square = torch.ones(1, 1, 64, 64, device=device, dtype=dtype)
    torch.nn.functional.scaled_dot_product_attention(square, square, square)
    torch.nn.functional.conv2d(square @ square, square[..., :3, :3])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
