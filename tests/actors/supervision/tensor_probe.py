"""A component that computes, to show that a process forked after the import of torch can."""

from __future__ import annotations

import os

import torch

from tests.actors.supervision.probe import Multiply, Product
from triptych.actors import Actor, Component, Topology


class Multiplier(Actor):
    async def multiply(self, message: Multiply) -> Product:
        ones = torch.ones(message.size, message.size)
        trace = float((ones @ ones).trace())
        return Product(trace, torch.get_num_threads(), os.getppid(), torch.initial_seed())


def build(component: Component, topology: Topology) -> list[Actor]:
    return [Multiplier(component.name)]
