"""A component that computes and quantizes, to show that a fork of the zygote can."""

from __future__ import annotations

import os

import torch

from tests.actors.supervision.probe import Multiply, Product
from triptych.actors import Actor, Component, Topology
from triptych.engines.weights.quantization import Quantization, nbytes, quantize


class Multiplier(Actor):
    async def multiply(self, message: Multiply) -> Product:
        ones = torch.ones(message.size, message.size)
        trace = float((ones @ ones).trace())
        return Product(trace, torch.get_num_threads(), os.getppid(), torch.initial_seed(), quantized_bytes(64))


def quantized_bytes(size: int) -> int:
    """Bytes of the weights of a quantized layer, which has computed."""
    layer = torch.nn.Sequential(torch.nn.Linear(size, size, bias=False))
    quantize("transformer", layer, Quantization.INT8, torch.device("cpu"))
    with torch.no_grad():
        assert layer(torch.ones(2, size)).isfinite().all()
    return nbytes(layer)


def build(component: Component, topology: Topology) -> list[Actor]:
    return [Multiplier(component.name)]
