"""How the weights of a process are held: their dtype, quantization, and place on the device or the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from triptych.engines.model_options import DEFAULTS, ModelOptions
from triptych.engines.stages import ModelError
from triptych.engines.weights.adapters import Adapters
from triptych.engines.weights.offload import HOST, ModelOffloader, Offload, offload
from triptych.engines.weights.quantization import Quantization, nbytes, quantize
from triptych.engines.weights.read_ahead import ReadProgress

_GIB = 1 << 30


class OutOfDeviceMemoryError(ModelError):
    """The weights do not fit into the free memory of the device.

    Attributes:
        needed: The bytes of the weights that had been read.
        total: The bytes of the device's memory.
    """

    def __init__(self, name: str, device: torch.device, needed: int) -> None:
        free, self.total = torch.cuda.mem_get_info(device)
        self.needed = needed
        super().__init__(
            f"The {name} does not fit on {device}: with it the weights take {needed / _GIB:.1f} GiB, of"
            f" {self.total / _GIB:.1f} GiB there {free / _GIB:.1f} are free. Use another device, a quantization or an"
            " offload."
        )


class Placement:
    """Prepares each component after it is read, and offloads all of them at the end.

    Args:
        dtype: The dtype of the weights.
        device: The device that computes.
        quantization: The format of the weights of linear layers.
        offload: What is kept on the host.
        adapters: The adapters to load into components.
        options: How the model is read and cut.
        progress: Is told how much has been read.

    Attributes:
        read_bytes: The bytes of the weights as they were read, without adapters.
        held_bytes: The bytes that they take now.
        notes: The files or variants to report, by name of the component.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization = Quantization.NONE,
        offload: Offload = Offload.NONE,
        adapters: Adapters | None = None,
        options: ModelOptions = DEFAULTS,
        progress: ReadProgress | None = None,
    ) -> None:
        self.progress = progress or ReadProgress()
        self.dtype = dtype
        self.device = device
        self.quantization = quantization
        self.offload = offload
        self.adapters = adapters or Adapters()
        self.options = options
        self.read_bytes = 0
        self.held_bytes = 0
        self.notes: dict[str, str] = {}

    def prepare(self, name: str, module: torch.nn.Module) -> torch.nn.Module:
        """Prepare a component for inference: quantize it, add adapters, and move it to the device or the host.

        Args:
            name: The name of the component in the pipeline.
            module: The component as it was read, on the host.

        Raises:
            OutOfDeviceMemoryError: It does not fit on the device.
            ModelError: It cannot be quantized, or an adapter does not fit.
        """
        try:
            return self._prepare(name, module)
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemoryError(name, self.device, self.held_bytes) from error

    def _prepare(self, name: str, module: torch.nn.Module) -> torch.nn.Module:
        place = HOST if self.offload is not Offload.NONE else self.device
        before = nbytes(module)
        self.read_bytes += before
        self.held_bytes += before
        # Do not change `requires_grad`: for some layouts, `torch.matmul` rounds differently without it than the plain
        # pipeline does. No gradients are computed in either case.
        module.eval()
        quantize(name, module, self.quantization, place)
        self.held_bytes += nbytes(module) - before
        self.adapters.attach(name, module)
        return module.to(place)

    def finish(self, components: Mapping[str, Any]) -> ModelOffloader | None:
        """Offload the prepared components; returns as `offload.offload`.

        Raises:
            ModelError: A component cannot be offloaded in this way.
        """
        self.adapters.release()
        modules = {name: module for name, module in components.items() if isinstance(module, torch.nn.Module)}
        return offload(modules, self.offload, self.device)
