"""Find out from the source of a loop over steps what an iteration takes from the ones before it.

A run that goes on from a saved step does not compute the iterations before it. It has the result of the last call of
the scheduler, or of the blocks of the loop. A variable that is made of anything else in one iteration and read in the
next would be wrong. What this analysis does not understand counts as such a variable.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard

_SCHEDULER: Final = frozenset({"step", "step_pred"})
_BLOCKS: Final = frozenset({"loop_step"})
_NEVER_GIVEN: Final = frozenset({"callback", "callback_on_step_end"})
"""Parameters that no request has: code for them is not run."""
_STOPS: Final = frozenset({"interrupt", "_interrupt"})
"""Attributes of a pipeline that are never set."""
_POSITION: Final = frozenset({"_interrupt", "_current_timestep", "_num_timesteps"})
"""Attributes of a pipeline that only tell others how far it is."""
_CHANGING: Final = frozenset({"append", "extend", "insert", "add", "update", "pop", "remove", "clear", "setdefault"})
"""Methods of lists, dicts and sets that change them."""
_SHAPE: Final = frozenset({"dtype", "shape", "device", "ndim"})
"""Attributes of a tensor that are right whatever its values are."""
_PROGRESS_BARS: Final = frozenset({"progress_bar", "pbar"})
_STATELESS: Final = frozenset({"torch", "np"})
"""Modules whose classes have no state beside their values."""
_COMPREHENSIONS: Final = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)
_FUNCTIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)


def call_problem(cls: Any) -> str:
    """Say why the `__call__` of a classic pipeline cannot go on from a saved step; "" if it can."""
    return _problem(cls, _SCHEDULER)


def block_problem(cls: Any) -> str:
    """Say why a block that is a loop cannot go on from a saved step; "" if it can."""
    return _problem(cls, _BLOCKS)


@functools.cache
def _problem(cls: Any, methods: frozenset[str]) -> str:
    function = _source(cls)
    if function is None:
        return f"The source of {cls.__name__} cannot be read."
    steps = [node for node in ast.walk(function) if isinstance(node, ast.Call) and _method(node) in methods]
    loops = [node for node in ast.walk(function) if isinstance(node, (ast.For, ast.While))]
    around = [loop for loop in loops if any(inner in steps for inner in ast.walk(loop))]
    iteration = _Iteration(steps, around[0]) if len(around) == 1 else None
    carried = iteration.carried(_read_after(function, around[0])) if iteration is not None else set()
    if iteration is None or iteration.steps_again or not all(step in ast.walk(around[0]) for step in steps):
        return f"{cls.__name__} does not have one loop that calls {' or '.join(sorted(methods))} once in each pass."
    carried |= _stateful(function, around[0])
    return f"In {cls.__name__}, a step needs {', '.join(sorted(carried))} of the steps before." if carried else ""


def _source(cls: Any) -> ast.FunctionDef | None:
    function = inspect.getattr_static(cls, "__call__", None)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))) if callable(function) else None
    except (OSError, TypeError, SyntaxError):  # it has no source, such as a class made at run time
        return None
    first = _WithoutUnused().visit(tree).body[0] if tree is not None else None
    return first if isinstance(first, ast.FunctionDef) else None


class _WithoutUnused(ast.NodeTransformer):
    """Leaves out the code for parameters that no request has, and for a stop."""

    def visit_If(self, node: ast.If) -> ast.AST:
        names = {inner.id for inner in ast.walk(node.test) if isinstance(inner, ast.Name)}
        if names & _NEVER_GIVEN or (isinstance(node.test, ast.Attribute) and node.test.attr in _STOPS):
            node.body = [ast.copy_location(ast.Pass(), node)]
        return self.generic_visit(node)


@dataclass
class _State:
    """What is known at a place in the iteration.

    Attributes:
        wrong: The names whose value may be another than in a run from the beginning.
        own: The names that have been set in this iteration.
        own_if: The names that have been set if a condition, the key, is true.
        stepped: Whether the step has been made: what is computed from then on is right.
    """

    wrong: set[str] = field(default_factory=set)
    own: set[str] = field(default_factory=set)
    own_if: dict[str, set[str]] = field(default_factory=dict)
    stepped: bool = False

    def copy(self) -> _State:
        return _State(set(self.wrong), set(self.own), dict(self.own_if), self.stepped)

    def joined(self, other: _State) -> _State:
        own_if = {test: names & other.own_if[test] for test, names in self.own_if.items() if test in other.own_if}
        return _State(self.wrong | other.wrong, self.own & other.own, own_if, self.stepped and other.stepped)


class _Iteration:
    """Follows the iteration at whose step the saved values are put in.

    Attributes:
        steps_again: Whether there may be more than one step in it, or none.
    """

    def __init__(self, steps: list[ast.Call], loop: ast.For | ast.While) -> None:
        self.steps_again = False
        self._steps = steps
        self._loop = loop
        self._stored = set(_stored(loop.body))
        targets = ast.walk(loop.target) if isinstance(loop, ast.For) else ()
        self._varying = self._stored | {node.id for node in targets if isinstance(node, ast.Name)}
        """The names that may differ from one iteration to the next; with "self", if it sets attributes."""
        self._varying |= {"self"} if any(map(_sets_pipeline, ast.walk(loop))) else set()
        self._taken: set[str] = set()
        """The names that are read before they are set in an iteration."""
        self._ends: list[_State] = []
        self._inner_loops = 0

    def carried(self, read_after: set[str]) -> set[str]:
        """Return the names that are wrong at the end of the iteration, and read in a later one or after the loop."""
        begin = _State(self._stored | {"generator"})
        if isinstance(self._loop, ast.For):
            self._assign(self._loop.target, begin, wrong=False)
        else:
            self._evaluate(self._loop.test, begin)
        end = self._run(self._loop.body, begin)
        if end is not None:
            self._ends.append(end)
        self.steps_again |= not all(state.stepped for state in self._ends)
        found: set[str] = set()
        for state in self._ends:
            # Later iterations are computed, so what each of them sets anew is right after the loop.
            found |= state.wrong & (self._taken | (read_after - state.own)) & self._stored
        return found - _PROGRESS_BARS

    def _run(self, statements: Iterable[ast.stmt], state: _State) -> _State | None:
        """Follow statements; returns the state after them, None if they do not end there."""
        for statement in statements:
            after = self._follow(statement, state)
            if after is None:
                return None
            state = after
        return state

    def _follow(self, node: ast.stmt, state: _State) -> _State | None:  # noqa: C901 - one branch for each statement
        if isinstance(node, ast.If):
            return self._choose(node, state)
        if isinstance(node, (ast.For, ast.AsyncFor, ast.While)):
            return self._repeat(node, state)
        if isinstance(node, (ast.With, ast.AsyncWith)):
            for item in node.items:
                wrong = self._evaluate(item.context_expr, state)
                if item.optional_vars is not None:
                    self._assign(item.optional_vars, state, wrong=wrong)
            return self._run(node.body, state)
        if isinstance(node, ast.Try):
            ends = [self._run([*node.body, *node.orelse], state.copy())]
            ends += [self._run(handler.body, state.copy()) for handler in node.handlers]
            end = _join(ends)
            return None if end is None else self._run(node.finalbody, end)
        if isinstance(node, (ast.Continue, ast.Break)):
            if not self._inner_loops:
                self._ends.append(state)
            return None
        if isinstance(node, (ast.Return, ast.Raise)):
            return None
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            wrong = node.value is not None and self._evaluate(node.value, state)
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                self._assign(target, state, wrong=wrong)
        elif isinstance(node, ast.AugAssign):
            wrong = self._evaluate(node.value, state) | self._read(node.target, state)
            self._assign(node.target, state, wrong=wrong)
        else:
            self._evaluate(node, state)
        return state

    def _choose(self, node: ast.If, state: _State) -> _State | None:
        unknown = self._evaluate(node.test, state)
        inside = state.copy()
        conditions = [ast.dump(each) for each in (node.test.values if _is_and(node.test) else [node.test])]
        for condition in conditions:
            inside.own |= state.own_if.get(condition, set())
        after, otherwise = self._run(node.body, inside), self._run(node.orelse, state.copy())
        end = _join([after, otherwise])
        if end is None:
            return None
        if unknown:
            end.wrong |= set(_stored([*node.body, *node.orelse]))
        elif not self._varying & set(_read_by(node.test)):
            self._note_same_choice(node, end, after, otherwise)
        return end

    def _note_same_choice(self, node: ast.If, end: _State, after: _State | None, otherwise: _State | None) -> None:
        """Note what follows where each iteration chooses the same branch."""
        if after is not None and not _is_and(node.test):
            condition = ast.dump(node.test)
            end.own_if[condition] = end.own_if.get(condition, set()) | (after.own - end.own)
        # What only one branch sets is as it was before the loop if the other is chosen.
        everywhere = Counter(_stored(self._loop.body))
        for branch, state in ((node.body, after), (node.orelse, otherwise)):
            here = Counter(_stored(branch))
            if state is not None:
                end.wrong -= {name for name in here if here[name] == everywhere[name]} - state.wrong

    def _repeat(self, node: ast.For | ast.AsyncFor | ast.While, state: _State) -> _State:
        self._inner_loops += 1
        inside = state.copy()
        # What an inner loop sets is wrong in its first pass already if it is in a later one.
        for _ in range(2):
            if isinstance(node, ast.While):
                self._evaluate(node.test, inside)
            else:
                self._assign(node.target, inside, wrong=self._evaluate(node.iter, inside))
            once = self._run(node.body, inside.copy())
            inside = inside if once is None else once.joined(inside)
        self._inner_loops -= 1
        # Assume that it is run at least once: it is over parts of the latents, models or conditions.
        inside.own |= {target.id for target in _names_of(node) if target.id in self._stored}
        return inside

    def _evaluate(self, node: ast.AST, state: _State) -> bool:
        """Note what an expression reads and changes; returns whether its value may be wrong."""
        if isinstance(node, ast.Name):
            return self._read(node, state)
        wrong = False
        for child in ast.iter_child_nodes(node):
            wrong |= self._evaluate(child, state)
        if node in self._steps:
            self.steps_again |= state.stepped or self._inner_loops > 0
            state.stepped = True
            state.wrong.discard("generator")
            return False
        if isinstance(node, ast.Attribute) and node.attr in _SHAPE:
            return False
        if isinstance(node, ast.Call):
            # Before the step, what the pipeline computes is left out.
            wrong |= not state.stepped and _root(node.func) == "self"
            if isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGING:
                self._change(node.func.value, state, wrong=wrong)
        return wrong

    def _read(self, node: ast.AST, state: _State) -> bool:
        name = _root(node)
        if name not in state.own:
            self._taken.add(name)
        return name in state.wrong

    def _assign(self, target: ast.expr, state: _State, *, wrong: bool) -> None:
        if isinstance(target, ast.Name):
            state.own.add(target.id)
            (state.wrong.add if wrong else state.wrong.discard)(target.id)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for each in target.elts:
                self._assign(each, state, wrong=wrong)
        elif isinstance(target, ast.Starred):
            self._assign(target.value, state, wrong=wrong)
        else:
            if isinstance(target, ast.Subscript):
                wrong |= self._evaluate(target.slice, state)
            self._change(target, state, wrong=wrong)

    def _change(self, target: ast.expr, state: _State, *, wrong: bool) -> None:
        """Note that a part of something is set, which then is right only if the whole was."""
        name = _root(target)
        if name != "self":
            if self._read(target, state) or wrong:
                state.wrong.add(name)
        elif wrong and not (isinstance(target, ast.Attribute) and target.attr in _POSITION):
            # An attribute of the pipeline may be read anywhere.
            name = ast.unparse(target)
            self._stored.add(name)
            self._taken.add(name)
            state.wrong.add(name)


def _is_and(test: ast.expr) -> TypeGuard[ast.BoolOp]:
    return isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And)


def _join(states: Iterable[_State | None]) -> _State | None:
    there = [state for state in states if state is not None]
    return functools.reduce(_State.joined, there) if there else None


def _read_by(test: ast.expr) -> Iterator[str]:
    """Yield the names that a test reads; the scheduler of a pipeline is the same in each iteration."""
    if isinstance(test, ast.Attribute) and test.attr == "scheduler" and _root(test) == "self":
        return
    if isinstance(test, ast.Name):
        yield test.id
    for child in ast.iter_child_nodes(test):
        if isinstance(child, ast.expr):
            yield from _read_by(child)


def _sets_pipeline(node: ast.AST) -> bool:
    is_set = isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, ast.Store)
    return is_set and _root(node) == "self" and getattr(node, "attr", "") not in _POSITION


def _stored(statements: Iterable[ast.stmt]) -> Iterator[str]:
    """Yield the names that statements set, in whole or in part, except attributes of the pipeline."""
    for node in (inner for statement in statements for inner in _within(statement)):
        if isinstance(node, (ast.Name, ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            name = _root(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGING:
            name = _root(node.func)
        else:
            continue
        if name not in ("self", ""):
            yield name


def _within(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes in one, without those of comprehensions and functions inside of it."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (*_COMPREHENSIONS, *_FUNCTIONS)):
            yield from _within(child)


def _names_of(loop: ast.For | ast.AsyncFor | ast.While) -> Iterator[ast.Name]:
    return (
        node
        for statement in loop.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        for node in ast.walk(target)
        if isinstance(node, ast.Name)
    )


def _read_after(function: ast.FunctionDef, loop: ast.stmt) -> set[str]:
    end = loop.end_lineno or loop.lineno
    names = (node for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
    return {name.id for name in names if name.lineno > end}


def _stateful(function: ast.FunctionDef, loop: ast.stmt) -> set[str]:
    """Return the names that the loop reads of objects that were made before it, which may change with each step."""
    made = {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and node.lineno < loop.lineno and _makes_object(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return made & {node.id for node in ast.walk(loop) if isinstance(node, ast.Name)}


def _makes_object(value: ast.expr) -> bool:
    if isinstance(value, ast.IfExp):
        return _makes_object(value.body) or _makes_object(value.orelse)
    if not isinstance(value, ast.Call) or _root(value.func) in _STATELESS:
        return False
    name = getattr(value.func, "attr", "") or getattr(value.func, "id", "")
    return name[:1].isupper()


def _method(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def _root(node: ast.AST) -> str:
    """Return the name of which an expression is an attribute or item; "" if there is none."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
