"""Muon for matrices and convolutions, Adam for the rest: fewer steps than Adam alone on both models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.98)
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


class Muon(Optimizer):
    """Momentum whose update is made orthogonal (Keller Jordan's Muon), scaled to the size of Adam's updates.

    Matrices of one shape are made orthogonal together. Embeddings, biases, norms and whatever else has fewer
    than two dimensions are updated by Adam.

    Args:
        model: the model whose parameters are trained.
        rate: the peak learning rate of both kinds.
        weight_decay: decoupled, on matrices alone.
    """

    def __init__(self, model: nn.Module, rate: float, weight_decay: float = 0.0) -> None:
        words = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
        parameters = [one for one in model.parameters() if one.requires_grad]
        matrices = [one for one in parameters if one.ndim >= 2 and id(one) not in words]
        chosen = {id(one) for one in matrices}
        others = [one for one in parameters if id(one) not in chosen]
        groups = [
            {"params": matrices, "matrices": True, "weight_decay": weight_decay},
            {"params": others, "matrices": False, "weight_decay": 0.0},
        ]
        super().__init__(groups, {"lr": rate})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; a closure is not supported.

        Raises:
            ValueError: a closure was given.
        """
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            with_gradient = [one for one in group["params"] if one.grad is not None]
            if group["matrices"]:
                self._step_matrices(with_gradient, float(group["lr"]), float(group["weight_decay"]))
            else:
                self._step_others(with_gradient, float(group["lr"]))

    def _step_matrices(self, parameters: Iterable[torch.Tensor], rate: float, decay: float) -> None:
        alike: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for one in parameters:
            assert one.grad is not None  # noqa: S101 - chosen by it
            state: dict[str, Any] = self.state[one]
            if not state:
                state["momentum"] = torch.zeros_like(one)
            state["momentum"].lerp_(one.grad, 1.0 - MOMENTUM)
            update = one.grad.lerp(state["momentum"], MOMENTUM).flatten(1)
            alike.setdefault((update.shape[0], update.shape[1]), []).append((one, update))
        for (rows, columns), members in alike.items():
            updates = orthogonalize(torch.stack([update for _, update in members]))
            size = 0.2 * max(rows, columns) ** 0.5
            for (one, _), update in zip(members, updates, strict=True):
                one.mul_(1.0 - rate * decay).sub_(update.view_as(one), alpha=rate * size)

    def _step_others(self, parameters: Iterable[torch.Tensor], rate: float) -> None:
        first, second = ADAM_BETAS
        for one in parameters:
            assert one.grad is not None  # noqa: S101 - chosen by it
            state: dict[str, Any] = self.state[one]
            if not state:
                state["steps"] = torch.zeros(())
                state["mean"] = torch.zeros_like(one)
                state["square"] = torch.zeros_like(one)
            state["steps"] += 1
            steps = int(state["steps"])
            state["mean"].lerp_(one.grad, 1.0 - first)
            state["square"].lerp_(one.grad.square(), 1.0 - second)
            spread = (state["square"] / (1.0 - second**steps)).sqrt_().add_(1e-8)
            one.addcdiv_(state["mean"], spread, value=-rate / (1.0 - first**steps))


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Bring all singular values near 1 by Newton-Schulz iteration in bfloat16, (count, rows, columns)."""
    wide = matrices.shape[1] <= matrices.shape[2]
    turned = (matrices if wide else matrices.mT).bfloat16()
    turned = turned / (turned.norm(dim=(1, 2), keepdim=True) + 1e-7)
    linear, cubic, quintic = _COEFFICIENTS
    for _ in range(_ROUNDS):
        square = turned @ turned.mT
        turned = linear * turned + (cubic * square + quintic * square @ square) @ turned
    result: torch.Tensor = (turned if wide else turned.mT).to(matrices.dtype)
    return result
