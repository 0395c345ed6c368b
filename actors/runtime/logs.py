"""Logging of a process: pretty on a terminal, one JSON object a line otherwise.

Every line names the process and its generation; within a handler it also names the request, when the message has
a `request_id`. Libraries that use the standard `logging` come out the same way.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Final

import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, WrappedLogger

LEVEL_VARIABLE: Final = "TRIPTYCH_LOG_LEVEL"


def configure(name: str, generation: int = 0, *, level: str = "") -> None:
    """Set up logging for this process, to stderr.

    Args:
        name: of the component, in every line as `process`.
        generation: of the component, left out if 0.
        level: "debug", "info", "warning" or "error"; "" = `$TRIPTYCH_LOG_LEVEL`, else "info".
    """
    facts: dict[str, Any] = {"process": name} | ({"generation": generation} if generation else {})

    def add_facts(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {**facts, **event}

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_facts,
    ]
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
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers()],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel((level or os.environ.get(LEVEL_VARIABLE, "") or "info").upper())
    for chatty in ("httpx", "httpcore", "urllib3", "filelock", "asyncio"):
        logging.getLogger(chatty).setLevel(max(root.level, logging.WARNING))


def _renderers() -> list[Any]:
    if sys.stderr.isatty():
        return [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
