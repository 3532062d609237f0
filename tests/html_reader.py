"""Reads a report page the strict way: what is not well formed, or would reach outside the page, fails."""
import re
from html.parser import HTMLParser

VOID = {"br", "img", "link", "meta"}


class Reader(HTMLParser):
    """elements: (name, attributes) in order; text: what a reader sees outside style and title elements; titles: the
    tooltips; tables: the texts of the cells by table, row and column."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.words, self.titles, self.tables = [], [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == [], f"not closed: {self.open}"
        assert page.startswith("<!DOCTYPE html>\n<html")

    def handle_starttag(self, name, attributes):
        assert len(attributes) == len({k for k, _ in attributes}), f"an attribute of {name} comes twice"
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)
        if name == "table":
            self.tables.append([])
        elif name == "tr":
            self.tables[-1].append([])
        elif name in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, name):
        assert name not in VOID and self.open and self.open.pop() == name, f"</{name}> closes nothing"

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.words.append(data)
        elif self.open[-1] == "title":
            self.titles.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, name):
        return [attributes for n, attributes in self.elements if n == name]


def read(page: str) -> Reader:
    """The page, after the rules that hold for every page."""
    reader = Reader(page)
    ids = [a["id"] for _, a in reader.elements if "id" in a]
    assert len(ids) == len(set(ids)), "an id comes twice"
    for name, attributes in reader.elements:
        assert name not in ("script", "iframe", "object", "embed", "base", "form"), name
        for key, value in attributes.items():
            assert not key.startswith("on"), f"{name} {key}"
            if key in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
                assert value.startswith("data:") or value[:1] == "#" and value[1:] in ids, f"{name} {key}={value[:60]}"
            assert "url(" not in (value or "") and "@import" not in (value or "")
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style and style.count("{") == style.count("}")
    assert all(a.get("alt") for a in reader.all("img")), "an image without words"
    assert all(a.get("aria-label") or a.get("aria-hidden") == "true" for a in reader.all("svg"))
    assert reader.all("html") == [{"lang": "en"}] and len(reader.all("h1")) == 1
    return reader
