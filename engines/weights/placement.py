"""How the weights of a process are held: in which dtype, quantized or not, on the device or resting on the host."""

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
    """The weights do not fit into what is free on the device.

    Attributes:
        needed: Bytes that the weights take, as far as they had been read.
        total: Bytes that the device has.
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
    """What is done to each component after it was read, and to all of them at the end.

    Args:
        dtype: What weights are converted to.
        device: Where they compute.
        quantization: What those of linear layers are held as.
        offload: Where they rest.
        adapters: To be loaded into them.
        options: How the model is read and cut.
        progress: Told what is read.

    Attributes:
        read_bytes: What the weights took as they were read, adapters not counted.
        held_bytes: What they take now.
        notes: What is worth saying of where the weights of a component came from, by its name.
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
        """Make a component ready for inference, where it computes or where it rests.

        Args:
            name: What the pipeline calls it.
            module: As it was read, on the host.

        Raises:
            NoRoomError: The device has no room for it.
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
        # Gradients stay as wanted as they are: for weights that want none, `torch.matmul` goes another way for some
        # layouts and rounds otherwise than the plain pipeline. None are computed in either case.
        module.eval()
        quantize(name, module, self.quantization, place)
        self.held_bytes += nbytes(module) - before
        self.adapters.attach(name, module)
        return module.to(place)

    def finish(self, components: Mapping[str, Any]) -> ModelOffloader | None:
        """Offload what is to rest, when all components are prepared; returns as `engines.offload.offload`.

        Raises:
            ModelError: A component cannot be offloaded in this way.
        """
        self.adapters.release()
        modules = {name: module for name, module in components.items() if isinstance(module, torch.nn.Module)}
        return offload(modules, self.offload, self.device)
