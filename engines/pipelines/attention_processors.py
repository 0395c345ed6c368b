"""Keep the attention processors that a run sets in shared modules away from other runs.

Some pipelines replace processors when a run begins, and put them back when it ends (perturbed attention guidance).
Between two steps, other runs compute with the same modules.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from diffusers import ModelMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention

from triptych.engines.weights.stubs import Stub


class AttentionProcessorGuard:
    """Gives a run its own attention processors. Enter it around all computation of the run.

    Args:
        pipeline: The pipeline of the run.
    """

    def __init__(self, pipeline: Any) -> None:
        models = [
            part for part in vars(pipeline).values() if isinstance(part, ModelMixin) and not isinstance(part, Stub)
        ]
        self._layers: list[Any] = [
            layer
            for model in models
            if isinstance(model, torch.nn.Module)
            for layer in model.modules()
            if isinstance(layer, (Attention, AttentionModuleMixin))
        ]
        self._outside: list[Any] = []
        self._own: dict[int, Any] = {}

    @property
    def edited(self) -> bool:
        """Whether the run had processors of its own at the last exit."""
        return bool(self._own)

    def __enter__(self) -> Self:
        """Set the processors of the run."""
        self._outside = [layer.processor for layer in self._layers]
        for index, processor in self._own.items():
            self._layers[index].set_processor(processor)
        return self

    def __exit__(self, *_: object) -> None:
        """Keep the processors of the run, and put back those before."""
        pairs = enumerate(zip(self._layers, self._outside, strict=True))
        self._own = {index: layer.processor for index, (layer, before) in pairs if layer.processor is not before}
        for index in self._own:
            self._layers[index].set_processor(self._outside[index])
        self._outside = []
