from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps

from triptych.actors import Component, StartError
from triptych.engines.pipelines.pipeline import InputError
from triptych.engines.stages import Stage
from triptych.roles.media.uploads import UploadError
from triptych.roles.worker import devices

GIB = 1 << 30


def role(name: str, device: str = "cuda", **options: object) -> Component:
    index = int(name[-1])
    return Component(name=name, kind="denoiser", address="", port=0, index=index, device=device, **options)  # type: ignore[arg-type]


def raised(by: Callable[[], object]) -> Exception:
    """The error that a call ends with, and where it came from."""
    try:
        by()
    except Exception as error:  # noqa: BLE001  whichever it is
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "full"),
        (torch.AcceleratorError("CUDA error: out of memory"), "full"),
        (RuntimeError("CUDA driver error: out of memory"), "full"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), "full"),
        (RuntimeError("GET was unable to find an engine to execute this computation"), "full"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "lost"),
        (RuntimeError("CUDA error: device-side assert triggered"), "lost"),
        (RuntimeError("CUDA driver error: invalid argument"), "lost"),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), "lost"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "lost"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ""),
        (RuntimeError("The size of tensor a (17) must match the size of tensor b (16)"), "at fault"),
        (InputError("The pipeline takes no hieght."), "at fault"),
        (UploadError("send the image again"), "at fault"),
        (raised(lambda: retrieve_timesteps(None, timesteps=[1], sigmas=[1.0])), "at fault"),
        (raised(lambda: int("no number")), ""),
        (raised(lambda: torch.zeros(2).view(torch.float32, 1, 2)), ""),
        (raised(lambda: np.zeros(3).reshape(2)), ""),
        (MemoryError(), ""),
    ],
)
def test_what_an_error_means(error: Exception, meaning: str) -> None:
    found = {
        "full": devices.is_out_of_memory(error),
        "lost": devices.is_device_lost(error),
        "at fault": devices.is_invalid_request(error),
    }
    assert [name for name, holds in found.items() if holds] == ([meaning] if meaning else [])


def from_library(name: str, raises: str) -> Exception:
    """An error raised by code of a module of that name."""
    scope: dict[str, object] = {"__name__": name}
    exec(f"def fail():\n    {raises}", scope)
    return raised(scope["fail"])


@pytest.mark.parametrize(
    ("error", "deterministic", "misfit"),
    [
        (from_library("diffusers.pipelines.x", "raise UnboundLocalError('denoised')"), True, False),
        (from_library("transformers.models.x", "assert False"), True, False),
        (from_library("triptych.engines.pipelines.classic", "None.config"), True, False),
        (from_library("somebody.elses", "raise KeyError('x')"), False, False),
        (from_library("diffusers.models.x", "raise RuntimeError('out of memory')"), False, False),
        (from_library("triptych.engines.x", "raise OSError('disk')"), False, False),
        (
            from_library(
                "diffusers.pipelines.x", "raise ValueError('The model has an incorrect config. Please check')"
            ),
            True,
            True,
        ),
        (raised(lambda: torch.nn.Conv2d(9, 4, 1)(torch.zeros(1, 4, 2, 2))), False, True),
    ],
)
def test_what_would_fail_again_and_what_no_request_can_mend(
    error: Exception, deterministic: bool, misfit: bool
) -> None:
    assert (devices.is_deterministic(error), devices.is_component_mismatch(error)) == (deterministic, misfit)
    assert not (misfit and devices.is_invalid_request(error))


@pytest.mark.parametrize(
    ("in_a_row", "allocated", "after_loading", "ends"),
    [
        (1, 24 * GIB, 24 * GIB, False),
        (1, 29 * GIB, 24 * GIB, False),
        (1, 31 * GIB, 24 * GIB, True),
        (1, GIB // 2, 0, False),
        (1, 2 * GIB, 0, True),
        (2, 24 * GIB, 24 * GIB, True),
    ],
)
def test_out_of_memory_ends_the_process_where_memory_stays_or_nothing_succeeds(
    in_a_row: int, allocated: int, after_loading: int, ends: bool
) -> None:
    assert ends == devices.must_restart(in_a_row=in_a_row, allocated=allocated, after_loading=after_loading)


def test_what_calls_hold_goes_with_their_error() -> None:
    held = []

    def deep() -> None:
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        raise RuntimeError("out of memory")

    def fails() -> None:
        other = torch.ones(3)
        held.append(weakref.ref(other))
        try:
            deep()
        except RuntimeError as error:
            raise ValueError("translated") from error

    try:
        fails()
    except ValueError as error:
        devices.clear_frames(error)
        assert [reference() for reference in held] == [None, None]


def test_instances_of_a_device_without_a_number_are_spread_over_the_gpus() -> None:
    three = [role(f"denoiser-{index}") for index in range(3)]
    assert [devices.gpu_of(component, 2) for component in three] == [0, 1, 0]
    assert [devices.gpu_of(component, 1) for component in three] == [0, 0, 0]
    assert devices.gpu_of(role("denoiser-2", "cuda:1"), 8) == 1
    everything = (*three, role("encoder-0", "cuda:1"), role("decoder-0", "cpu"))
    assert [devices.shares_gpu(component, everything, 2) for component in everything] == [
        True,
        True,
        True,
        True,
        False,
    ]
    assert [devices.shares_gpu(component, everything, 3) for component in everything] == [
        False, True, False, True, False,
    ]  # fmt: skip


def test_memory_goes_back_where_others_want_it_and_it_was_much() -> None:
    plain, resting = role("denoiser-0"), role("denoiser-0", offload="model")
    assert devices.releases_cached_memory(Stage.DECODER, plain, shared=True)
    assert devices.releases_cached_memory(Stage.ENCODER, resting, shared=True)
    assert not devices.releases_cached_memory(Stage.DENOISER, plain, shared=True)
    assert not devices.releases_cached_memory(Stage.DECODER, resting, shared=False)


def test_a_gpu_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.usable_device(role("denoiser-0")) == torch.device("cuda", 0)
    assert devices.usable_device(role("denoiser-3")) == torch.device("cuda", 1)
    assert devices.usable_device(role("denoiser-0", "cpu")) == torch.device("cpu")
    # The management library counts cards that the driver cannot use.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StartError, match=r'device is "cuda", but torch finds 0 CUDA devices'):
        devices.usable_device(role("denoiser-0"))


def test_a_fork_of_a_process_that_had_opened_the_driver_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(StartError, match='device is "cuda:0", but this process was forked'):
        devices.usable_device(role("denoiser-0", "cuda:0"))
    assert devices.usable_device(role("denoiser-0", "cpu")) == torch.device("cpu")


def test_a_warm_up_computes_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        devices.warm_up(torch.device("cpu"), dtype)
    assert devices.free_memory(torch.device("cpu")) == 0
    assert gc.isenabled()


def test_a_role_on_the_cpu_takes_no_memory_of_a_gpu() -> None:
    assert devices.memory_stats(torch.device("cpu")) == {}
