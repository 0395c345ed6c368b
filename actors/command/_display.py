"""What `triptych up` shows: the state of each component, and where the API is."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Final

import httpx
from rich.live import Live
from rich.markup import escape

from triptych.actors.child_state import ChildState
from triptych.actors.command._console import styled, table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console, RenderableType
    from rich.table import Table

    from triptych.actors.runtime.system_messages import ChildReport
    from triptych.actors.topology import Component, Topology

_READY_EVERY_S: Final = 0.1
_READY_TIMEOUT_S: Final = 5.0


class Display:
    """A plain line for each change of state."""

    def __init__(self, console: Console, topology: Topology) -> None:
        self.console = console
        self.topology = topology
        self._states: dict[str, ChildState | None] = {}
        self._serves_http = False
        self._all_ready = asyncio.Event()
        self._api_ready = asyncio.Event()
        self._begun = time.monotonic()
        self._reasons: list[str] = []

    @contextlib.contextmanager
    def showing(self, components: Sequence[Component]) -> Iterator[None]:
        """Show `components` while the `with` block runs."""
        self._states = dict.fromkeys(component.name for component in components)
        self._serves_http = any(component.kind == "api" for component in components)
        yield

    def changed(self, report: ChildReport) -> None:
        """Take the report of a child that has changed."""
        if report.state == self._states.get(report.name):
            self.progressed(report)
            return
        self._states[report.name] = report.state
        self.show(report)
        if report.kind == "api" and report.state == ChildState.READY:
            self._api_ready.set()
        if all(state in (ChildState.READY, ChildState.ASLEEP) for state in self._states.values()):
            self._all_ready.set()

    def progressed(self, report: ChildReport) -> None:
        """No-op: a child with a new detail and the same state; the log has it, at longer intervals."""

    def show(self, report: ChildReport) -> None:
        """Print a change of state."""
        self._print(line(report))

    def _print(self, text: RenderableType) -> None:
        with contextlib.suppress(OSError):  # who reads it has gone, or its disk is full: what runs goes on
            self.console.print(text)

    async def announce_readiness(self) -> None:
        """Print the URL once `GET /ready` says that the system takes requests."""
        if not self._states:
            self.ready("[bold green]Ready[/], with no component of the topology on this host,")
        elif self._serves_http:
            await self._api_ready.wait()
            await _until_ready(self.topology.url, self.waiting)
            self.ready(f"[bold green]Triptych is ready[/] on [bold]{escape(self.topology.url)}[/]")
        else:
            await self._all_ready.wait()
            self.ready(f"[bold green]{escape(', '.join(self._states))} ready[/]")

    def waiting(self, reasons: list[str]) -> None:
        """Say what the system waits for, when that changes; with several hosts, the others are not shown here."""
        if len(self.topology.hosts) > 1 and reasons != self._reasons:
            self._reasons = reasons
            self._print(f"[yellow]waiting for the hosts:[/] {escape('; '.join(reasons))}")

    def ready(self, sentence: str) -> None:
        """Say that everything is up."""
        self._print(f"{sentence} after {time.monotonic() - self._begun:.1f} s. Ctrl-C stops it.")


class LiveDisplay(Display):
    """For a terminal: a table while the system starts, then lines."""

    def __init__(self, console: Console, topology: Topology) -> None:
        super().__init__(console, topology)
        self._reports: dict[str, ChildReport] = {}
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._starting = True

    @contextlib.contextmanager
    def showing(self, components: Sequence[Component]) -> Iterator[None]:
        """Show `components` while the `with` block runs."""
        with super().showing(components), self._live:
            yield

    def show(self, report: ChildReport) -> None:
        """Redraw the table; after the start, print the change."""
        self._reports[report.name] = report
        if not self._starting:
            self._print(line(report))
            return
        if report.reason:
            self._print(line(report))  # above the table, where it stays
        self._live.update(self._table(), refresh=True)

    def progressed(self, report: ChildReport) -> None:
        """Redraw the table with the new detail."""
        self._reports[report.name] = report
        if self._starting:
            self._live.update(self._table(), refresh=True)

    def ready(self, sentence: str) -> None:
        """Leave the last table on the screen, and go on with lines."""
        self._starting = False
        self._live.stop()
        self._print(self._table())
        super().ready(sentence)

    def _table(self) -> Table:
        reports = [self._reports[name] for name in self._states if name in self._reports]
        rows = [
            (report.name, styled(report.state), str(report.pid or ""), escape(own_detail(report))) for report in reports
        ]
        return table(("name", "state", "pid", ""), rows)


def make_display(console: Console, topology: Topology) -> Display:
    """Return the display that suits the console."""
    return LiveDisplay(console, topology) if console.is_terminal else Display(console, topology)


def own_detail(report: ChildReport) -> str:
    """Return the detail of a child, without the name of the actor of its process that told it."""
    name, _, rest = report.detail.partition(": ")
    return rest if name.startswith(f"{report.name}.") else report.detail


def line(report: ChildReport) -> str:
    """Return a child and its state as a line of rich markup."""
    name, reason = f"{report.name:<14}", escape(report.reason)
    match report.state:
        case ChildState.FAILED:
            return f"{name} [bold red]cannot start:[/] {reason}"
        case ChildState.DELAYED:
            return f"{name} [bold yellow]cannot start yet:[/] {reason}; it is tried again"
        case ChildState.GAVE_UP:
            return f"{name} [bold red]given up:[/] {reason}"
        case ChildState.BACKOFF if report.reason:
            return f"{name} [yellow]ended[/] ({reason}), starting it again"
        case ChildState.JOINING if report.detail:
            return f"{name} {styled(report.state)} [dim]({escape(report.detail)})[/]"
        case ChildState.STOPPED if report.reason:
            return f"{name} [dim]stopped[/] ({reason})"
        case state:
            return f"{name} {styled(state)}" + (f" [dim](pid {report.pid})[/]" if state == ChildState.LOADING else "")


async def _until_ready(url: str, waiting: Callable[[list[str]], None]) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=_READY_TIMEOUT_S) as http:
        while True:
            try:
                answer = await http.get("/ready")
                if answer.is_success:
                    return
                if reasons := _reasons(answer):
                    waiting(reasons)
            except httpx.HTTPError:
                pass  # the API restarts: its own line says so
            await asyncio.sleep(_READY_EVERY_S)


def _reasons(answer: httpx.Response) -> list[str]:
    """Return why the system is not ready; none in another answer, such as that of too many connections."""
    try:
        body = answer.json()
    except ValueError:
        return []
    return [str(reason) for reason in body.get("reasons", ())] if isinstance(body, dict) else []
