"""Griffe extension: Sphinx's roles in docstrings become links to the entries of docs/api/, or code where there is none.

"[0, 1] [N, C]" is a range and a shape, and no link of Markdown. A field of Config shows its default, not its help."""
import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`~?([\w.]+)`")
SHOWN = re.findall(r"^::: ([\w.]+)$", "\n".join(p.read_text() for p in Path(__file__).parent.glob("api/*.md")), re.M)


def linked(role: re.Match) -> str:
    name = role[1]
    found = [path for path in SHOWN if path == name or path.rpartition(".")[2] == name.rpartition(".")[2]]
    return f"[`{name}`][{found[0]}]" if len(found) == 1 else f"`{name}`"


class Roles(griffe.Extension):
    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if isinstance(attr.value, griffe.ExprCall) and str(attr.value.function) == "_option":
            attr.value = attr.value.arguments[0]

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(linked, obj.docstring.value.replace("] [", r"] \["))
