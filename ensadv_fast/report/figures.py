"""Figures of report pages as inline SVG: curves with bands, and surfaces as a contour map and as a relief.

Colours come from the page's style sheet by class, so figures follow light and dark mode. Curves differ by dash and
marker too. Hovering a point shows its values.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import style
from .markup import Markup, png, show, tag

Numbers = Sequence[float | None]
DASHES = (None, "7 3", "2 4", "9 3 2 3", "12 4", "4 4", "1 3", "7 3 1 3 1 3")
MARKERS = ("M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0Z", "M-3,-3h6v6h-6Z", "M0,-4L4,3H-4Z", "M0,-4L4,0L0,4L-4,0Z",
           "M0,4L4,-3H-4Z", "M-4,-1h3v-3h2v3h3v2h-3v3h-2v-3h-3Z", "M-4,-1.5h8v3h-8Z", "M-1.5,-4h3v8h-3Z")


@dataclass(frozen=True)
class Series:
    """One curve: y over x, None or a non-finite number where there is a gap, with an optional band low..high. look: the
    number of its colour, dash and marker, so that a curve looks alike in several figures; None: its position among the
    curves of the figure."""

    name: str
    x: Sequence[float]
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    look: int | None = None


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within low..high, `about` as many."""
    step = (high - low) / about
    power = 10.0 ** math.floor(math.log10(step))
    step = next(m * power for m in (1, 2, 5, 10) if step <= m * power * (1 + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _label(value: float, form: str) -> str:
    return f"{100 * value:g}" if form.endswith("%") else f"{value:g}"


def _finite(values: Numbers | None) -> list[float]:
    return [] if values is None else [v for v in values if v is not None and math.isfinite(v)]


def _points(pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


class Frame:
    """The plot area of a chart and its two linear scales, in the units of an SVG of 420 by 270."""

    width, height = 420, 270
    left, right, top, bottom = 50, 410, 10, 228

    def __init__(self, x: tuple[float, float], y: tuple[float, float]):
        self.x_low, self.x_high = x if x[1] > x[0] else (x[0] - 0.5, x[0] + 0.5)
        self.y_low, self.y_high = y if y[1] > y[0] else (y[0] - 0.5, y[0] + 0.5)

    def at(self, x: float, y: float) -> tuple[float, float]:
        return (self.left + (x - self.x_low) / (self.x_high - self.x_low) * (self.right - self.left),
                self.bottom - (y - self.y_low) / (self.y_high - self.y_low) * (self.bottom - self.top))

    def axes(self, x_label: str, y_label: str, x_form: str = "g", y_form: str = "g", *,
             ruled: bool = True) -> list[Markup]:
        """Both axes with their names and numbers; ruled: lines across the plot at the numbers of y."""
        parts = []
        for v in ticks(self.y_low, self.y_high):
            _, y = self.at(self.x_low, v)
            parts += [tag("line", x1=self.left if ruled else self.left - 4, x2=self.right if ruled else self.left,
                          y1=f"{y:.1f}", y2=f"{y:.1f}", class_="rule" if ruled else "axis"),
                      tag("text", _label(v, y_form), x=self.left - 6, y=f"{y + 4:.1f}", text_anchor="end",
                          class_="tick")]
        for v in ticks(self.x_low, self.x_high, 6):
            x, _ = self.at(v, self.y_low)
            parts += [tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=self.bottom, y2=self.bottom + 4, class_="axis"),
                      tag("text", _label(v, x_form), x=f"{x:.1f}", y=self.bottom + 17, text_anchor="middle",
                          class_="tick")]
        middle = (self.top + self.bottom) / 2
        return [*parts, tag("line", x1=self.left, x2=self.right, y1=self.bottom, y2=self.bottom, class_="axis"),
                tag("text", x_label, x=(self.left + self.right) / 2, y=self.height - 6, text_anchor="middle"),
                tag("text", y_label, x=12, y=middle, text_anchor="middle", transform=f"rotate(-90 12 {middle:g})")]


def curves(series: Sequence[Series | Mapping[str, Any]], *, title: str, x_label: str, y_label: str, form: str = ".1%",
           x_form: str = "g", y_range: tuple[float, float] | None = None, note: str = "") -> Markup:
    """A line chart. form, x_form: of the values in the tooltips, as `markup.show` takes them; with "%" the axis counts
    in percent too. y_range: None takes that of the data. Where no point is finite, the chart says so and draws nothing.
    """
    given = [s if isinstance(s, Series) else Series(**s) for s in series]
    shown = [replace(s, look=(i if s.look is None else s.look) % len(MARKERS)) for i, s in enumerate(given)]
    xs = [x for s in shown for x in _finite(s.x)]
    ys = [y for s in shown for values in (s.y, s.low, s.high) for y in _finite(values)]
    if not xs or not ys:
        return tag("figure", tag("figcaption", title), tag("p", "Nothing was measured.", class_="note"))
    low, high = y_range or (min(ys), max(ys))
    margin = 0.0 if y_range else 0.04 * (high - low)
    frame = Frame((min(xs), max(xs)), (low - margin, high + margin))
    drawn = [part for s in shown for part in _band(frame, s)]
    drawn += [part for s in shown for part in _line(frame, s, form, x_form)]
    words = f"{title}: {y_label} over {x_label} of {', '.join(s.name for s in shown)}"
    return tag("figure", tag("figcaption", title), tag(
        "svg", frame.axes(x_label, y_label, x_form, form), drawn, viewBox=f"0 0 {frame.width} {frame.height}",
        role="img", aria_label=words), legend(shown),
        tag("p", note, class_="note") if note else None)


def _runs(s: Series, *columns: Numbers) -> list[list[tuple[float, ...]]]:
    """The stretches of a series without gaps, as tuples (x, one value of each column)."""
    runs: list[list[tuple[float, ...]]] = [[]]
    for point in zip(s.x, *columns, strict=True):
        if all(v is not None and math.isfinite(v) for v in point):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _band(frame: Frame, s: Series) -> list[Markup]:
    if s.low is None or s.high is None:
        return []
    return [tag("polygon", points=_points([frame.at(x, h) for x, _, h in run] +
                                          [frame.at(x, low) for x, low, _ in reversed(run)]),
                class_=f"band s{s.look}") for run in _runs(s, s.low, s.high)]


def _line(frame: Frame, s: Series, form: str, x_form: str) -> list[Markup]:
    parts, runs = [], _runs(s, s.y)
    for run in runs:
        parts.append(tag("polyline", points=_points([frame.at(*p) for p in run]), class_=f"line s{s.look}",
                         stroke_dasharray=DASHES[s.look or 0]))
    every = max(1, sum(map(len, runs)) // 12)  # about twelve markers tell curves apart; more would hide the line
    for n, point in enumerate(p for run in runs for p in run):
        x, y = frame.at(*point)
        words = tag("title", f"{s.name}: {show(point[1], form)} at {show(point[0], x_form)}")
        if n % every == 0:
            parts.append(tag("path", words, d=MARKERS[s.look or 0], transform=f"translate({x:.1f} {y:.1f})",
                             class_=f"s{s.look}"))
        parts.append(tag("circle", words, cx=f"{x:.1f}", cy=f"{y:.1f}", r=7, class_="hit"))
    return parts


def legend(series: Sequence[Series]) -> Markup:
    """The names of curves, each with its line and marker."""
    items = []
    for s in series:
        sample = tag("svg", tag("line", x1=1, x2=33, y1=7, y2=7, class_=f"line s{s.look}",
                                stroke_dasharray=DASHES[s.look or 0]),
                     tag("path", d=MARKERS[s.look or 0], transform="translate(17 7)", class_=f"s{s.look}"),
                     viewBox="0 0 34 14", aria_hidden="true")
        items.append(tag("li", sample, s.name))
    return tag("ul", items, class_="legend")


# ------------------------------------------------------------------------------------------------ surfaces


def contours(grid: np.ndarray, value: float) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The line grid == value as segments ((column, row), (column, row)), by marching squares: the line crosses a side
    of a cell where the value lies between its two corners. Cells with a corner that is not finite have no line."""
    segments = []
    for r, c in np.ndindex(grid.shape[0] - 1, grid.shape[1] - 1):
        corners = [(c, r), (c + 1, r), (c + 1, r + 1), (c, r + 1)]
        heights = [float(grid[y, x]) for x, y in corners]
        if not all(map(math.isfinite, heights)):
            continue
        crossings = []
        for k in range(4):
            (p, a), (q, b) = (corners[k], heights[k]), (corners[(k + 1) % 4], heights[(k + 1) % 4])
            if (a < value) != (b < value):
                t = (value - a) / (b - a)
                crossings.append((p[0] + (q[0] - p[0]) * t, p[1] + (q[1] - p[1]) * t))
        if len(crossings) == 4 and (np.mean(heights) < value) != (heights[0] < value):
            crossings = crossings[1:] + crossings[:1]  # a saddle: its middle separates the first corner and the third
        segments += [(crossings[k], crossings[k + 1]) for k in range(0, len(crossings), 2)]
    return segments


def _colour(value: float, low: float, high: float) -> str:
    return style.between(style.SURFACE, (value - low) / (high - low) if high > low else 0.0)


def surface(values: Sequence[Sequence[float | None]], x: Sequence[float], y: Sequence[float], *, title: str,
            x_label: str, y_label: str, z_label: str, form: str = ".3g", note: str = "") -> Markup:
    """A grid of values, values[row][column] at (x[column], y[row]), twice: from above with contour lines, and as a
    relief. x and y increase evenly. ValueError where the sizes do not fit or the grid is under 2 by 2."""
    grid = np.array([[math.nan if v is None else v for v in row] for row in values], np.float64)
    if grid.ndim != 2 or grid.shape != (len(y), len(x)) or min(grid.shape) < 2:
        raise ValueError(f"surface: values must be [{len(y)}, {len(x)}], at least [2, 2], got {list(grid.shape)}")
    known = grid[np.isfinite(grid)]
    if not known.size:
        return tag("figure", tag("figcaption", title), tag("p", "Nothing finite was measured.", class_="note"))
    low, high = float(known.min()), float(known.max())
    return tag("figure", tag("figcaption", title), tag(
        "div", _from_above(grid, x, y, low, high, f"{title}: contour map of {z_label}", x_label, y_label),
        _relief(grid, low, high, f"{title}: relief of {z_label}", x_label, y_label), class_="grid"),
        _surface_scale(low, high, z_label, form), tag("p", note, class_="note") if note else None)


def _from_above(grid: np.ndarray, x: Sequence[float], y: Sequence[float], low: float, high: float, words: str,
                x_label: str, y_label: str) -> Markup:
    frame = Frame((x[0], x[-1]), (y[0], y[-1]))
    rows, columns = grid.shape
    to_page = [frame.at(x[0] + (x[-1] - x[0]) * c / (columns - 1), y[0] + (y[-1] - y[0]) * r / (rows - 1))
               for r, c in ((0, 0), (1, 1))]
    (left, bottom), dx, dy = to_page[0], to_page[1][0] - to_page[0][0], to_page[1][1] - to_page[0][1]
    lines = "".join(f"M{left + a[0] * dx:.1f},{bottom + a[1] * dy:.1f}L{left + b[0] * dx:.1f},{bottom + b[1] * dy:.1f}"
                    for k in range(1, 10) for a, b in contours(grid, low + (high - low) * k / 10))
    picture = tag("image", href=png(_smooth(grid, low, high)), x=frame.left, y=frame.top,
                  width=frame.right - frame.left, height=frame.bottom - frame.top, preserveAspectRatio="none")
    return tag("svg", picture, tag("path", d=lines, class_="level halo"), tag("path", d=lines, class_="level"),
               frame.axes(x_label, y_label, ruled=False), viewBox=f"0 0 {frame.width} {frame.height}", role="img",
               aria_label=words)


def _smooth(grid: np.ndarray, low: float, high: float, size: int = 96) -> np.ndarray:
    """The grid as an image, uint8 [size, size, 3], linear between its points, row 0 at the bottom, grey where not
    finite."""
    r, c = (np.linspace(0, n - 1, size) for n in grid.shape)
    i, j = np.minimum(r.astype(int), grid.shape[0] - 2), np.minimum(c.astype(int), grid.shape[1] - 2)
    u, v = (r - i)[:, None], (c - j)[None]
    mixed = ((1 - u) * (1 - v) * grid[i][:, j] + (1 - u) * v * grid[i][:, j + 1] +
             u * (1 - v) * grid[i + 1][:, j] + u * v * grid[i + 1][:, j + 1])
    palette = np.array([style.rgb(style.between(style.SURFACE, k / 255)) for k in range(256)], np.uint8)
    share = (mixed - low) / (high - low) if high > low else np.where(np.isfinite(mixed), 0.0, np.nan)
    image = palette[np.nan_to_num(share * 255).round().astype(int)]
    image[~np.isfinite(share)] = 128
    return image[::-1]


def _relief(grid: np.ndarray, low: float, high: float, words: str, x_label: str, y_label: str) -> Markup:
    """The surface seen from its corner (x high, y low), drawn from back to front."""
    kept = [np.unique(np.linspace(0, n - 1, min(n, 25)).round().astype(int)) for n in grid.shape]
    v, u = (k / k[-1] for k in kept)  # where the rows and columns that are drawn lie, 0..1
    grid = grid[np.ix_(*kept)]
    share = (grid - low) / (high - low) if high > low else grid - low

    def at(r: int, c: int, z: float) -> tuple[float, float]:
        return 30 + 180 * (u[c] + v[r]), 172 + 45 * (u[c] - v[r]) - 105 * z

    floor = [at(0, 0, 0), at(0, -1, 0), at(-1, -1, 0), at(-1, 0, 0)]
    parts = [tag("path", d=f"M{'L'.join(f'{x:.0f},{y:.0f}' for x, y in floor)}Z", class_="axis")]
    for r, c in sorted(np.ndindex(len(v) - 1, len(u) - 1), key=lambda cell: u[cell[1]] - v[cell[0]]):
        around = [(r, c), (r, c + 1), (r + 1, c + 1), (r + 1, c)]
        if all(math.isfinite(share[p]) for p in around):
            colour = _colour(float(np.mean([grid[p] for p in around])), low, high)
            parts.append(tag("polygon", points=_points([at(*p, float(share[p])) for p in around]), fill=colour))
    # The two edges in front carry the names of the directions.
    parts += [tag("text", f"{x_label} →", x=112, y=222, text_anchor="middle", transform="rotate(14 112 222)"),
              tag("text", f"{y_label} →", x=310, y=222, text_anchor="middle", transform="rotate(-14 310 222)")]
    return tag("svg", parts, viewBox="0 0 420 270", role="img", aria_label=words, class_="relief")


def _surface_scale(low: float, high: float, z_label: str, form: str) -> Markup:
    steps = [tag("i", style=f"background:{style.between(style.SURFACE, k / 20)}") for k in range(21)]
    return tag("div", f"{z_label}: {show(low, form)}", tag("span", steps, aria_hidden="true"), show(high, form),
               class_="scale")
