"""Charts that only studies need, in the style of ``reports.charts``."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from bitquake.reports.formatting import clean_text

WIDTH = 360
_LEFT, _RIGHT, _TOP, _ROW = 132, 8, 26, 17
_STEPS = 20


def heat_map(
    title: str,
    description: str,
    rows: Sequence[str],
    columns: Sequence[str],
    tints: Sequence[Sequence[tuple[str, float, bool] | None]],
) -> Markup:
    """A grid of squares, tinted in steps of a twentieth; all squares of one tint are one path.

    tints: for each row and column the side (``worse`` or ``better``), the size (0 to 1) and whether it stands (marked
    with a dot); None: nothing was measured.
    """
    height = _TOP + _ROW * len(rows) + 6
    wide = (WIDTH - _LEFT - _RIGHT) / max(1, len(columns))
    parts = []
    squares: dict[tuple[str, int], list[str]] = {}
    dots = []
    for c, name in enumerate(columns):
        parts.append(
            f'<text x="{_LEFT + (c + 0.5) * wide:.1f}" y="{_TOP - 8}" text-anchor="middle">{escape(name)}</text>'
        )
    for r, name in enumerate(rows):
        y = _TOP + _ROW * r
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 12}" text-anchor="end">{escape(clean_text(name, 22))}</text>')
        for c, tint in enumerate(tints[r]):
            x = _LEFT + c * wide
            square = f"M{x + 1:.4g} {y + 1}h{wide - 2:.4g}v{_ROW - 2}h-{wide - 2:.4g}z"
            if tint is None:
                squares.setdefault(("none", _STEPS), []).append(square)
                continue
            side, size, stands = tint
            squares.setdefault(("base", _STEPS), []).append(square)
            if step := round(_STEPS * min(1.0, max(0.0, size))):
                squares.setdefault((side, step), []).append(square)
            if stands:
                dots.append(f'<circle class="stands" cx="{x + wide / 2:.1f}" cy="{y + _ROW / 2:.1f}" r="2.6"/>')
    for (side, step), own in sorted(squares.items(), key=lambda item: item[0][0] not in ("base", "none")):
        tint_of = "" if step == _STEPS else f' fill-opacity="{step / _STEPS:.2f}"'
        parts.append(f'<path class="heat {side}"{tint_of} d="{"".join(own)}"/>')
    parts += dots
    name, text = escape(clean_text(title)), escape(clean_text(description, 400))
    body = f"<title>{name}</title><desc>{text}</desc>{''.join(parts)}"
    # Its texts went through escape, the rest is made of numbers.
    return Markup(f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img">{body}</svg>')  # noqa: S704
