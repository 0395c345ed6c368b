"""Which devices a role can run on, and what an error on one of them means."""

from __future__ import annotations

import torch

from actors import StartFailure

_DEVICE_ERRORS = ("CUDA error", "cuDNN error", "cuBLAS error", "CUBLAS_STATUS", "CUDNN_STATUS", "device-side assert")
_SHAPE_ERRORS = (
    "must match the size of tensor",
    "Sizes of tensors must match",
    "is invalid for input of size",
    "cannot reshape tensor",
)
"""What torch says of shapes that do not fit; it has no class of error for that."""


def is_device_lost(error: BaseException) -> bool:
    """Whether `error` leaves the device, or this process's context on it, in a state that nothing can be built on.

    Memory that ran out counts: what fills it may be a leak of this very process, and only its end surely frees it.
    """
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _DEVICE_ERRORS)


def is_at_fault(error: BaseException) -> bool:
    """Whether the request itself is wrong, and would fail anywhere.

    Sizes that do not fit each other are: of a picture and the size asked for, for one.
    """
    if isinstance(error, (ValueError, TypeError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SHAPE_ERRORS)


def usable_device(name: str) -> torch.device:
    """Find the device of that name, such as "cpu" or "cuda:1".

    Raises:
        StartFailure: there is none; the sentence says what to do.

    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StartFailure(f'[[roles]] device is "{name}", which is no device: write "cpu" or "cuda:0"') from error
    if device.type not in ("cpu", "cuda"):
        raise StartFailure(f'[[roles]] device is "{name}": roles run on "cpu" and on "cuda" devices')
    if device.type == "cuda" and torch.cuda._is_in_bad_fork():
        raise StartFailure(
            f'[[roles]] device is "{name}", but this process was forked from one that had opened the CUDA driver:'
            " run a role on a card as an interpreter of its own (python -m actors.process)"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise StartFailure(
            f'[[roles]] device is "{name}", but torch finds {torch.cuda.device_count()} CUDA devices on this host:'
            ' write "cpu", or install a torch that knows this host\'s devices'
        )
    return device
