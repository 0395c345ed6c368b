"""Analyse the source of a classic pipeline: what it runs in which order, and whether inside a loop.

The compiled code (see `introspection`) only names what a method reads.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Collection, Iterator
from typing import Any, Final

from diffusers import DiffusionPipeline

from triptych.engines.weights.stubs import COMPUTE_METHODS

_STEPS: Final = frozenset({"step", "step_pred"})
"""The methods of a scheduler that a loop over timesteps calls."""
_LOOKS: Final = frozenset({"dtype", "config", "device", "training", "parameters", "named_parameters", "modules", "to"})
"""The attributes that a stub of a model has."""
_ASKS: Final = frozenset({"isinstance", "hasattr", "getattr", "type"})
_TESTS: Final = (ast.Compare, ast.BoolOp, ast.UnaryOp)
_COMPREHENSIONS: Final = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)


def ends_without_steps(cls: Any, steps_with: Collection[str] = (), without: Collection[str] = ()) -> bool:
    """Whether the `__call__` of a pipeline decodes once, even if its loop has no timesteps.

    It does not if the loop is over something else, if later code reads variables that only the loop sets, if an
    iteration decodes, or if other code runs the components that the loop runs.

    Args:
        cls: The class of the pipeline.
        steps_with: The names of the components that the loop runs.
        without: The names of methods that are not run.
    """
    function = _function(cls, "__call__")
    if function is None:
        return False
    loops = [node for node in _nodes(function) if isinstance(node, (ast.For, ast.While))]
    skipped = _skipped(function)
    inside = {id(node) for loop in skipped for node in _nodes(loop)}
    steps = [node for node in _calls(function) if _called(node) in _STEPS]
    if not steps or not all(id(node) in inside for node in steps):
        return False
    if any(_decodes(node) for loop in loops for node in _nodes(loop)):
        return False
    again = runs(cls, steps_with, without, in_loops=True) & runs(cls, steps_with, without, in_loops=False)
    return not again and not any(_made_by(function, loop) for loop in skipped)


def runs(cls: Any, components: Collection[str], without: Collection[str], *, in_loops: bool) -> frozenset[str]:
    """Return the components that the `__call__` of a pipeline runs, inside or outside of its loops over timesteps.

    Args:
        cls: The class of the pipeline.
        components: The names of the components to look for.
        without: The names of methods that are not run.
        in_loops: Whether to look inside of the loops, or outside.
    """
    function = _function(cls, "__call__")
    if function is None:
        return frozenset()
    inside = {id(node) for loop in _skipped(function) for node in _nodes(loop)}
    called = {_own(node.func) for node in _calls(function) if (id(node) in inside) is in_loops} - set(without)
    return frozenset((called | _called_by(cls, called, without)) & set(components))


def runs_before(cls: Any, components: Collection[str], methods: Collection[str]) -> frozenset[str]:
    """Return the components that the `__call__` of a pipeline runs before the last call of some methods, or in them.

    Calls after the last loop do not count.
    """
    function = _function(cls, "__call__")
    if function is None:
        return frozenset()
    begin = max((loop.lineno for loop in _skipped(function)), default=function.end_lineno or 0)
    lines = [(node.lineno, _own(node.func)) for node in _calls(function) if node.lineno < begin]
    last = max((line for line, name in lines if name in methods), default=0)
    called = {name for line, name in lines if line <= last}
    return frozenset((called | _called_by(cls, called, ())) & set(components))


def calls_in_loop(cls: Any, methods: Collection[str]) -> bool:
    """Whether the `__call__` of a pipeline calls one of some methods in a loop."""
    function = _function(cls, "__call__")
    if function is None:
        return False
    loops = (node for node in _nodes(function) if isinstance(node, (ast.For, ast.While)))
    return any(_own(node.func) in methods for loop in loops for node in _calls(loop))


def attributes_set_from(cls: Any, component: str) -> set[str]:
    """Return the attributes that the `__init__` of a pipeline sets from a component."""
    function = _function(cls, "__init__")
    attributes: set[str] = set()
    variables: set[str] = set()
    assignments = [node for node in _nodes(function) if isinstance(node, ast.Assign)] if function is not None else []
    for assignment in sorted(assignments, key=lambda node: node.lineno):
        inner = list(_nodes(assignment.value))
        if any(_is_own(node, component) or getattr(node, "id", "") in variables for node in inner):
            variables |= {target.id for target in assignment.targets if isinstance(target, ast.Name)}
            attributes |= {target.attr for target in assignment.targets if isinstance(target, ast.Attribute)}
    return attributes


def requires_component(cls: Any, component: str) -> bool:
    """Whether the `__init__` of a pipeline reads attributes of a component."""
    function = _function(cls, "__init__")
    nodes = _nodes(function) if function is not None else ()
    return any(
        isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == component
        for node in nodes
    )


def computes(cls: Any, method: str, component: str) -> bool:
    """Whether a method itself runs a component, and not just reads its attributes."""
    function = _function(cls, method)
    if function is None:
        return False
    parents = {id(child): node for node in _nodes(function) for child in ast.iter_child_nodes(node)}
    return any(_is_run(node, parents.get(id(node))) for node in _nodes(function) if _is_own(node, component))


@functools.cache
def _function(cls: Any, method: str) -> ast.FunctionDef | None:
    if method not in ("__call__", "__init__") and hasattr(DiffusionPipeline, method):
        return None
    function = inspect.getattr_static(cls, method, None)
    function = inspect.unwrap(getattr(function, "__func__", function)) if callable(function) else None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))) if function is not None else None
    except (OSError, TypeError, SyntaxError):  # it has no source, such as a method in C
        return None
    first = tree.body[0] if tree is not None else None
    return first if isinstance(first, ast.FunctionDef) else None


@functools.cache
def _nodes(node: ast.AST) -> tuple[ast.AST, ...]:
    """Return a node of a cached tree and all nodes below it."""
    return tuple(ast.walk(node))


def _skipped(function: ast.FunctionDef) -> list[ast.For]:
    """Return the loops that have no iterations if there are no timesteps."""
    return [node for node in _nodes(function) if isinstance(node, ast.For) and _is_over_timesteps(node.iter)]


def _calls(function: ast.AST) -> Iterator[ast.Call]:
    return (node for node in _nodes(function) if isinstance(node, ast.Call))


def _called_by(cls: Any, methods: Collection[str], without: Collection[str]) -> set[str]:
    """Return what some methods call of the pipeline, directly or through other methods."""
    found: set[str] = set()
    ahead = list(methods)
    while ahead:
        function = _function(cls, ahead.pop())
        more = {_own(node.func) for node in _calls(function)} - found - set(without) if function is not None else set()
        found |= more
        ahead.extend(more)
    return found


def _own(node: ast.AST) -> str:
    """Return the name of the pipeline's method or component that a call is of; "" for other calls."""
    if isinstance(node, ast.Attribute) and node.attr in COMPUTE_METHODS and isinstance(node.value, ast.Attribute):
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) and _is_own(node, node.attr) else ""


def _is_own(node: ast.AST, component: str) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == component
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _is_run(node: ast.AST, parent: ast.AST | None) -> bool:
    if isinstance(parent, ast.Attribute):
        return parent.attr not in _LOOKS
    if isinstance(parent, ast.Call):
        return parent.func is node or not (isinstance(parent.func, ast.Name) and parent.func.id in _ASKS)
    if isinstance(parent, (ast.If, ast.IfExp)):
        return parent.test is not node
    # Assigned to another name, it may be run; assume so.
    return not isinstance(parent, _TESTS)


def _is_over_timesteps(iterated: ast.expr) -> bool:
    """Whether a loop is over the timesteps themselves, not over a range of their number."""
    if isinstance(iterated, ast.Call) and _called(iterated) in ("range", "len"):
        return False
    name = str(getattr(iterated, "id", "") or getattr(iterated, "attr", ""))
    inner = (child for child in ast.iter_child_nodes(iterated) if isinstance(child, ast.expr))
    return "timesteps" in name or any(map(_is_over_timesteps, inner))


def _called(call: ast.Call) -> str:
    return str(getattr(call.func, "attr", "") or getattr(call.func, "id", ""))


def _decodes(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "decode"
        and _is_own(node.func.value, "vae")
    )


def _made_by(function: ast.FunctionDef, loop: ast.For) -> set[str]:
    """Return the variables that only the loop sets and code after it reads."""
    arguments = function.args
    before = {each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    made: set[str] = set()
    after: dict[str, bool] = {}
    end = loop.end_lineno or loop.lineno
    for name in sorted(_variables(function), key=lambda each: (each.lineno, isinstance(each.ctx, ast.Store))):
        if name.lineno > end:
            after.setdefault(name.id, isinstance(name.ctx, ast.Load))
        elif isinstance(name.ctx, ast.Store):
            (before if name.lineno < loop.lineno else made).add(name.id)
    return {name for name, is_read in after.items() if is_read} & (made - before)


def _variables(node: ast.AST, bound: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """Yield the names in a function, without those bound by a comprehension or lambda inside of it."""
    if isinstance(node, _COMPREHENSIONS):
        targets = (inner for each in node.generators for inner in ast.walk(each.target))
        bound |= {inner.id for inner in targets if isinstance(inner, ast.Name)}
    elif isinstance(node, ast.Lambda):
        bound |= {each.arg for each in node.args.args}
    elif isinstance(node, ast.Name) and node.id not in bound:
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _variables(child, bound)
