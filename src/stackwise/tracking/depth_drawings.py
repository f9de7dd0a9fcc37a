"""Small drawings of figures by stack, as SVG that takes its colours from the style sheet of the page.

All are 380 wide and as high as they need to be, so that text keeps its size on a phone and in a column of a wide page.
A figure that is not known is null and leaves its place empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from stackwise.tracking.page import text

__all__ = ["bars", "curve", "heat_map"]

WIDTH, HEIGHT = 380.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 8.0, 14.0, 24.0

Figures = Sequence[float | None]


def curve(label: str, names: Sequence[str], values: Figures, line: float) -> str:
    """Points joined over the names, and a dashed level."""
    known = [value for value in values if value is not None]
    low, high = min([*known, line]), max([*known, line])
    axis = _Axis(low, high)
    xs = _places(len(names))
    points = [(x, axis.y(v)) for x, v in zip(xs, values, strict=True) if v is not None]
    path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""
    level = axis.y(line)
    parts = [
        axis.grid(),
        f'<path d="M{LEFT:.0f} {level:.1f} H{WIDTH - RIGHT:.0f}" stroke="var(--plot-c4)" stroke-dasharray="4 3"/>',
        f'<path d="{path}" fill="none" stroke="var(--plot-c0)" stroke-width="2" stroke-linejoin="round"/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="var(--plot-c0)"/>' for x, y in points),
        _names(xs, names),
    ]
    return _svg(label, parts)


def bars(label: str, names: Sequence[str], values: Figures) -> str:
    """A bar from zero for each name; those below zero in another colour."""
    known = [value for value in values if value is not None]
    axis = _Axis(min([0.0, *known]), max([0.0, *known]))
    xs, zero = _places(len(names)), axis.y(0)
    width = min(34.0, 0.68 * (WIDTH - LEFT - RIGHT) / max(1, len(names)))
    parts = [axis.grid()]
    for x, value in zip(xs, values, strict=True):
        if value is not None:
            y = axis.y(value)
            role = "c0" if value >= 0 else "c3"
            parts.append(
                f'<rect x="{x - width / 2:.1f}" y="{min(y, zero):.1f}" width="{width:.1f}" '
                f'height="{max(abs(y - zero), 0.6):.1f}" rx="1.5" fill="var(--plot-{role})"/>'
            )
    parts.append(f'<path d="M{LEFT:.0f} {zero:.1f} H{WIDTH - RIGHT:.0f}" stroke="var(--plot-muted)"/>')
    return _svg(label, [*parts, _names(xs, names)])


def heat_map(label: str, names: Sequence[str], matrix: Sequence[Figures]) -> str:
    """A square of cells from 0 (empty) to 1 (full colour), with their figures where they fit."""
    count = len(names)
    left, top = 56.0, 6.0
    cell = min(46.0, (WIDTH - left - RIGHT) / max(1, count))
    height = top + cell * count + 22
    every = _every(count, cell)
    parts = []
    for i, row in enumerate(matrix):
        y = top + i * cell
        if i % every == 0:
            parts.append(_text(left - 6, y + cell / 2 + 4, names[i], "end"))
        for j, value in enumerate(row):
            x = left + j * cell
            share = 0.0 if value is None else min(1.0, max(0.0, value))
            parts.append(
                f'<rect x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}" rx="2" '
                f'fill="var(--plot-c0)" fill-opacity="{0.04 + 0.96 * share:.2f}"/>'
            )
            if cell >= 27 and value is not None:
                colour = "paper" if share > 0.55 else "fg"
                parts.append(_text(x + cell / 2, y + cell / 2 + 4, f"{value:.2f}", "middle", colour, 10.5))
    for j, name in enumerate(names):
        if j % _every(count, cell * 0.65) == 0:
            shown = name if cell >= 38 or len(name) < 6 else name[:4] + "…"
            parts.append(_text(left + (j + 0.5) * cell, height - 8, shown, "middle"))
    return _svg(label, parts, height)


class _Axis:
    """The vertical axis from the lowest to the highest value, with a few round marks."""

    def __init__(self, low: float, high: float) -> None:
        if not high > low:
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        span = high - low
        self.low, self.high = low - (0.05 * span if low else 0), high + 0.05 * span
        raw = span / 4
        step = 10.0 ** math.floor(math.log10(raw))
        self.step = next(step * k for k in (1, 2, 2.5, 5, 10) if step * k >= raw)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> str:
        digits = max(0, -math.floor(math.log10(self.step) + 1e-9))
        digits += round(self.step * 10**digits, 6) % 1 != 0
        parts, mark = [], math.ceil(self.low / self.step - 1e-9) * self.step
        while mark <= self.high + 1e-9 * self.step:
            y = self.y(mark)
            value = 0.0 if abs(mark) < 1e-6 * self.step else mark
            # Many digits would not fit beside the axis.
            shown = (
                f"{value:.1e}".replace(".0e", "e") if digits > 4 and value else f"{value:.{min(digits, 4)}f}"
            )
            parts.append(f'<path d="M{LEFT:.0f} {y:.1f} H{WIDTH - RIGHT:.0f}" stroke="var(--plot-grid)"/>')
            parts.append(_text(LEFT - 6, y + 4, shown, "end"))
            mark += self.step
        return "".join(parts)


def _places(count: int) -> list[float]:
    width = (WIDTH - LEFT - RIGHT) / max(1, count)
    return [LEFT + (i + 0.5) * width for i in range(count)]


def _names(xs: Sequence[float], names: Sequence[str]) -> str:
    room = (WIDTH - LEFT - RIGHT) / max(1, len(names))
    every = _every(len(names), room / max(1.0, 0.24 * max(map(len, names[1:] or names))))
    return "".join(
        _text(x, HEIGHT - 8, name if room * every >= 7 * len(name) else name[:3] + "…", "middle")
        for i, (x, name) in enumerate(zip(xs, names, strict=True))
        if i % every == 0
    )


def _every(count: int, room: float) -> int:
    """Show each of them where there are 22 units of room for one, else every second, third, ..."""
    return max(1, math.ceil(22 / max(room, 1e-9))) if count > 1 else 1


def _text(x: float, y: float, content: str, anchor: str, role: str = "muted", size: float = 11) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:g}" fill="var(--plot-{role})">'
        f"{text(content)}</text>"
    )


def _svg(label: str, parts: Sequence[str], height: float = HEIGHT) -> str:
    inner = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{text(label)}">{inner}</svg>'
