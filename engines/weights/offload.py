"""Keep components in host memory, and move them to the device while they compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any, Final, NamedTuple

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from diffusers.hooks import apply_group_offloading
from diffusers.models.autoencoders.vae import AutoencoderMixin

from triptych.engines.stages import ModelError
from triptych.engines.weights.quantization import nbytes

HOST: Final = torch.device("cpu")


class Offload(StrEnum):
    """What is kept in host memory while it does not compute."""

    NONE = "none"
    """Nothing."""
    MODEL = "model"
    """Each component as a whole; one at a time is on the device."""
    GROUP = "group"
    """Each block of a transformer, or each layer of other components; the current and the next are on the device."""


class ModelOffloader:
    """Moves the components of a process to the device, one at a time.

    The host keeps a copy of the weights on the device, so that moving them back needs no copy.

    Attributes:
        present: The name of the component on the device; "" for none.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module], device: torch.device) -> None:
        self.present = ""
        self._modules = dict(modules)
        self._device = device
        self._kept: dict[int, _HostCopy] = {}
        for name, module in self._modules.items():
            _OnloadHook(self, name, device).install(module)

    def onload(self, name: str) -> None:
        """Move a component to the device, and the one that is there back to the host."""
        if self.present == name:
            return
        self.unload()
        module = self._modules[name]
        # Detached tensors share memory with the weights, and stay on the host when the module moves.
        on_host = {name: weight.detach() for name, weight in _weights(module)}
        try:
            module.to(self._device)
        except BaseException:
            _put_back(module, _kept(module, on_host))  # a part may have been moved before the memory was full
            raise
        self._kept = _kept(module, on_host)
        self.present = name

    def unload(self) -> None:
        """Move the component on the device back to the host."""
        if self.present:
            # Clear it first, so that after a failed move no component counts as present.
            name, self.present = self.present, ""
            kept, self._kept = self._kept, {}
            _put_back(self._modules[name], kept)


class _HostCopy(NamedTuple):
    """A weight on the device with its version counter, and the same weight on the host."""

    there: torch.Tensor
    version: int
    on_host: torch.Tensor


def _weights(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return module.named_parameters(remove_duplicate=False)


def _kept(module: torch.nn.Module, on_host: Mapping[str, torch.Tensor]) -> dict[int, _HostCopy]:
    return {id(there): _HostCopy(there, there._version, on_host[name]) for name, there in _weights(module)}


def _put_back(module: torch.nn.Module, kept: Mapping[int, _HostCopy]) -> None:
    # Use `_apply`, as `to` does, which handles quantized, tied and flattened weights.
    module._apply(lambda tensor: _on_host(tensor, kept))  # type: ignore[no-untyped-call]


def _on_host(tensor: torch.Tensor, kept: Mapping[int, _HostCopy]) -> torch.Tensor:
    """Return the host copy of a tensor on the device; buffers and changed weights are copied."""
    found = kept.get(id(tensor))
    return tensor.to(HOST) if found is None or tensor._version != found.version else found.on_host


class _OnloadHook(ModelHook):  # type: ignore[misc]
    """Moves a component to the device when it is called.

    It is a hook of accelerate, since pipelines use the `execution_device` of such a hook, and the methods of
    autoencoders call it. Other methods of a component, such as a text encoder, call inner modules, which have it, too.
    """

    def __init__(self, offloader: ModelOffloader, name: str, device: torch.device) -> None:
        self.execution_device = device
        self._offloader = offloader
        self._name = name

    def install(self, module: torch.nn.Module) -> None:
        add_hook_to_module(module, self)
        for inner in module.modules():
            if inner is not module:
                inner.register_forward_pre_hook(self._inner, with_kwargs=True)

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self._offloader.onload(self._name)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)

    def _inner(self, module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._offloader.present == self._name:
            return None
        return self.pre_forward(module, *args, **kwargs)


def offload(modules: Mapping[str, torch.nn.Module], how: Offload, device: torch.device) -> ModelOffloader | None:
    """Offload components to the host.

    Args:
        modules: The components by name, on the host.
        how: As a whole, or by blocks and layers.
        device: The device that computes.

    Returns:
        The offloader of whole components; None for other ways.

    Raises:
        ModelError: A component cannot be offloaded in this way.
    """
    if how is Offload.MODEL:
        return ModelOffloader(modules, device)
    if how is Offload.GROUP:
        for name, module in modules.items():
            _offload_groups(name, module, device)
    return None


def offloads_by_block(module: torch.nn.Module) -> bool:
    """Whether a component is moved to the device block by block, and not layer by layer.

    The host waits once for each, and a block has some twenty layers. Weights outside of blocks stay on the device for
    the whole call, so most weights must be inside. Autoencoders are not called as a whole, so they go by layers.
    """
    if isinstance(module, AutoencoderMixin):
        return False
    named = set(getattr(module, "_group_offload_block_modules", None) or ())
    lists = (torch.nn.ModuleList, torch.nn.Sequential)
    inside = 0
    for name, child in module.named_children():
        for part in child.children() if name in named else (child,):
            inside += nbytes(part) if isinstance(part, lists) else 0
    return 2 * inside > nbytes(module)


def _offload_groups(name: str, module: Any, device: torch.device) -> None:
    if not getattr(module, "_supports_group_offloading", True):
        kind = type(module).__name__
        raise ModelError(f'The {name} is a {kind}, which has no offload = "group": use "model" or "none".')
    streams = device.type == "cuda"
    blocks = offloads_by_block(module)
    apply_group_offloading(
        module,
        onload_device=device,
        offload_device=HOST,
        offload_type="block_level" if blocks else "leaf_level",
        num_blocks_per_group=1 if blocks else None,
        use_stream=streams,
        record_stream=streams,
    )
