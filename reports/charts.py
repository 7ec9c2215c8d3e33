"""Charts as inline SVG, drawn when the report is built: no script, no request, colours from the page's stylesheet.

Every series has a colour and a marker shape of its own, every chart a title and a description for screen readers; the
numbers stand in a table next to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

from bitquake.reports.formatting import clean_text
from bitquake.reports.schema import BinEntry, CurvePoint

WIDTH, HEIGHT = 360, 240
N_STYLES = 8
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 12, 12, 38
_DASHES = ("", "", "7 3", "2 3", "9 3 2 3", "5 2", "1 2", "12 4")
_SETTLED = 0.05
TOLERATED = (0.01, 0.05, 0.10, 0.20)


@dataclass(frozen=True)
class Point:
    """A value at a position, with its interval."""

    x: float
    y: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Line:
    """A named series; ``style`` picks colour, marker and dashes (0: the full-precision twin)."""

    name: str
    style: int
    points: Sequence[Point]


@dataclass(frozen=True)
class _Frame:
    """Maps data to the drawing; y grows upwards."""

    x0: float
    x1: float
    y0: float
    y1: float
    bottom: float = _BOTTOM

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - self.bottom - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - _TOP - self.bottom)


def severity_chart(
    title: str,
    description: str,
    y_label: str,
    lines: Sequence[Line],
    scale: float = 100.0,
    *,
    target: float | None = None,
) -> Markup:
    """Values (times ``scale``) against severity, with interval bars; severity 0 is the clean task.

    target: a tolerated value, drawn as a dotted line (before scaling).
    """
    xs = sorted({point.x for line in lines for point in line.points})
    ticks = [(x, "clean" if x == 0 else f"{x:g}") for x in xs]
    ends = (xs[0] - 0.4, max(xs[-1], xs[0] + 1) + 0.4)
    return _line_chart(title, description, ("severity", y_label), lines, ends, ticks, scale, target=target)


def mixture_chart(
    title: str,
    description: str,
    y_label: str,
    lines: Sequence[Line],
    scale: float = 100.0,
    *,
    target: float | None = None,
) -> Markup:
    """Values (times ``scale``) against the share of shifted questions (``Point.x``, 0 to 1), with interval bars."""
    lines = [Line(line.name, line.style, [replace(p, x=100 * p.x) for p in line.points]) for line in lines]
    ticks = [(float(x), f"{x}") for x in range(0, 101, 25)]
    x_label = "share of shifted questions, %"
    return _line_chart(title, description, (x_label, y_label), lines, (-4, 104), ticks, scale, target=target)


def category_chart(
    title: str,
    description: str,
    y_label: str,
    lines: Sequence[Line],
    names: Sequence[str],
    scale: float = 100.0,
    *,
    x_label: str = "",
    target: float | None = None,
) -> Markup:
    """Values (times ``scale``) of named things (``Point.x``: place in ``names``) side by side, with interval bars."""
    ticks = [(float(i), clean_text(name, 14 if len(names) < 6 else 8)) for i, name in enumerate(names)]
    ends = (-0.5, max(len(names), 2) - 0.5)
    return _line_chart(title, description, (x_label, y_label), lines, ends, ticks, scale, target=target, joined=False)


def front_chart(
    title: str,
    description: str,
    labels: tuple[str, str],
    front: Line,
    others: Sequence[Line] = (),
    scale: float = 100.0,
) -> Markup:
    """Values (times ``scale``) against what they cost, with interval bars; the front's points are joined.

    labels: of both axes. others: points off the front, drawn fainter and without bars, the later the fainter.
    """
    points = [point for line in (front, *others) for point in line.points]
    ends = [point.lo for point in front.points] + [point.hi for point in front.points] + [p.y for p in points]
    ticks = _ticks(min(ends) * scale, max(ends) * scale)
    costs = _ticks(min(p.x for p in points), max(p.x for p in points))
    frame = _Frame(costs[0], costs[-1], ticks[0], ticks[-1])
    parts = _axes(frame, ticks, [(x, f"{x:g}") for x in costs], labels[1], labels[0])
    for place, line in reversed(list(enumerate(others))):
        marks = "".join(marker(frame.x(p.x), frame.y(p.y * scale), line.style) for p in line.points)
        parts.append(f'<g opacity="{0.55 / (1 + place):.2f}">{marks}</g>')
    xy = [(frame.x(p.x), frame.y(p.y * scale)) for p in front.points]
    for (x, _), p in zip(xy, front.points, strict=True):
        parts.append(_bar(x, frame.y(p.lo * scale), frame.y(p.hi * scale), front.style))
    parts.append(_path(xy, front.style))
    parts += [marker(x, y, front.style) for x, y in xy]
    return _svg(title, description, parts)


def _line_chart(
    title: str,
    description: str,
    labels: tuple[str, str],
    lines: Sequence[Line],
    ends: tuple[float, float],
    x_ticks: Sequence[tuple[float, str]],
    scale: float,
    *,
    target: float | None = None,
    joined: bool = True,
) -> Markup:
    points = [point for line in lines for point in line.points]
    low, high = min(p.lo for p in points) * scale, max(p.hi for p in points) * scale
    if target is not None:
        low, high = min(low, target * scale), max(high, target * scale)
    ticks = _ticks(low, high)
    frame = _Frame(*ends, ticks[0], ticks[-1])
    parts = _axes(frame, ticks, x_ticks, labels[1], labels[0])
    if target is not None:
        y = frame.y(target * scale)
        parts.append(_segment(_LEFT, y, WIDTH - _RIGHT, y, "limit"))
        parts.append(_text(WIDTH - _RIGHT, y - 3.5, "tolerated", "end"))
    step = 5.0 if joined else 9.0
    width = 24 if joined else 0.6 * (WIDTH - _LEFT - _RIGHT) / (frame.x1 - frame.x0)
    for position, line in enumerate(lines):
        shift = (position - (len(lines) - 1) / 2) * min(step, width / max(1, len(lines)))
        xy = [(frame.x(p.x) + shift, frame.y(p.y * scale)) for p in line.points]
        for (x, _), p in zip(xy, line.points, strict=True):
            parts.append(_bar(x, frame.y(p.lo * scale), frame.y(p.hi * scale), line.style))
        if joined:
            parts.append(_path(xy, line.style))
        parts += [marker(x, y, line.style) for x, y in xy]
    return _svg(title, description, parts)


def curve_chart(title: str, description: str, y_label: str, lines: Sequence[Line], x_label: str) -> Markup:
    """Values against a quantity that runs on, such as a training's steps: lines without intervals."""
    points = [point for line in lines for point in line.points]
    ticks = _ticks(min(p.y for p in points), max(p.y for p in points))
    across = _ticks(min(p.x for p in points), max(p.x for p in points))
    frame = _Frame(across[0], across[-1], ticks[0], ticks[-1])
    parts = _axes(frame, ticks, [(x, f"{x:g}") for x in across], y_label, x_label)
    for position, line in enumerate(lines):
        placed = [(frame.x(p.x), frame.y(p.y)) for p in line.points]
        parts.append(_path(placed, line.style))
        # Markers apart from those of the other lines, so that shapes stay readable where lines run together.
        start, step = (3 * position) % max(1, len(placed)), max(1, len(placed) // 4)
        parts += [marker(x, y, line.style) for x, y in placed[start::step]]
    return _svg(title, description, parts)


def risk_coverage_chart(
    title: str,
    description: str,
    curves: Sequence[tuple[str, int, Sequence[CurvePoint]]],
    marks: Sequence[tuple[int, float, float]] = (),
) -> Markup:
    """Risk against coverage, in percent, with the tolerated risks as dotted lines; curves are (name, style, points).

    marks: (style, coverage, risk), a ring each: the largest coverage (C@R) that a curve reaches at a tolerated risk.
    A risk above the frame (at a coverage below 5 %) is drawn at its upper edge.
    """
    # The risk of the first few answers swings between 0 and 100 %; it must not flatten the rest of the curve.
    settled = [point.risk for _, _, points in curves for point in points if point.coverage >= _SETTLED]
    highest = max(settled, default=0.1) * 100
    ticks = _ticks(0.0, max(highest, 1.0))
    frame = _Frame(0, 100, ticks[0], ticks[-1])
    parts = _axes(frame, ticks, [(x, f"{x}") for x in range(0, 101, 20)], "risk, %", "coverage, %")
    for risk in TOLERATED:
        if risk * 100 < frame.y1:
            parts.append(_segment(_LEFT, frame.y(risk * 100), WIDTH - _RIGHT, frame.y(risk * 100), "target"))
    for position, (_, style, points) in enumerate(curves):
        placed = [(frame.x(p.coverage * 100), frame.y(min(p.risk * 100, frame.y1))) for p in points]
        parts.append(_path(placed, style))
        # Markers apart from those of the other curves, so that shapes stay readable where curves run together.
        start, step = 6 + 4 * position, max(1, len(placed) // 5)
        parts += [marker(x, y, style) for x, y in placed[start::step]]
    for style, coverage, risk in marks:
        if risk * 100 < frame.y1:
            place = f'cx="{frame.x(coverage * 100):.1f}" cy="{frame.y(risk * 100):.1f}"'
            parts.append(f'<circle class="ring s{style % N_STYLES}" {place} r="5"/>')
    return _svg(title, description, parts)


def reliability_chart(
    title: str, description: str, bins: Sequence[BinEntry], style: int, y_label: str = "accuracy, %"
) -> Markup:
    """Mean score against mean confidence of each bin, with intervals, over a histogram of the counts."""
    frame = _Frame(0, 1, 0, 1, bottom=74)
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    parts = _grid(frame, [(tick, f"{100 * tick:.0f}") for tick in ticks], y_label)
    parts.append(_segment(frame.x(0), frame.y(0), frame.x(1), frame.y(1), "diagonal"))
    base, tallest = HEIGHT - _BOTTOM, 28.0
    most = max((entry.count for entry in bins), default=1)
    for entry in bins:
        left, right = frame.x(entry.lower) + 0.5, frame.x(entry.upper) - 0.5
        height = max(0.8, tallest * entry.count / most)
        place = f'x="{left:.1f}" y="{base - height:.1f}" width="{right - left:.1f}" height="{height:.1f}"'
        parts.append(f'<rect class="count" {place}/>')
        x = frame.x(entry.confidence)
        if entry.lo is not None and entry.hi is not None:
            parts.append(_bar(x, frame.y(entry.lo), frame.y(entry.hi), style))
        parts.append(marker(x, frame.y(entry.score), style))
    parts.append(_segment(_LEFT, base, WIDTH - _RIGHT, base, "axis"))
    parts += [_text(frame.x(tick), base + 14, f"{100 * tick:.0f}", "middle") for tick in ticks]
    parts.append(_text((WIDTH + _LEFT - _RIGHT) / 2, HEIGHT - 6, "confidence, % (below: samples per bin)", "middle"))
    return _svg(title, description, parts)


def swatch(style: int) -> Markup:
    """A legend's mark: line and marker of a style."""
    line = f'<path class="line s{style % N_STYLES}" d="M1 7H27"{_dash(style)}/>'
    return Markup(  # noqa: S704 - made of numbers only
        f'<svg class="swatch" viewBox="0 0 28 14" aria-hidden="true">{line}{marker(14, 7, style)}</svg>'
    )


def marker(x: float, y: float, style: int) -> str:
    """The marker shape of a style, centred at (x, y)."""
    css = f'class="mark s{style % N_STYLES}"'
    shapes = {
        0: f'<circle {css} cx="{x:.1f}" cy="{y:.1f}" r="3.4"/>',
        1: f'<path {css} d="M{x - 3.2:.1f} {y - 3.2:.1f}h6.4v6.4h-6.4z"/>',
        2: f'<path {css} d="M{x:.1f} {y - 4.2:.1f}l4 7h-8z"/>',
        3: f'<path {css} d="M{x:.1f} {y - 4.6:.1f}l4.6 4.6l-4.6 4.6l-4.6 -4.6z"/>',
        4: f'<path {css} d="M{x:.1f} {y + 4.2:.1f}l4 -7h-8z"/>',
        5: f'<path {css} d="M{x - 1.3:.1f} {y - 4:.1f}h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z"/>',
        6: f'<path {css} d="M{x - 4.5:.1f} {y - 2:.1f}h9v4h-9z"/>',
        7: f'<path {css} d="M{x - 2:.1f} {y - 4.5:.1f}h4v9h-4z"/>',
    }
    return shapes[style % N_STYLES]


def _svg(title: str, description: str, parts: Sequence[str]) -> Markup:
    name = escape(clean_text(title))
    body = f"<title>{name}</title><desc>{escape(clean_text(description, 400))}</desc>{''.join(parts)}"
    # Its texts went through escape, the rest is made of numbers.
    return Markup(f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{body}</svg>')  # noqa: S704


def _axes(
    frame: _Frame, ticks: Sequence[float], x_ticks: Sequence[tuple[float, str]], y_label: str, x_label: str
) -> list[str]:
    parts = _grid(frame, [(tick, f"{tick:g}".replace("-", "−")) for tick in ticks], y_label)
    base = HEIGHT - _BOTTOM
    parts.append(_segment(_LEFT, base, WIDTH - _RIGHT, base, "axis"))
    parts += [_text(frame.x(x), base + 14, label, "middle") for x, label in x_ticks]
    parts.append(_text((WIDTH + _LEFT - _RIGHT) / 2, HEIGHT - 6, x_label, "middle"))
    return parts


def _grid(frame: _Frame, ticks: Sequence[tuple[float, str]], label: str) -> list[str]:
    parts = [_segment(_LEFT, frame.y(tick), WIDTH - _RIGHT, frame.y(tick), "grid") for tick, _ in ticks]
    parts += [_text(_LEFT - 6, frame.y(tick) + 3.5, text, "end") for tick, text in ticks]
    middle = (frame.y(frame.y0) + frame.y(frame.y1)) / 2
    place = f'x="11" y="{middle:.1f}" transform="rotate(-90 11 {middle:.1f})"'
    parts.append(f'<text {place} text-anchor="middle">{escape(label)}</text>')
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose the range."""
    span = max(high - low, 1e-6)
    raw = span / 4
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def _segment(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _bar(x: float, y1: float, y2: float, style: int) -> str:
    return _segment(x, y1, x, y2, f"bar s{style % N_STYLES}")


def _path(points: Sequence[tuple[float, float]], style: int) -> str:
    if not points:
        return ""
    steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="line s{style % N_STYLES}" d="M{steps}"{_dash(style)}/>'


def _dash(style: int) -> str:
    dashes = _DASHES[(style + style // N_STYLES * 3) % N_STYLES]
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
