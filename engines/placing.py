"""How the weights of a process are held: in which dtype, quantized or not, on the device or resting on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from engines.adapters import Adapters
from engines.offload import HOST, Offload, Resting, offload
from engines.quantization import Quantization, nbytes, quantize


class Placement:
    """What is done to each component after it was read, and to all of them at the end.

    Args:
        dtype: What weights are converted to.
        device: Where they compute.
        quantization: What those of linear layers are held as.
        offload: Where they rest.
        adapters: To be loaded into them.

    Attributes:
        read_bytes: What the weights took as they were read, adapters not counted.
        held_bytes: What they take now.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization = Quantization.NONE,
        offload: Offload = Offload.NONE,
        adapters: Adapters | None = None,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.quantization = quantization
        self.offload = offload
        self.adapters = adapters or Adapters()
        self.read_bytes = 0
        self.held_bytes = 0

    def settle(self, name: str, module: torch.nn.Module) -> torch.nn.Module:
        """Make a component ready for inference, where it computes or where it rests.

        Args:
            name: What the pipeline calls it.
            module: As it was read, on the host.

        Raises:
            ModelError: It cannot be quantized, or an adapter does not fit.
        """
        place = HOST if self.offload is not Offload.NONE else self.device
        self.read_bytes += nbytes(module)
        # Gradients stay as wanted as they are: for weights that want none, `torch.matmul` goes another way for some
        # layouts and rounds otherwise than the plain pipeline. None are computed in either case.
        module.eval()
        quantize(name, module, self.quantization, place)
        self.held_bytes += nbytes(module)
        self.adapters.attach(name, module)
        return module.to(place)

    def finish(self, components: Mapping[str, Any]) -> Resting | None:
        """Offload what is to rest, when all components have settled; returns as `engines.offload.offload`.

        Raises:
            ModelError: A component cannot be offloaded in this way.
        """
        self.adapters.release()
        modules = {name: module for name, module in components.items() if isinstance(module, torch.nn.Module)}
        return offload(modules, self.offload, self.device)
