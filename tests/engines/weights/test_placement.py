"""Where the weights of a component go."""

from __future__ import annotations

import pytest
import torch

from triptych.engines.weights.placement import OutOfDeviceMemoryError, Placement
from triptych.engines.weights.quantization import Quantization

GIB = 1 << 30


class Huge(torch.nn.Linear):
    def to(self, *_: object, **__: object) -> torch.nn.Module:  # type: ignore[override]
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_weights_that_do_not_fit_say_what_they_take_and_what_is_free(
    quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (GIB // 2, 16 * GIB))
    placement = Placement(torch.float32, torch.device("cpu"), Quantization(quantization))
    placement.prepare("text_encoder", torch.nn.Linear(8, 8))
    with pytest.raises(OutOfDeviceMemoryError) as raised:
        placement.prepare("transformer", Huge(8, 8) if quantization == "none" else torch.nn.Sequential(Huge(8, 8)))
    assert raised.value.total == 16 * GIB
    assert raised.value.needed == placement.held_bytes > 0
    assert str(raised.value) == (
        "The transformer does not fit on cpu: with it the weights take 0.0 GiB, of 16.0 GiB there 0.5 are free. Use"
        " another device, a quantization or an offload."
    )
