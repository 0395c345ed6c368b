"""Let components rest in the memory of the host, and bring them to the device for as long as they compute."""

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
    """What rests in the memory of the host."""

    NONE = "none"
    """Nothing."""
    MODEL = "model"
    """Each component, as a whole; one at a time is on the device."""
    GROUP = "group"
    """Each block of a transformer, else each layer; the one that computes and the next are on the device."""


class ModelOffloader:
    """The components of a process, of which one at a time is on the device.

    The host keeps the weights of that one as well, so that it can rest again without a copy.

    Attributes:
        present: The name of that one, "" for none.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module], device: torch.device) -> None:
        self.present = ""
        self._modules = dict(modules)
        self._device = device
        self._kept: dict[int, _HostCopy] = {}
        for name, module in self._modules.items():
            _OnloadHook(self, name, device).install(module)

    def onload(self, name: str) -> None:
        """Put a component on the device, in the place of the one that is there."""
        if self.present == name:
            return
        self.unload()
        module = self._modules[name]
        # Of the same memory: what these are is not changed with the module.
        on_host = {name: weight.detach() for name, weight in _weights(module)}
        try:
            module.to(self._device)
        except BaseException:
            _put_back(module, _kept(module, on_host))  # without room for all of it a part may have come
            raise
        self._kept = _kept(module, on_host)
        self.present = name

    def unload(self) -> None:
        """Put the component that is on the device back."""
        if self.present:
            # First, so that a failed move is not taken for a component that is there.
            name, self.present = self.present, ""
            kept, self._kept = self._kept, {}
            _put_back(self._modules[name], kept)


class _HostCopy(NamedTuple):
    """A weight on the device, and the memory of the host that it came from."""

    there: torch.Tensor
    version: int
    on_host: torch.Tensor


def _weights(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return module.named_parameters(remove_duplicate=False)


def _kept(module: torch.nn.Module, on_host: Mapping[str, torch.Tensor]) -> dict[int, _HostCopy]:
    return {id(there): _HostCopy(there, there._version, on_host[name]) for name, there in _weights(module)}


def _put_back(module: torch.nn.Module, kept: Mapping[int, _HostCopy]) -> None:
    # As `to` does it, which knows of quantized, tied and flattened weights.
    module._apply(lambda tensor: _on_host(tensor, kept))  # type: ignore[no-untyped-call]


def _on_host(tensor: torch.Tensor, kept: Mapping[int, _HostCopy]) -> torch.Tensor:
    """What is to take the place of a tensor on the device; buffers and what was written to are copied."""
    found = kept.get(id(tensor))
    return tensor.to(HOST) if found is None or tensor._version != found.version else found.on_host


class _OnloadHook(ModelHook):  # type: ignore[misc]
    """Brings a component when something of it is called.

    As a hook of accelerate it is what pipelines look for: they take its `execution_device` for their own, and the
    methods of autoencoders call it. Other methods of a component, of a text encoder for one, come to its inner modules.
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
    """Let components rest on the host from here on.

    Args:
        modules: By name; they are there now.
        how: As a whole, or in layers.
        device: Where they compute.

    Returns:
        Where components come as a whole, what puts them back.

    Raises:
        ModelError: One cannot be offloaded in this way.
    """
    if how is Offload.MODEL:
        return ModelOffloader(modules, device)
    if how is Offload.GROUP:
        for name, module in modules.items():
            _in_layers(name, module, device)
    return None


def goes_by_blocks(module: torch.nn.Module) -> bool:
    """Whether a component comes to the device block by block, in place of layer by layer.

    The host waits once for each, and a block has some twenty layers. What lies outside of blocks then stays on the
    device for the whole of a call: most weights have to be inside. Autoencoders are not called as a whole.
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


def _in_layers(name: str, module: Any, device: torch.device) -> None:
    if not getattr(module, "_supports_group_offloading", True):
        kind = type(module).__name__
        raise ModelError(f'The {name} is a {kind}, which has no offload = "group": use "model" or "none".')
    streams = device.type == "cuda"
    blocks = goes_by_blocks(module)
    apply_group_offloading(
        module,
        onload_device=device,
        offload_device=HOST,
        offload_type="block_level" if blocks else "leaf_level",
        num_blocks_per_group=1 if blocks else None,
        use_stream=streams,
        record_stream=streams,
    )
