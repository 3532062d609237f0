"""Looks at the built site: what its pages load from elsewhere, and which public names have no entry.

    python docs/site_check.py site
"""
import importlib
import inspect
import re
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

FACES = ("ensadv_fast", *(f"ensadv_fast.{name}" for name in (
    "ops", "attacks", "adversary", "data", "models", "train", "evaluate", "diagnose", "compat", "compat.torchattacks",
    "compat.cleverhans")))
REMOTE = re.compile(r"(?:[a-z]+:)?//", re.I)
IN_STYLES = re.compile(r"(?:url\(|@import)\s*[\"']?\s*((?:[a-z]+:)?//[^\"')\s]+)", re.I)
LOADED = {"script": ("src",), "img": ("src", "srcset"), "source": ("src", "srcset"), "iframe": ("src",),
          "object": ("data",), "embed": ("src",), "video": ("src", "poster"), "audio": ("src",), "track": ("src",),
          "link": ("href",), "use": ("href", "xlink:href"), "image": ("href", "xlink:href"), "input": ("src",)}


class _Loads(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            value = value or ""
            if name in LOADED.get(tag, ()) and REMOTE.match(value.strip()):
                self.found.append(f"<{tag} {name}={value}>")
            elif name == "style":
                self.found += IN_STYLES.findall(value)


def outside(site: Path) -> list[str]:
    """What pages and styles load from elsewhere; links that a reader follows are none of it."""
    found = []
    for path in sorted(site.rglob("*")):
        if path.suffix not in (".html", ".css", ".svg"):
            continue
        text = path.read_text()
        loads = _Loads(text).found if path.suffix != ".css" else []
        styles = [text] if path.suffix == ".css" else re.findall(r"<style[^>]*>(.*?)</style>", text, re.S)
        loads += [url for style in styles for url in IN_STYLES.findall(style)]
        found += [f"{path.relative_to(site)}: {load}" for load in loads]
    return found


def public() -> dict[str, set[str]]:
    """The public names, each with the paths that an entry may have: of the face, and of the definition."""
    names = {}
    for face in FACES:
        module = importlib.import_module(face)
        for name in module.__all__:
            obj = inspect.unwrap(getattr(module, name))
            paths = {f"{face}.{name}"}
            if hasattr(obj, "__qualname__"):
                paths.add(f"{obj.__module__}.{obj.__qualname__}")
            if not isinstance(obj, ModuleType):
                names[f"{face}.{name}"] = paths
    return names


def entries(site: Path) -> set[str]:
    """The names that the site's inventory lists."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}


def main() -> int:
    site = Path(sys.argv[1])
    shown = entries(site)
    problems = [f"loads from elsewhere: {load}" for load in outside(site)]
    problems += [f"no entry: {name}" for name, paths in public().items() if not paths & shown]
    print(*problems, sep="\n", end="\n" if problems else "")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
