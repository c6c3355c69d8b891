"""Line charts as SVG text that a page can hold: axes with units, a legend beside the lines, figures on hovering."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 800, 400
_LEFT, _TOP, _BOTTOM = 80, 15, 345  # of the plot within
_LEGEND = 170  # to the right of it, unless there is but one line
_LEGEND_ROW = 20


@dataclass(frozen=True)
class Line:
    """A named line through points (x, y), whose values `tips` tell on hovering."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    thick: bool = False
    dashed: bool = False

    def width(self) -> float:
        return 3 if self.thick else 1.5


def line_chart(lines: Sequence[Line], x_ticks: Sequence[tuple[float, str]], x_label: str, y_label: str) -> str:
    """An SVG element; the legend, if there are several lines, has their order. Thick ones are drawn over the others.

    Args:
        lines: At least one, each of at least one point.
        x_ticks: Position and label of each tick below the plot.
        x_label, y_label: What the axes are, units included.
    """
    xs = [x for line in lines for x, _ in line.points] + [x for x, _ in x_ticks]
    ys = [y for line in lines for _, y in line.points]
    y_ticks = ticks(min(ys), max(ys))
    low, high = min(*ys, y_ticks[0][0]), max(*ys, y_ticks[-1][0])
    first, last = min(xs), max(xs)
    right = _WIDTH - (_LEGEND if len(lines) > 1 else 20)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        up = (y - low) / (high - low)
        return round(_LEFT + across * (right - _LEFT), 1), round(_BOTTOM - up * (_BOTTOM - _TOP), 1)

    parts = []
    for x, label in x_ticks:
        place = at(x, low)[0]
        parts.append(f'<path class="grid" d="M{place} {_TOP}V{_BOTTOM}"/>')
        parts.append(_text(place, _BOTTOM + 18, label, "middle"))
    for y, label in y_ticks:
        place = at(first, y)[1]
        parts.append(f'<path class="grid" d="M{_LEFT} {place}H{right}"/>')
        parts.append(_text(_LEFT - 8, place + 4, label, "end"))
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{_BOTTOM}H{right}"/>')
    parts.append(_text((_LEFT + right) / 2, _BOTTOM + 42, x_label, "middle"))
    middle = (_TOP + _BOTTOM) / 2
    parts.append(_text(14, middle, y_label, "middle", f' transform="rotate(-90 14 {middle})"'))

    names = dict(x_ticks)
    for line in sorted(lines, key=lambda line: line.thick):
        places = [at(x, y) for x, y in line.points]
        parts.append(_stroke(line, "M" + "L".join(f"{x} {y}" for x, y in places)))
        if line.dashed:
            continue
        for (x, y), (across, down) in zip(line.points, places, strict=True):
            tip = escape(f"{line.name}, {names.get(x, f'{x:g}')}: {y:.4f}")
            parts.append(
                f'<circle cx="{across}" cy="{down}" r="{4 if line.thick else 3}" fill="{line.colour}">'
                f"<title>{tip}</title></circle>"
            )
    for row, line in enumerate(lines if len(lines) > 1 else ()):
        down = _TOP + 8 + _LEGEND_ROW * row
        parts.append(_stroke(line, f"M{right + 14} {down}h26"))
        parts.append(_text(right + 48, down + 4, line.name, "start"))
    height = max(_HEIGHT, _TOP + 8 + _LEGEND_ROW * len(lines))
    label = escape(f"{y_label} over {x_label}")
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">\n' + "\n".join(parts) + "\n</svg>"


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Four to nine round values around [low, high], and their labels."""
    if high - low < 1e-9 * max(abs(high), 1e-3):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [(number * step, f"{number * step:.{decimals}f}") for number in range(first, last + 1)]


def _stroke(line: Line, path: str) -> str:
    dashes = ' stroke-dasharray="5 4"' if line.dashed else ""
    return f'<path d="{path}" fill="none" stroke="{line.colour}" stroke-width="{line.width()}"{dashes}/>'


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{more}>{escape(text)}</text>'
