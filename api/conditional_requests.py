"""Conditional and partial requests for files: RFC 9110, sections 13 and 14. Pure."""

from __future__ import annotations

import re
from email.utils import parsedate_to_datetime
from typing import Final

from starlette.datastructures import Headers

_RANGES: Final = re.compile(r"\s*bytes\s*=(?P<ranges>[-0-9,\s]+)", re.IGNORECASE)
_RANGE: Final = re.compile(r"(?P<first>[0-9]{0,18})-(?P<last>[0-9]{0,18})")


def precondition(headers: Headers, etag: str, modified: str) -> int | None:
    """Say what becomes of a GET or HEAD under its conditions.

    Args:
        headers: Of the request.
        etag: Of the file, strong, in quotes.
        modified: The Last-Modified of the file, a date of HTTP.

    Returns:
        412 (it is not what the client wants), 304 (the client has it), or None: send it.
    """
    if (wanted := headers.get("if-match")) is not None:
        if "*" not in _tags(wanted) and etag not in _tags(wanted):
            return 412
    elif (since := headers.get("if-unmodified-since")) is not None and _is_later(modified, since):
        return 412
    if (had := headers.get("if-none-match")) is not None:
        tags = {tag.removeprefix("W/") for tag in _tags(had)}
        return 304 if tags & {"*", etag} else None
    if (since := headers.get("if-modified-since")) is not None and _is_later(modified, since) is False:
        return 304
    return None


def wanted_ranges(headers: Headers, etag: str, modified: str, size: int) -> str | None:
    """Reduce the Range of a GET to what of it can be sent.

    Returns:
        A Range header of satisfiable ranges alone; "" where the whole file is to be sent, since nothing else was asked
        for or it is no range of bytes; None where no range that was asked for has a byte of the file (416).
    """
    unless = headers.get("if-range")
    match = _RANGES.fullmatch(headers.get("range", ""))
    if match is None or (unless is not None and unless not in (etag, modified)):
        return ""
    parts = [part.strip() for part in match["ranges"].split(",") if part.strip()]
    ranges = [_RANGE.fullmatch(part) for part in parts]
    if not ranges or not all(found and _is_range(found) for found in ranges):
        return ""
    satisfiable = [found[0] for found in ranges if found and _has_bytes(found, size)]
    return f"bytes={','.join(satisfiable)}" if satisfiable else None


def _is_range(found: re.Match[str]) -> bool:
    first, last = found["first"], found["last"]
    return bool(first or last) and not (first and last and int(last) < int(first))


def _has_bytes(found: re.Match[str], size: int) -> bool:
    return int(found["first"]) < size if found["first"] else int(found["last"]) > 0 and size > 0


def _tags(header: str) -> list[str]:
    return [tag.strip() for tag in header.split(",")]


def _is_later(modified: str, since: str) -> bool | None:
    """Whether a date is after another one; None where the other is none, which then says nothing."""
    try:
        return parsedate_to_datetime(modified) > parsedate_to_datetime(since)
    except (ValueError, TypeError):  # no date; or one without a zone, which cannot be compared
        return None
