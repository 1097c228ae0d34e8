"""Charts of a page as inline SVG: lines over rounds, and dots on one scale.

Each chart is drawn twice, for a wide and for a narrow screen, since scaling a drawing scales its letters.
Lines carry their names at their ends and dots theirs above the chart, so that no line crosses a legend.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from rich.cells import cell_len, set_cell_size

WIDE, NARROW = 720, 320  # pixels
TONES = ("mean", "worst", "third", "fourth", "fifth", "sixth")  # classes of STYLE, a colour each
MOST_NAMED = 8  # lines that carry their name
_LETTER, _ROW = 7, 26  # pixels: width of a letter of 12 pixels, distance of two rows
# Colours of Okabe and Ito, which people with any kind of colour vision tell apart.
STYLE = """
svg{--ink:#333;--rule:#ddd;--faint:#b4b4b4;--c1:#0072b2;--c2:#d55e00;--c3:#009e73;--c4:#cc79a7;--c5:#a06a00;--c6:#777}
@media (prefers-color-scheme:dark){@media screen{
svg{--ink:#ddd;--rule:#444;--faint:#6c6c6c;--c1:#56b4e9;--c2:#f08a45;--c3:#2cc398;--c4:#e39bc3;--c5:#e69f00;--c6:#aaa}}}
svg text{font:12px system-ui,sans-serif;fill:var(--ink)} .rule{stroke:var(--rule);stroke-width:1}
.faint{--tone:var(--faint)} .mean{--tone:var(--c1)} .worst{--tone:var(--c2)} .third{--tone:var(--c3)}
.fourth{--tone:var(--c4)} .fifth{--tone:var(--c5)} .sixth{--tone:var(--c6)}
polyline{fill:none;stroke:var(--tone);stroke-width:1.2;stroke-linecap:round}
polyline.mean,polyline.worst{stroke-width:2.4}
circle{fill:var(--tone)} line.reach{stroke:var(--tone);stroke-width:2;opacity:.55}
"""


@dataclass(frozen=True)
class Line:
    """A line through points (round, y); `tone` is "faint" or one of `TONES`."""

    name: str
    points: Sequence[tuple[float, float]]
    tone: str = "faint"


@dataclass(frozen=True)
class Dot:
    """A value, and how far it may reach where that is known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Figure:
    """A chart for wide and for narrow screens, and the (tone, name) pairs of the dots in it."""

    wide: Markup
    narrow: Markup
    legend: tuple[tuple[str, str], ...] = ()


def line_chart(lines: Sequence[Line], title: str, x_label: str, y_label: str) -> Figure:
    """Draw lines, each with its name at its end; of many faint ones the names are left out."""
    shown = [line for line in lines if line.points]
    charts = [_lines(shown, title, x_label, y_label, width) for width in (WIDE, NARROW)]
    return Figure(charts[0], charts[1])


def dot_chart(rows: Mapping[str, Mapping[str, Dot]], title: str, x_label: str) -> Figure:
    """Draw one row of dots per name, from the top down, one colour per inner name."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    tones = {name: TONES[place % len(TONES)] for place, name in enumerate(names)}
    charts = [_dots(rows, tones, title, x_label, width) for width in (WIDE, NARROW)]
    return Figure(charts[0], charts[1], tuple((tones[name], name) for name in names))


def standalone(chart: Markup) -> str:
    """Return a chart as the content of an .svg file."""
    return str(chart).replace(">", f' xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>', 1) + "\n"


def ticks(low: float, high: float, number: int = 5) -> list[float]:
    """Return round numbers, about so many, that reach from below `low` to above `high`."""
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / number))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= number)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [place * step for place in range(first, max(last, first + 1) + 1)]


def apart(places: Sequence[float], distance: float, lowest: float, highest: float) -> list[float]:
    """Return places moved as little as it takes to have them so far apart, in order and within bounds."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = dict.fromkeys(order, 0.0)
    floor = lowest
    for index in order:
        floor = moved[index] = max(places[index], floor)
        floor += distance
    ceiling = highest
    for index in reversed(order):  # what was pushed over the end goes back
        ceiling = moved[index] = min(moved[index], ceiling)
        ceiling -= distance
    return [moved[index] for index in range(len(places))]


def _lines(lines: Sequence[Line], title: str, x_label: str, y_label: str, width: int) -> Markup:
    is_many = len(lines) > MOST_NAMED
    named = [line for line in lines if not (is_many and line.tone == "faint")]
    cells = 20 if width == WIDE else 11
    right = width - _LETTER * min(cells, max((cell_len(line.name) for line in named), default=0)) - 14
    top, bottom, left = 26, 270, 46
    xs = ticks(*_ends(x for line in lines for x, _ in line.points))
    ys = ticks(*_ends(y for line in lines for _, y in line.points))
    first, last = _ends(x for line in lines for x, _ in line.points)
    to_x = _scale(first, last, left, right)
    to_y = _scale(ys[0], ys[-1], bottom, top)
    parts = [_text(0, 12, y_label), _text(right, bottom + 36, x_label, "end")]
    for y in ys:
        parts += [_rule(left, to_y(y), right, to_y(y)), _text(left - 6, to_y(y) + 4, f"{y:g}", "end")]
    whole = [x for x in xs if first <= x <= last and math.isclose(x, round(x))]  # there is no half a round
    parts += [_text(to_x(x), bottom + 18, f"{x:g}", "middle") for x in whole]
    for line in sorted(lines, key=lambda line: line.tone != "faint"):  # what matters lies on top
        ends = line.points if len(line.points) > 1 else [*line.points, *line.points]  # so that one is a dot
        path = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in ends)
        parts.append(
            Markup('<polyline class="{}" points="{}"><title>{}</title></polyline>').format(
                line.tone, path, line.name
            )
        )
    heights = apart([to_y(line.points[-1][1]) for line in named], 15, top, bottom)
    for line, height in zip(named, heights, strict=True):
        parts.append(_text(right + 8, height + 4, _cut(line.name, cells)))
    return _svg(title, width, bottom + 44, parts)


def _dots(
    rows: Mapping[str, Mapping[str, Dot]], tones: Mapping[str, str], title: str, x_label: str, width: int
) -> Markup:
    cells = 22 if width == WIDE else 12
    left = 16 + _LETTER * min(cells, max((cell_len(name) for name in rows), default=0))
    right, top = width - 20, 10
    bottom = top + _ROW * len(rows)
    dots = [dot for row in rows.values() for dot in row.values()]
    low, high = _ends(value for dot in dots for value in (dot.value, dot.low, dot.high) if value is not None)
    xs = ticks(low, high, 8 if width == WIDE else 4)
    to_x = _scale(xs[0], xs[-1], left + 8, right)
    parts = [_text(right + 20, bottom + 36, x_label, "end")]
    for x in xs:
        parts += [_rule(to_x(x), top, to_x(x), bottom), _text(to_x(x), bottom + 18, f"{x:g}", "middle")]
    for place, (name, row) in enumerate(rows.items()):
        y = top + _ROW * (place + 0.5)
        parts.append(_text(left - 8, y + 4, _cut(name, cells), "end"))
        for inner, dot in row.items():
            if dot.low is not None and dot.high is not None:
                reach = Markup('<line class="reach {}" x1="{}" y1="{}" x2="{}" y2="{}"/>')
                ends = (round(to_x(dot.low), 1), y, round(to_x(dot.high), 1), y)
                parts.append(reach.format(tones[inner], *ends))
            told = f"{name}, {inner}: {dot.value:.4g}"
            circle = Markup('<circle class="{}" cx="{:.1f}" cy="{}" r="5"><title>{}</title></circle>')
            parts.append(circle.format(tones[inner], to_x(dot.value), y, told))
    return _svg(title, width, bottom + 44, parts)


def _ends(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return (min(found), max(found)) if found else (0.0, 1.0)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return the function from values to pixels; a single value lies at the start."""
    return lambda value: start + (end - start) * ((value - low) / (high - low) if high > low else 0.0)


def _cut(name: str, cells: int) -> str:
    return name if cell_len(name) <= cells else set_cell_size(name, cells - 1).rstrip() + "…"


def _text(x: float, y: float, text: str, anchor: str = "start") -> Markup:
    form = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    return form.format(x, y, anchor, text)


def _rule(x1: float, y1: float, x2: float, y2: float) -> Markup:
    form = Markup('<line class="rule" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
    return form.format(x1, y1, x2, y2)


def _svg(title: str, width: int, height: float, parts: Sequence[Markup]) -> Markup:
    head = Markup('<svg width="{0}" height="{1:.0f}" viewBox="0 0 {0} {1:.0f}" role="img" aria-label="{2}">')
    return head.format(width, height, title) + Markup("").join(map(escape, parts)) + Markup("</svg>")
