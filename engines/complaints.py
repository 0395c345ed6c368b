"""Hear what model libraries only warn of: weights that found no place, and those that were not there."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Final

_LIBRARIES: Final = ("diffusers", "transformers")


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(" ".join(record.getMessage().split()))


@contextlib.contextmanager
def complaints() -> Iterator[list[str]]:
    """Collect the warnings of the libraries in place of their log; the list fills while the block runs."""
    listener = _Listener()
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    try:
        for logger in loggers:
            # A server silences the warnings of these libraries, which here are what is asked for.
            logger.handlers, logger.propagate = [listener], False
            logger.setLevel(logging.WARNING)
        yield listener.said
    finally:
        for logger, handlers, level, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
