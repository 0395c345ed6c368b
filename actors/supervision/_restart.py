"""What a supervisor does when a child exits: one pure decision, in the terms of Erlang/OTP's supervisors.

It differs from OTP in two points, so that a system goes on serving with the components that are left: the restart
intensity is counted for each child, and a child that exceeds it is given up alone.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from triptych.actors.child_state import ChildState
from triptych.backoff import backoff_s

FIRST_BACKOFF_S: Final = 0.25
LAST_BACKOFF_S: Final = 10.0
FIRST_DELAY_S: Final = 1.0
LAST_DELAY_S: Final = 60.0


class Strategy(StrEnum):
    """Which children are restarted together with the child that exited."""

    ONE_FOR_ONE = "one_for_one"
    ONE_FOR_ALL = "one_for_all"
    REST_FOR_ONE = "rest_for_one"


class RestartPolicy(StrEnum):
    """When a child is restarted."""

    PERMANENT = "permanent"
    TRANSIENT = "transient"
    TEMPORARY = "temporary"


class ExitKind(StrEnum):
    """How a child exited that its supervisor had not told to end."""

    CLEAN = "clean"
    CRASH = "crash"
    START_FAILURE = "start_failure"
    START_DELAYED = "start_delayed"


class ChildExit(msgspec.Struct, frozen=True):
    """The exit of one child."""

    name: str
    """Name of the child."""
    kind: ExitKind
    """How it exited."""
    at: float
    """When, in seconds of the monotonic clock of `RestartHistory`."""
    reason: str
    """One sentence."""


class ChildSpec(msgspec.Struct, frozen=True):
    """A child, as the decision sees it."""

    name: str
    """Its name, unique among its siblings."""
    restart: RestartPolicy = RestartPolicy.PERMANENT
    """When it is restarted."""


class SupervisorSpec(msgspec.Struct, frozen=True):
    """A supervisor, as the decision sees it."""

    children: tuple[ChildSpec, ...]
    """In start order."""
    strategy: Strategy = Strategy.ONE_FOR_ONE
    """Which children are restarted together."""
    intensity: int = 5
    """Restarts of one child allowed within `period_s`."""
    period_s: float = 30.0
    """Seconds over which restarts are counted."""


RestartHistory = tuple[float, ...]
"""When the child was restarted because it exited itself, oldest first, in seconds of a monotonic clock."""


class Stop(msgspec.Struct, frozen=True):
    """Stop a running sibling: SIGTERM, then SIGKILL."""

    name: str


class Wait(msgspec.Struct, frozen=True):
    """Wait before the next action."""

    seconds: float


class Start(msgspec.Struct, frozen=True):
    """Start a child."""

    name: str


class Retire(msgspec.Struct, frozen=True):
    """Do not start the child again; `state` is one of `FINAL_STATES`."""

    name: str
    state: ChildState
    reason: str


Action = Stop | Wait | Start | Retire


class RestartDecision(msgspec.Struct, frozen=True):
    """The actions to run, in this order, and the new history."""

    actions: tuple[Action, ...]
    history: RestartHistory


def decide_restart(
    spec: SupervisorSpec,
    history: RestartHistory,
    exit_: ChildExit,
    *,
    alive: frozenset[str] = frozenset(),
    jitter: float = 0.0,
    delays: int = 0,
) -> RestartDecision:
    """Decide what to do about the exit of a child. Pure.

    The first restart after a quiet period is immediate. Later ones wait `FIRST_BACKOFF_S`, doubled each time up to
    `LAST_BACKOFF_S` seconds, less the jitter. A child that could not start for a reason that may pass is restarted
    alone and without end, after `FIRST_DELAY_S`, doubled each time up to `LAST_DELAY_S`; such restarts do not count.

    Args:
        spec: The supervisor and its children.
        history: Of this child.
        exit_: What happened.
        alive: Siblings that run or will run; the others are retired and stay so.
        jitter: In [0, 1); shortens the wait by up to half, so that children that exit together do not come back
            together.
        delays: Consecutive earlier starts that failed for a reason that may pass.
    """
    child = next(child for child in spec.children if child.name == exit_.name)
    recent = tuple(at for at in history if exit_.at - at < spec.period_s)
    if exit_.kind is ExitKind.START_FAILURE:
        return RestartDecision((Retire(child.name, ChildState.FAILED, exit_.reason),), recent)
    if exit_.kind is ExitKind.START_DELAYED:
        wait = backoff_s(delays, first_s=FIRST_DELAY_S, longest_s=LAST_DELAY_S, jitter=jitter)
        return RestartDecision((Wait(wait), Start(child.name)), recent)
    if not _should_restart(child.restart, exit_.kind):
        return RestartDecision((Retire(child.name, ChildState.STOPPED, exit_.reason),), recent)
    if len(recent) >= spec.intensity:
        reason = f"restarted {len(recent)} times within {spec.period_s:g} s, last because: {exit_.reason}"
        return RestartDecision((Retire(child.name, ChildState.GAVE_UP, reason),), recent)
    group = _restart_group(spec, child, alive)
    actions: list[Action] = [Stop(name) for name in reversed(group) if name != child.name]
    temporary = [name for name in group if name != child.name and not _is_restartable(spec, name)]
    actions += [Retire(name, ChildState.STOPPED, f"stopped together with {child.name}") for name in temporary]
    if recent:
        wait = backoff_s(len(recent) - 1, first_s=FIRST_BACKOFF_S, longest_s=LAST_BACKOFF_S, jitter=jitter)
        actions.append(Wait(wait))
    actions += [Start(name) for name in group if name not in temporary]
    return RestartDecision(tuple(actions), (*recent, exit_.at))


def _should_restart(restart: RestartPolicy, kind: ExitKind) -> bool:
    return restart is RestartPolicy.PERMANENT or (restart is RestartPolicy.TRANSIENT and kind is not ExitKind.CLEAN)


def _is_restartable(spec: SupervisorSpec, name: str) -> bool:
    return any(child.name == name and child.restart is not RestartPolicy.TEMPORARY for child in spec.children)


def _restart_group(spec: SupervisorSpec, child: ChildSpec, alive: frozenset[str]) -> list[str]:
    names = [sibling.name for sibling in spec.children]
    if spec.strategy is Strategy.ONE_FOR_ONE:
        return [child.name]
    affected = names if spec.strategy is Strategy.ONE_FOR_ALL else names[names.index(child.name) :]
    return [name for name in affected if name == child.name or name in alive]
