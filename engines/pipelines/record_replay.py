"""Stubs that end a run where it needs a component of another stage, and recordings of what was run before."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch

from triptych.engines.partition.stubs import COMPUTE_METHODS, Stub


class StageBoundary(BaseException):
    """A run has come to a component of another stage.

    Not an `Exception`, because pipelines catch some of those.

    Attributes:
        name: Of the component, or "" for a method of the pipeline.
        method: What was called.
        value: The first argument.
    """

    def __init__(self, name: str, method: str, value: object) -> None:
        super().__init__(f"{name}.{method}")
        self.name = name
        self.method = method
        self.value = value


class BoundaryStub(Stub):
    """A stub that ends the run when something is to be computed with it.

    A copy of it can be cast without a change of the original. `isinstance` takes it for one of the class of its
    component, since pipelines choose so between one ControlNet and several.
    """

    _hf_hook: Final = None
    """There, so that a pipeline that looks for the device of its hooks goes on to the next component."""

    def __init__(self, stub: Stub) -> None:
        super().__init__(stub._name, stub._component, stub.dtype, stub.device)
        if isinstance(self._component, torch.nn.Module):
            # Some pipelines read the dtype off a weight.
            for parameter in self._component.parameters():
                parameter.data = parameter.data.to(self.dtype)

    @property  # type: ignore[misc]  # object's own may be written, which nobody does
    def __class__(self) -> Any:
        """That of the component."""
        return type(vars(self).get("_component", self))

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """End the run."""
        raise StageBoundary(self._name, "forward", first_argument(args, kwargs))

    def __getattr__(self, attribute: str) -> Any:
        if attribute in COMPUTE_METHODS:
            return functools.partial(self._reach_boundary, attribute)
        return super().__getattr__(attribute)

    def to(self, *args: object, **kwargs: object) -> BoundaryStub:
        """Cast it; it stays where it is."""
        dtype = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)), None)
        if dtype is not None and isinstance(self._component, torch.nn.Module):
            self._component = copy.deepcopy(self._component).to(dtype)
            self.dtype = dtype
        return self

    def _reach_boundary(self, method: str, *args: object, **kwargs: object) -> Any:
        raise StageBoundary(self._name, method, first_argument(args, kwargs))


class CallRecorder:
    """What encoding methods returned, in the order of their calls, with the generator as each of them left it.

    As long as nothing has been drawn from the generator, None is kept in its place.

    Args:
        generator: Of the request.
        calls: Of an earlier run, to be played back; they are not changed.
    """

    def __init__(self, generator: torch.Generator, calls: Iterable[dict[str, Any]] = ()) -> None:
        self.calls: list[dict[str, Any]] = []
        self._generator = generator
        self._fresh = generator.get_state()
        self._ahead = list(calls)
        self._inside = False

    def record(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method so that its results are kept."""

        @functools.wraps(method)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return method(*args, **kwargs)
            self._inside = True
            try:
                result = method(*args, **kwargs)
            finally:
                self._inside = False
            after = self._generator.get_state()
            # What was drawn before the call counts as well: an argument may have been made of it.
            state = None if torch.equal(self._fresh, after) else after
            self.calls.append({"method": name, "result": result, "generator": state})
            return result

        return recorded

    def replay(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method so that it returns what it did in the earlier run."""

        @functools.wraps(method)
        def played(*args: Any, **kwargs: Any) -> Any:
            if not self._ahead or self._ahead[0]["method"] != name:
                return method(*args, **kwargs)
            call = self._ahead.pop(0)
            if call["generator"] is not None:
                self._generator.set_state(call["generator"])
            # What a pipeline changes in place must not change the payload that it came in.
            return copy.deepcopy(call["result"])

        return played


class ArgumentInjector:
    """Puts a value that crossed in the place of one that a run without steps has made.

    Args:
        value: Becomes the first argument of the first call.
        before: Called first.
    """

    def __init__(self, value: object, before: Callable[[], object]) -> None:
        self._value = value
        self._before = before
        self._inside = False
        self.used = False

    def inject(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method; calls of others inside of it are left alone."""

        @functools.wraps(method)
        def injected(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return method(*args, **kwargs)
            if self.used:
                raise RuntimeError("This pipeline decodes in more than one call, so it cannot be served in parts.")
            self.used = True
            self._before()
            self._inside = True
            try:
                if args:
                    return method(self._value, *args[1:], **kwargs)
                return method(**{**kwargs, next(iter(kwargs)): self._value})
            finally:
                self._inside = False

        return injected


def first_argument(args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """The first argument of a call."""
    return next(iter((*args, *kwargs.values())), None)
