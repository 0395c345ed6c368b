"""A tensor keeps its layout in memory: with another one, kernels round otherwise."""

from __future__ import annotations

import pytest
import torch

from triptych.engines.codec.codec import pack, unpack


def layouts() -> list[torch.Tensor]:
    image = torch.randn(2, 4, 3, 5)
    return [
        image.to(memory_format=torch.channels_last),
        torch.randn(1, 4, 2, 3, 5).to(memory_format=torch.channels_last_3d),
        image.permute(3, 0, 2, 1),
        image.to(torch.bfloat16).transpose(1, 2),
        torch.randint(0, 9, (3, 4), dtype=torch.uint8).t(),
        torch.randn(3, 5, 4).permute(2, 0, 1)[None],  # Not "channels last", but for the stride of its single image.
    ]


@pytest.mark.parametrize("tensor", layouts(), ids=lambda tensor: str(tuple(tensor.stride())))
def test_a_dense_tensor_keeps_its_layout_in_memory(tensor: torch.Tensor) -> None:
    assert not tensor.is_contiguous()
    packed = pack({"latents": tensor})
    assert packed.tensors[0].data_ptr() == tensor.data_ptr(), "it is not copied for it"
    block = torch.empty(packed.nbytes, dtype=torch.uint8)
    packed.copy_to(block)
    there = unpack(packed.manifest, block, torch.device("cpu"))["latents"]
    assert isinstance(there, torch.Tensor)
    assert torch.equal(there, tensor)
    assert there.stride() == tensor.stride()


def test_a_convolution_rounds_as_it_would_have_before_crossing() -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(4, 16, 3, padding=1)
    latents = torch.randn(1, 4, 16, 16).to(memory_format=torch.channels_last)
    packed = pack({"latents": latents})
    block = torch.empty(packed.nbytes, dtype=torch.uint8)
    packed.copy_to(block)
    there = unpack(packed.manifest, block, torch.device("cpu"))["latents"]
    assert isinstance(there, torch.Tensor)
    with torch.no_grad():
        assert convolution(there).numpy().tobytes() == convolution(latents).numpy().tobytes()


def test_a_tensor_with_gaps_or_repeats_crosses_row_by_row() -> None:
    one = torch.tensor(3.0)
    gaps, repeats = torch.arange(24.0).reshape(4, 6)[:, ::2].t(), torch.arange(3.0).expand(4, 3).t()
    for tensor in (gaps, repeats, one.expand(1), one.expand(1, 1), one.expand(5)):
        packed = pack({"x": tensor})
        block = torch.empty(packed.nbytes, dtype=torch.uint8)
        packed.copy_to(block)
        there = unpack(packed.manifest, block, torch.device("cpu"))["x"]
        assert isinstance(there, torch.Tensor)
        assert torch.equal(there, tensor)
        assert there.is_contiguous()
