"""Plots of a load: latencies as text, and each request as a point of an SVG."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Final

from triptych.actors.command._load import DONE, Result, Summary
from triptych.percentile import percentile

_BINS: Final = 12
_BAR: Final = 40
_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
_LEVELS: Final = "▁▂▃▄▅▆▇█"
_COLUMNS: Final = 60
_WIDTH, _HEIGHT = 900, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 50, 50
_COLOURS: Final = {DONE: "#2563eb"}
_OTHER: Final = ("#dc2626", "#d97706", "#7c3aed", "#0d9488", "#6b7280")
_TICKS: Final = 5


def histogram(seconds: Sequence[float]) -> list[str]:
    """Return a line for each range of latencies, with a bar of how many there are. Pure."""
    if not seconds:
        return []
    low, high = min(seconds), max(seconds)
    width = (high - low) / _BINS or 1.0
    counts = [0] * (_BINS if high > low else 1)
    for value in seconds:
        counts[min(int((value - low) / width), len(counts) - 1)] += 1
    most = max(counts)
    return [f"{low + place * width:9.3f} s  {bar(count / most):<{_BAR}} {count}" for place, count in enumerate(counts)]


def bar(share: float) -> str:
    """Return a bar of a share of its full length, in eighths of a character. Pure."""
    whole, eighths = divmod(round(share * _BAR * 8), 8)
    return "█" * whole + _EIGHTHS[eighths].strip()


def course(results: Sequence[Result]) -> str:
    """Return the median latency over the time of the load as a line of blocks, a blank where none was due. Pure."""
    done = [result for result in results if result.outcome == DONE]
    if not done:
        return ""
    end = max(result.due_s for result in done) or 1.0
    places: list[list[float]] = [[] for _ in range(_COLUMNS)]
    for result in done:
        places[min(int(result.due_s / end * _COLUMNS), _COLUMNS - 1)].append(result.seconds)
    medians = [percentile(place, 50) if place else None for place in places]
    most = max(median for median in medians if median is not None) or 1.0
    return "".join(
        " " if median is None else _LEVELS[min(int(median / most * len(_LEVELS)), len(_LEVELS) - 1)]
        for median in medians
    )


def svg(results: Sequence[Result], summary: Summary, title: str) -> str:
    """Return a picture of a load as SVG: a point for each request, and lines for percentiles. Pure."""
    end_s = max((result.due_s for result in results), default=0.0) or 1.0
    most_s = max((result.seconds for result in results), default=0.0) or 1.0
    across, down = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(seconds: float) -> float:
        return _LEFT + across * seconds / end_s

    def y(seconds: float) -> float:
        return _TOP + down * (1 - seconds / most_s)

    colours = dict(_COLOURS)
    for outcome in sorted(set(summary.outcomes) - {DONE}):
        colours[outcome] = _OTHER[(len(colours) - 1) % len(_OTHER)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_LEFT, 20, title, weight="600"),
    ]
    place = float(_LEFT)
    for outcome, colour in colours.items():
        label = f"{outcome} {summary.outcomes.get(outcome, 0)}"
        parts += [f'<circle cx="{place + 4:.0f}" cy="36" r="4" fill="{colour}"/>', _text(place + 12, 40, label)]
        place += 30 + 7 * len(label)
    for step in range(_TICKS + 1):
        at_s, due_s = most_s * step / _TICKS, end_s * step / _TICKS
        parts += [
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(at_s):.1f}" y2="{y(at_s):.1f}" stroke="#e5e7eb"/>',
            _text(_LEFT - 8, y(at_s) + 4, f"{at_s:.2f} s", anchor="end"),
            _text(x(due_s), _HEIGHT - _BOTTOM + 18, f"{due_s:.1f} s", anchor="middle"),
        ]
    parts.append(_text(_LEFT + across / 2, _HEIGHT - 10, "when a request was due", anchor="middle"))
    for name in ("p50", "p99"):
        if name in summary.seconds:
            at = y(summary.seconds[name])
            line = f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#111827"'
            parts += [f'{line} stroke-dasharray="4 4"/>', _text(_WIDTH - _RIGHT, at - 4, name, anchor="end")]
    parts += [
        f'<circle cx="{x(each.due_s):.1f}" cy="{y(each.seconds):.1f}" r="3" fill="{colours[each.outcome]}" '
        'fill-opacity="0.6"/>'
        for each in results
    ]
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "400") -> str:
    attributes = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="#111827"'
    return f"<text {attributes}>{html.escape(text)}</text>"
