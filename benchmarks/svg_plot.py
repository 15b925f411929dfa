"""Lines over time, or over anything, as an SVG file: enough for a benchmark, and no dependency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, TOP, GAP = 900, 150, 70, 30, 60
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#b8860b", "#7b5ea7", "#555555")

Panel = tuple[str, Mapping[str, Sequence[float]]]
"""Title, and name to values, one a step in time."""


def plot(panels: Sequence[Panel], step_s: float, marks: Mapping[float, str]) -> str:
    """Panels below one another, with a common time axis in seconds and marked moments."""
    parts = [_panel(number, panel, step_s, marks) for number, panel in enumerate(panels)]
    height = TOP + len(panels) * (HEIGHT + GAP)
    size = f'width="{WIDTH + LEFT + 170}" height="{height}"'
    style = 'font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def _panel(number: int, panel: Panel, step_s: float, marks: Mapping[float, str]) -> str:
    title, series = panel
    top = TOP + number * (HEIGHT + GAP)
    highest = max((value for values in series.values() for value in values), default=1.0) or 1.0
    steps = max((len(values) for values in series.values()), default=1)

    def x(time_s: float) -> float:
        return LEFT + WIDTH * time_s / (steps * step_s)

    parts = [
        f'<text x="{LEFT}" y="{top - 8}" font-weight="bold">{escape(title)}</text>',
        f'<path d="M{LEFT} {top}v{HEIGHT}h{WIDTH}" stroke="#999" fill="none"/>',
        f'<text x="{LEFT - 6}" y="{top + 10}" text-anchor="end">{highest:.3g}</text>',
        f'<text x="{LEFT - 6}" y="{top + HEIGHT}" text-anchor="end">0</text>',
        f'<text x="{LEFT + WIDTH}" y="{top + HEIGHT + 16}" text-anchor="end">'
        f"{steps * step_s:.0f} s</text>",
    ]
    for time_s, what in marks.items():
        parts.append(
            f'<path d="M{x(time_s):.1f} {top}v{HEIGHT}" stroke="#bbb" stroke-dasharray="4"/>'
            f'<text x="{x(time_s) + 3:.1f}" y="{top + HEIGHT + 16}" fill="#666">{escape(what)}</text>'
        )
    for (name, values), colour in zip(series.items(), COLOURS * 3, strict=False):
        points = " ".join(
            f"{x((step + 0.5) * step_s):.1f},{top + HEIGHT * (1 - value / highest):.1f}"
            for step, value in enumerate(values)
        )
        line = list(series).index(name)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            f'<text x="{LEFT + WIDTH + 12}" y="{top + 14 + 16 * line}" fill="{colour}">'
            f"{escape(name)}</text>"
        )
    return "\n".join(parts)


def curves(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """One panel of points (x, y) joined by lines; both axes begin at 0."""
    points = [point for values in series.values() for point in values]
    widest, highest = max(x for x, _ in points), max(y for _, y in points)
    height = 3 * HEIGHT

    def place(x: float, y: float) -> str:
        return f"{LEFT + WIDTH * x / widest:.1f},{TOP + height * (1 - y / highest):.1f}"

    parts = [
        f'<text x="{LEFT}" y="{TOP - 8}" font-weight="bold">{escape(title)}</text>',
        f'<path d="M{LEFT} {TOP}v{height}h{WIDTH}" stroke="#999" fill="none"/>',
        f'<text x="{LEFT - 6}" y="{TOP + 10}" text-anchor="end">{highest:.3g}</text>',
        f'<text x="{LEFT - 6}" y="{TOP + height}" text-anchor="end">0</text>',
    ]
    for x in sorted({x for x, _ in points}):
        left = place(x, 0).partition(",")[0]
        parts.append(f'<text x="{left}" y="{TOP + height + 16}" text-anchor="middle">{x:g}</text>')
    for line, (name, values) in enumerate(series.items()):
        colour = COLOURS[line % len(COLOURS)]
        parts.append(
            f'<polyline points="{" ".join(place(x, y) for x, y in values)}" fill="none" stroke="{colour}" '
            f'stroke-width="1.5"/><text x="{LEFT + WIDTH + 12}" y="{TOP + 14 + 16 * line}" '
            f'fill="{colour}">{escape(name)}</text>'
        )
    size = f'width="{WIDTH + LEFT + 170}" height="{TOP + height + GAP}"'
    style = 'font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])
