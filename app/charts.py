"""Pictures as SVG: numbers in, markup out, every text escaped. Colours come from the style sheet, for both themes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 30
COLOURS = 6
"""So many classes `series-0`, `series-1`, ... the style sheet knows."""


@dataclass(frozen=True)
class Line:
    """One curve: its name, the number of its colour, and steps with values."""

    name: str
    series: int
    points: Sequence[tuple[float, float]]


def lines(title: str, curves: Sequence[Line], last: float, *, top: float | None = None) -> Markup:
    """Draw curves over steps, with a legend.

    Args:
        title (`str`): What the numbers are; also what a screen reader says.
        curves (`Sequence[Line]`): The curves, none of them empty.
        last (`float`): The last step, whether it has been reached or not.
        top (`float`, *optional*): Upper end of the scale; by default a round number above the largest value.
    """
    points = [point for curve in curves for point in curve.points]
    if not points:
        return Markup("")
    last = max(last, 1)
    high = top if top is not None else _round_up(max(y for _, y in points))
    place = _Plane(last, high)
    parts = [_grid(place, [round(tick) for tick in _ticks(last)], _ticks(high))]
    for curve in curves:
        path = " ".join(f"{place.x(x):.1f},{place.y(y):.1f}" for x, y in curve.points)
        parts.append(Markup('<polyline class="series-{}" points="{}"/>').format(curve.series % COLOURS, path))
        x, y = curve.points[-1]
        parts.append(
            Markup('<circle class="series-{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(
                curve.series % COLOURS, place.x(x), place.y(y)
            )
        )
    told = "; ".join(f"{curve.name}: {curve.points[-1][1]:.3g}" for curve in curves)
    return _figure(title, f"{title}, latest {told}", parts, [(curve.name, curve.series) for curve in curves])


@dataclass(frozen=True)
class Dot:
    """One model in the plane, in percent, with the interval of the upward rate."""

    name: str
    series: int
    x: float
    y: float
    low: float
    high: float


def plane(title: str, across: str, up: str, dots: Sequence[Dot]) -> Markup:
    """Draw models by two rates, both in percent, better towards the upper right."""
    place = _Plane(100, 100)
    ticks = [0, 25, 50, 75, 100]
    parts = [_grid(place, ticks, ticks)]
    for number, dot in enumerate(dots):
        x = place.x(dot.x) + 3 * number  # so that equal ones can be told apart
        parts.append(
            Markup(
                '<g class="series-{n}"><line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
                '<circle cx="{x:.1f}" cy="{y:.1f}" r="6"/></g>'
            ).format(n=dot.series % COLOURS, x=x, y=place.y(dot.y), low=place.y(dot.low), high=place.y(dot.high))
        )
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 2, across
        )
    )
    told = "; ".join(f"{dot.name}: {up} {dot.y:.0f}, {across} {dot.x:.0f}" for dot in dots)
    return _figure(f"{title}: {up}", told, parts, [(dot.name, dot.series) for dot in dots])


@dataclass(frozen=True)
class _Plane:
    most_x: float
    most_y: float

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * value / self.most_x

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(value, self.most_y) / self.most_y


def _grid(place: _Plane, across: Sequence[float], up: Sequence[float]) -> Markup:
    parts = [
        Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>'
            '<text class="axis" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
        ).format(LEFT, WIDTH - RIGHT, LEFT - 6, place.y(tick) + 4, _short(tick), y=place.y(tick))
        for tick in up
    ]
    parts += [
        Markup('<text class="axis" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            place.x(tick), HEIGHT - BOTTOM + 14, _short(tick)
        )
        for tick in across
    ]
    return Markup("").join(parts)


def _figure(title: str, told: str, parts: Sequence[Markup], names: Sequence[tuple[str, int]]) -> Markup:
    legend = Markup("").join(
        Markup('<li><span class="swatch series-{}"></span>{}</li>').format(series % COLOURS, name)
        for name, series in names
    )
    return Markup(
        '<figure class="chart"><figcaption>{}</figcaption><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
        "<ul>{}</ul></figure>"
    ).format(title, WIDTH, HEIGHT, told, Markup("").join(parts), legend)


def _ticks(most: float) -> list[float]:
    return [most * part / 4 for part in range(5)]


def _round_up(value: float) -> float:
    """Return the next of 1, 2, 4 or 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 1.0
    while power > value:
        power /= 10
    while power * 10 <= value:
        power *= 10
    return next(power * step for step in (1, 2, 4, 8, 10) if power * step >= value)


def _short(value: float) -> str:
    return f"{value:.3g}"
