"""Which folder of the package may import which (docs/design.md draws it)."""
import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ensadv_fast"
LOW = {"ops", "system"}
CRAFT = {"ops", "sources", "attacks"}
MAY_IMPORT = {
    "ops": set(),
    "system": set(),
    "models": set(),
    "report": {"system"},
    "data": LOW,
    "sources": LOW,
    "attacks": {"ops", "sources"},
    "bench": {"ops", "sources"},
    "compat": CRAFT,
    "adversary": CRAFT | {"system"},
    "evaluate": CRAFT | {"system", "data", "report"},
    "diagnose": CRAFT | {"evaluate"},
    "train": CRAFT | {"system", "models", "data", "report", "adversary", "evaluate", "diagnose"},
    "cli": CRAFT | {"system", "models", "data", "report", "evaluate", "diagnose", "train", "bench"},
}


def folders_imported(path: Path) -> set[str]:
    """Folders of the package that a module names, for type checkers too; "" is the package's own face."""
    package = list(path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)] + (node.module or "").split(".") * bool(node.module)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ensadv_fast":
            base = node.module.split(".")[1:]
        else:
            continue
        found |= {base[0]} if base else {a.name if a.name in MAY_IMPORT else "" for a in node.names}
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_it_may(folder):
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        extra = folders_imported(path) - MAY_IMPORT[folder] - {folder}
        assert not extra, f"{path.relative_to(PACKAGE)} imports {sorted(extra)}"


def test_the_table_names_every_folder_and_has_a_direction():
    assert {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()} == set(MAY_IMPORT)
    TopologicalSorter(MAY_IMPORT).prepare()  # CycleError


def test_the_root_holds_faces_alone():
    assert {p.name for p in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
