"""Hear what model libraries only warn of: weights that found no place, and those that were not there."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Final

_LIBRARIES: Final = ("diffusers", "transformers")


class _WarningCollector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(" ".join(record.getMessage().split()))


@contextlib.contextmanager
def captured_warnings() -> Iterator[list[str]]:
    """Collect the warnings of the libraries in place of their log; the list fills while the block runs."""
    collector = _WarningCollector()
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    try:
        for logger in loggers:
            # A server silences the warnings of these libraries, which here are what is asked for.
            logger.handlers, logger.propagate = [collector], False
            logger.setLevel(logging.WARNING)
        yield collector.messages
    finally:
        for logger, handlers, level, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
