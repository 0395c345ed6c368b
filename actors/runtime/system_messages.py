"""Messages that every actor answers, and messages between a process, its supervisor and the command line."""

from __future__ import annotations

import msgspec

from triptych.actors.child_state import ChildState
from triptych.bus import DeadLetter, Message


class Inspect(Message):
    """Ask an actor for the status of every actor of its process. Answered on arrival, also while a handler runs."""


class ActorStatus(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The status of one actor."""

    name: str
    """Its name."""
    kind: str
    """Kind of its component: "head", "denoiser", ...; "" outside a topology."""
    pid: int
    """Its process."""
    generation: int
    """Its incarnation."""
    state: ChildState
    """Of this actor."""
    detail: str
    """More about the state, "" if there is none."""
    restarts: int
    """How often the component has been restarted by its supervisor."""
    uptime_s: float
    """Seconds since the process started the actor."""
    mailbox_depth: int
    """Messages that wait."""
    mailbox_capacity: int
    """Most messages that may wait."""
    dead_letters: int
    """Messages that this incarnation did not handle."""
    facts: dict[str, int | float | str | bool]
    """Those of `Actor.stats`."""


class Inspection(Message):
    """Every actor of one process, the component's own first."""

    actors: tuple[ActorStatus, ...]
    """In the order in which the component lists them."""


class DeadLetterQuery(Message):
    """Ask an actor for its dead letters."""


class DeadLetterReport(Message):
    """The dead letters of one actor, of its mailbox and of its outbox."""

    count: int
    """How many since the process started."""
    recent: tuple[DeadLetter, ...]
    """The last ones, by time."""


class MetricsQuery(Message):
    """Ask an actor for the metrics of its process."""


class MetricsReport(Message):
    """The metrics of a process."""

    text: str
    """In Prometheus' text format."""


class Shutdown(Message):
    """Ask a process to drain and end, as SIGTERM does. Whether it comes back is its supervisor's decision."""

    reason: str
    """For the log."""


class ShuttingDown(Message):
    """The process drains from now on."""


class ChildStateChanged(Message):
    """Report the state of the sending component to its supervisor. Asked before the process ends, else told."""

    state: ChildState
    """Its state, or one of `EXIT_REASON_STATES`."""
    detail: str
    """One sentence, "" if the state says it all."""


class ChildHeartbeat(Message):
    """Report to a supervisor that the event loop of the sending component runs, and that no work hangs."""

    start_s: dict[str, float] | None = None
    """None until every actor has started; then the seconds that each part of the start took."""


class Ack(Message):
    """The supervisor has recorded a `ChildStateChanged`."""


class SupervisorQuery(Message):
    """Ask a supervisor for its children."""


class SupervisorWait(Message):
    """Ask a supervisor for its children as soon as one of them has changed, or after `timeout_s`."""

    revision: int
    """Of the last report; any other one is answered at once, such as -1."""
    timeout_s: float


class ChildReport(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One child of a supervisor."""

    name: str
    """The component."""
    kind: str
    """"pool", "encoder", ..., "head", "api"."""
    pid: int
    """Its process, 0 while there is none."""
    generation: int
    """Of the running or of the last incarnation, 0 before the first."""
    state: ChildState
    """As the process told it while it runs, else as the supervisor knows it."""
    restarts: int
    """Times that it has been restarted."""
    reason: str
    """Why it last ended, or cannot start; "" if it never did."""
    started_at: float
    """Unix seconds of the last start, 0.0 before the first."""
    start_s: dict[str, float] = {}
    """Where the time of the last start went, in seconds: "launch" until there was a process (the first forks wait for
    the zygote's imports), "import" until its actors were made, "start" until they had started, and what of that the
    actors tell, such as "weights". Empty until it has started."""
    detail: str = ""
    """More about the state of the process, such as "denoiser-0.stream: 3.1 of 24.0 GB" while it loads."""
    silence_s: float = 0.0
    """Seconds since its last heartbeat, or since its launch."""


class SupervisorReport(Message):
    """The children of a supervisor, in start order."""

    children: tuple[ChildReport, ...]
    """One for each component that it runs."""
    revision: int = 0
    """Changes with each change of a child."""


class LogQuery(Message):
    """Ask a supervisor for lines that one of its components, or it itself, has logged."""

    name: str
    """Of the component or the supervisor."""
    position: str
    """Of the `LogPart` before, "" for the last lines."""


class LogPart(Message):
    """Some lines of a log."""

    lines: str
    """JSON objects, each with a newline; or text, where a crash has cut a line."""
    position: str
    """Where the next part begins, "" if there is no log."""


SYSTEM_MESSAGES: tuple[type[Message], ...] = (Inspect, DeadLetterQuery, MetricsQuery, Shutdown)
