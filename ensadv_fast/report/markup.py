"""HTML piece by piece: a report page is one self-contained file made of blocks.

A block is a function from plain data (what results.json holds) to `Markup`; `document` puts blocks into sections and
sections into a page. `tag` escapes all text that is not `Markup`, so a model may be named `<script>`. A page loads
nothing from a network, and the same contents give the same file to the byte.

Numbers are shown by `show`. `form` is a format specification. One that ends in "%" shows a fraction as a percentage
without the sign (".1%": 0.1234 as 12.3), which a heading or a note then names.
"""
from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, overload

import numpy as np

from . import style

NONE = "–"
VOID = ("br", "img", "link", "meta")
STATES = {"good": ("✓", "passed"), "bad": ("✗", "suspicious"), "open": ("?", "not decidable")}


class Markup(str):
    """Text that is HTML already."""


def tag(_name: str, *children: Any, **attributes: Any) -> Markup:
    """One element. Children that are not Markup are text, which is escaped; None is left out; of a list, the items are
    children. Attributes: None and False are left out, `class_` is class, an underscore is a hyphen."""
    words = [_name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"')
    opened = f"<{' '.join(words)}>"
    return Markup(opened if _name in VOID else f"{opened}{join(children)}</{_name}>")


def join(children: Iterable[Any], between: str = "") -> Markup:
    """The children of an element one after the other, as `tag` takes them."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, (list, tuple)):
            parts.append(join(child))
        elif child is not None:
            parts.append(html.escape(str(child), quote=False))
    return Markup(between.join(parts))


# ------------------------------------------------------------------------------------------------ numbers


def show(value: float | None, form: str = ".1%") -> str:
    """A number as the page shows it; a dash for None and what is not finite."""
    if value is None or not math.isfinite(value):
        return NONE
    value = value or 0  # no minus before a zero
    return f"{100 * value:{form[:-1]}f}" if form.endswith("%") else format(value, form)


@dataclass(frozen=True)
class Number:
    """A value with what is known of its uncertainty: spread, a standard deviation, or the interval (low, high), shown
    rather than the spread. mark: "best" or "tied", set by `mark_best`. form: in place of the column's form."""

    value: float | None
    spread: float | None = None
    low: float | None = None
    high: float | None = None
    mark: str = ""
    form: str = ""

    def bounds(self) -> tuple[float, float]:
        """(low, high); value minus and plus the spread where there is no interval."""
        value, spread = self.value or 0.0, self.spread or 0.0
        return (value - spread if self.low is None else self.low, value + spread if self.high is None else self.high)

    def uncertainty(self, form: str) -> str:
        """In small print: the interval or the standard deviation, nothing where neither is known."""
        if self.low is not None and self.high is not None:
            return f"{show(self.low, form)} to {show(self.high, form)}"
        return "" if self.spread is None else f"± {show(self.spread, form)}"


Cell = str | float | Number | Mapping[str, Any] | None


@overload
def as_number(cell: float | Number | Mapping[str, Any] | None) -> Number: ...


@overload
def as_number(cell: Cell) -> Number | str: ...


def as_number(cell: Cell) -> Number | str:
    """A cell as it comes from JSON: a number, None, or a mapping with the names of `Number` (other names are ignored)
    becomes a `Number`; words stay words."""
    if isinstance(cell, (Number, str)):
        return cell
    if isinstance(cell, Mapping):
        return Number(**{f.name: cell[f.name] for f in fields(Number) if f.name in cell})
    return Number(cell)


def mark_best(cells: Sequence[Cell], *, lower: bool = True) -> list[Number | str]:
    """The same cells, the best number marked as best and those whose intervals meet its interval as tied.

    lower: the lowest number is the best. A single number is not marked.
    """
    numbers = [as_number(c) for c in cells]
    known = [c for c in numbers if isinstance(c, Number) and c.value is not None and math.isfinite(c.value)]
    if len(known) < 2:
        return numbers
    best = (min if lower else max)(known, key=lambda c: c.value or 0.0)
    low, high = best.bounds()

    def mark(c: Number) -> Number:
        if c.value == best.value:
            return replace(c, mark="best")
        return replace(c, mark="tied") if c.bounds()[0] <= high and c.bounds()[1] >= low else c

    return [mark(c) if isinstance(c, Number) and any(c is k for k in known) else c for c in numbers]


# ------------------------------------------------------------------------------------------------- blocks


def text(*paragraphs: str, note: bool = False) -> Markup:
    """Paragraphs. note: in small print."""
    return join(tag("p", p, class_="note" if note else None) for p in paragraphs)


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], *, form: str | Sequence[str] = ".1%", caption: str = "",
          note: str = "") -> Markup:
    """A table whose first column names the rows. Numbers are aligned to the right, words to the left. form: one for all
    columns after the first, or one for each of them."""
    forms = [form] * (len(head) - 1) if isinstance(form, str) else form
    body = [tag("tr", tag("th", row[0], scope="row"), [
        _cell(as_number(c), f) for c, f in zip(row[1:], forms, strict=True)]) for row in rows]
    words = [all(isinstance(row[i], str) for row in rows) for i in range(len(head))]
    marks = {c.mark for row in rows for c in row if isinstance(c, Number)}
    legend = [meaning for mark, meaning in (
        ("best", "●\u00a0best of its row"), ("tied", "○\u00a0tied with it: the intervals meet"))
              if mark in marks]
    below = ". ".join(filter(None, [note.rstrip("."), *legend]))
    return tag("figure", tag("div", tag(
        "table", tag("caption", caption) if caption else None,
        tag("thead", tag("tr", [tag("th", name, scope="col", class_="words" if w else None)
                                for name, w in zip(head, words, strict=True)])), tag("tbody", body)), class_="scroll"),
        tag("p", below + ".", class_="note") if below else None)


def _cell(cell: Number | str, form: str) -> Markup:
    if isinstance(cell, str):
        return tag("td", cell, class_="words")
    sign, form = {"best": "●", "tied": "○"}.get(cell.mark, ""), cell.form or form
    small = cell.uncertainty(form)
    return tag("td", tag("span", sign, class_="mark", title=cell.mark) if sign else None, show(cell.value, form),
               tag("small", small) if small else None, class_=cell.mark or None)


def level(value: float, low: float, high: float) -> int:
    """The number of a heat-map's colour, 0..style.LEVELS, for a value between low and high."""
    share = (value - low) / (high - low) if high > low else 0.0
    return round(min(max(share, 0.0), 1.0) * style.LEVELS)


def heatmap(rows: Sequence[str], columns: Sequence[str],
            values: Sequence[Sequence[float | Number | Mapping[str, Any] | None]], *, title: str = "",
            corner: str = "", form: str = ".1%", low: float = 0.0, high: float = 1.0,
            own: Iterable[Sequence[int]] = ()) -> Markup:
    """A matrix of numbers on colours from `low` (pale) to `high` (strong). own: (row, column) pairs that are framed,
    such as white-box cells."""
    framed = {tuple(pair) for pair in own}
    body = []
    for i, (name, row) in enumerate(zip(rows, values, strict=True)):
        cells = []
        for j, (column, cell) in enumerate(zip(columns, row, strict=True)):
            n = as_number(cell)
            known = n.value is not None and math.isfinite(n.value)
            colour = None if n.value is None or not known else f"h{level(n.value, low, high)}"
            words = [colour, "own" if (i, j) in framed else None]
            small = n.uncertainty(form)
            cells.append(tag("td", show(n.value, form), tag("small", small) if small and known else None,
                             class_=" ".join(filter(None, words)) or None, title=f"{name} → {column}"))
        body.append(tag("tr", tag("th", name, scope="row"), cells))
    head = tag("tr", tag("th", corner, scope="col"), [tag("th", c, scope="col") for c in columns])
    return tag("figure", tag("div", tag("table", tag("caption", title) if title else None, tag("thead", head),
                                        tag("tbody", body)), class_="scroll heat"))


def scale(low: str, high: str) -> Markup:
    """The colours of the heat-maps. low, high: the words at their ends."""
    return tag("div", low, tag("span", [tag("i", class_=f"h{i}") for i in range(style.LEVELS + 1)], aria_hidden="true"),
               high, class_="scale")


def outcome(state: str, word: str | None = None) -> Markup:
    """A state (good, bad or open) as its sign and word (None: the usual one), also for a table's cell."""
    sign, usual = STATES[state]
    return tag("b", f"{sign} {usual if word is None else word}", class_=state)


def checklist(items: Iterable[Mapping[str, Any]]) -> Markup:
    """Claims or checks with their outcome. Each item: "state" (good, bad or open), "claim", and optionally
    "evidence" (the numbers) and "word" in place of passed, suspicious, not decidable."""
    lines = []
    for item in items:
        evidence = item.get("evidence")
        lines.append(tag("li", outcome(item["state"], item.get("word")),
                         tag("span", item["claim"], tag("small", evidence) if evidence else None)))
    return tag("ul", lines, class_="checks")


def key_values(title: str, values: Mapping[str, Any], *, opened: bool = False) -> Markup:
    """Names and values behind a heading that opens; nested mappings are written out as a.b."""
    rows = [tag("tr", tag("th", k, scope="row"), tag("td", tag("code", v))) for k, v in _flatten(values)]
    return tag("details", tag("summary", title), tag("div", tag("table", tag("tbody", rows)), class_="scroll pairs"),
               open="open" if opened else None)


def _flatten(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    found = []
    for key, value in values.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping):
            found += _flatten(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            found.append((name, " ".join(map(str, value)) or NONE))
        elif isinstance(value, float):
            found.append((name, f"{value:.6g}"))
        else:
            found.append((name, NONE if value is None else str(value)))
    return found


def folded(title: str, *blocks: Markup) -> Markup:
    """Blocks behind a heading that opens."""
    return tag("details", tag("summary", title), *blocks)


def grid(*blocks: Markup) -> Markup:
    """Blocks of equal width side by side where there is room: charts."""
    return tag("div", *blocks, class_="grid")


def flow(*blocks: Markup) -> Markup:
    """Blocks of their own widths side by side where there is room: tables and heat-maps."""
    return tag("div", *blocks, class_="flow")


# ------------------------------------------------------------------------------------------------- images


def png(image: np.ndarray) -> str:
    """A data URI of an image, uint8 [H, W] (grey) or [H, W, 3]."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.ndim == 3 and image.shape[2] != 3:
        raise ValueError(f"png: image must be uint8 [H, W] or [H, W, 3], got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    lines = np.zeros((height, 1 + image[0].size), np.uint8)  # each line begins with its filter: 0, none
    lines[:, 1:] = image.reshape(height, -1)
    body = b"".join(struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
                    for kind, part in (
                        (b"IHDR", struct.pack(">2I5B", width, height, 8, 0 if image.ndim == 2 else 2, 0, 0, 0)),
                        (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")))
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


@dataclass(frozen=True)
class ImageRow:
    """One row of an image grid: images uint8 [n, H, W(, 3)], and captions, what stands below each. name: read out to
    those who cannot see the images, and written beside the row where there is no label."""

    name: str
    images: np.ndarray
    captions: Sequence[str] = ()
    label: str = ""


def images(columns: Sequence[str], rows: Sequence[ImageRow], *, note: str = "") -> Markup:
    """Images in rows under named columns; small ones are shown enlarged, pixel by pixel."""
    body = []
    for row in rows:
        large = max(row.images.shape[1:3]) > 64
        cells = [tag("td", tag("img", src=png(image), alt=f"{row.name}, {column}"),
                     row.captions[i] if row.captions else None, class_="large" if large else None)
                 for i, (column, image) in enumerate(zip(columns, row.images, strict=True))]
        body.append(tag("tr", tag("th", row.label or row.name, scope="row"), cells))
    head = tag("tr", tag("th", scope="col"), [tag("th", c, scope="col") for c in columns])
    return tag("figure", tag("div", tag("table", tag("thead", head), tag("tbody", body)), class_="scroll images"),
               tag("p", note, class_="note") if note else None)


# ----------------------------------------------------------------------------------------------- document


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Markup]


def document(title: str, verdict: str, facts: Sequence[str], sections: Sequence[Section], foot: str = "") -> str:
    """The page. verdict: for a reader who reads one line only; facts: data set, budget, seeds...; foot: versions."""
    named = [(f"section-{i}", s) for i, s in enumerate(sections, 1)]
    head = [tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            # The page loads nothing, and with this the browser would not let it.
            tag("meta", http_equiv="Content-Security-Policy",
                content="default-src 'none'; img-src data:; style-src 'unsafe-inline'"),
            tag("link", rel="icon", href="data:,"), tag("title", title), tag("style", Markup(style.sheet()))]
    body = [tag("header", tag("h1", title), tag("p", verdict, class_="verdict"),
                tag("p", " · ".join(facts), class_="facts") if facts else None,
                tag("nav", [tag("a", s.title, href=f"#{name}") for name, s in named])),
            tag("main", [tag("section", tag("h2", s.title), *s.blocks, id=name) for name, s in named]),
            tag("footer", foot) if foot else None]
    return "<!DOCTYPE html>\n" + tag("html", tag("head", join(head, "\n")), "\n", tag("body", join(body, "\n")),
                                     lang="en") + "\n"
