"""Logging of a process: on stderr pretty on a terminal, else one JSON object a line; the last lines in a file, too.

Every line names the process and its generation; within a handler it also names the request, when the message has
a `request_id`. Libraries that use the standard `logging` come out the same way.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Final

import structlog

from triptych.actors.runtime.log_files import LogHandler

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from structlog.typing import EventDict, WrappedLogger

LEVEL_VARIABLE: Final = "TRIPTYCH_LOG_LEVEL"
SHOWN_VARIABLE: Final = "TRIPTYCH_LOG_SHOWN"
"""The least level of lines on stderr, where the file has more."""
_LINE: Final = "formatted_line"
_OF_SEVERAL_LINES: Final = ("exception", "stack")


def configure(name: str, generation: int = 0, *, level: str = "") -> None:
    """Set up logging for this process, to stderr.

    Args:
        name: of the component, in every line as `process`.
        generation: of the component, left out if 0.
        level: "debug", "info", "warning" or "error"; "" = `$TRIPTYCH_LOG_LEVEL`, else "info".
    """
    shared = _shared_processors(name, generation)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel((os.environ.get(SHOWN_VARIABLE, "") or "notset").upper())
    handler.setFormatter(_formatter(shared, on_terminal=sys.stderr.isatty()))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel((level or os.environ.get(LEVEL_VARIABLE, "") or "info").upper())
    for chatty in ("httpx", "httpcore", "urllib3", "filelock", "asyncio"):
        logging.getLogger(chatty).setLevel(max(root.level, logging.WARNING))


def keep(folder: Path, name: str, generation: int, nbytes: int) -> Callable[[], None]:
    """Append the lines of this process to its log in a folder, too, until the result is called; after `configure`.

    Args:
        folder: Of the logs, in the state folder.
        name: of the component.
        generation: of the component.
        nbytes: Most bytes that are kept; 0 for none.
    """
    if not nbytes:
        return _keep_nothing
    try:
        handler = LogHandler(folder, name, nbytes)
    except OSError as error:  # such as a full disk: what runs is worth more than its log
        structlog.stdlib.get_logger("actors").warning("this process keeps no log", reason=str(error))
        return _keep_nothing
    root = logging.getLogger()
    shown = root.handlers[0].formatter if root.handlers else None
    kept = shown if isinstance(shown, _JsonFormatter) else _formatter(_shared_processors(name, generation))
    handler.setFormatter(kept)
    root.addHandler(handler)

    def stop() -> None:
        root.removeHandler(handler)
        handler.close()

    return stop


def _keep_nothing() -> None:
    """No-op."""


def _shared_processors(name: str, generation: int) -> list[Any]:
    """Return what every line goes through, of our own loggers and of those of libraries."""
    facts: dict[str, Any] = {"process": name} | ({"generation": generation} if generation else {})

    def add_facts(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {**facts, **event}

    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_facts,
    ]


class _JsonFormatter(structlog.stdlib.ProcessorFormatter):
    """Formats a record once for all handlers."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, which the record keeps: to keep the record would keep the frames of its exception."""
        line: str = record.__dict__.get(_LINE) or super().format(record)
        record.__dict__[_LINE] = line
        return line


def _formatter(shared: list[Any], *, on_terminal: bool = False) -> structlog.stdlib.ProcessorFormatter:
    kind = structlog.stdlib.ProcessorFormatter if on_terminal else _JsonFormatter
    return kind(
        foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            terminal_renderer(colors=True) if on_terminal else structlog.processors.JSONRenderer(),
        ],
    )


def terminal_renderer(*, colors: bool) -> Callable[[WrappedLogger, str, EventDict], str]:
    """Return the processor that renders an event for a terminal; texts in it, which may be of a client, are escaped."""
    renderer = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)

    def render(logger: WrappedLogger, method: str, event: EventDict) -> str:
        return str(renderer(logger, method, {name: _escaped(name, value) for name, value in event.items()}))

    return render


def _escaped(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return "\n".join(map(printable, value.split("\n"))) if name in _OF_SEVERAL_LINES else printable(value)


def printable(text: str) -> str:
    r"""Return a text with what a terminal may take for a command written as in Python: `\x1b`. Pure."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
