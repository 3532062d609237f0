"""README.md and docs/ say what is run, measured and public: commands, tables, pictures, names, rules and paths."""
import ast
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from test_folders import MAY_IMPORT

import ensadv_fast as ea
from ensadv_fast import cli, ops
from ensadv_fast.train import PRESETS, RUNS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])
MOST_LINES = {"README.md": 180, "CONTRIBUTING.md": 90, **{f"docs/{name}.md": most for name, most in {
    "attacks": 120, "sources": 120, "training": 130, "evaluation": 110, "data": 60, "compat": 80, "building": 60,
    "recipes": 140, "benchmarks": 90, "design": 160, "rules": 140}.items()}}
GENERATED = {"docs/results.md", "docs/papers.md"}


def loaded(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- commands ----------------------------------------------------------------------------------------------------

def test_ci_runs_the_test_command_of_the_readme():
    commands = [line.strip() for line in README.splitlines() if line.startswith("    python3 -m venv")]
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_ci_builds_the_site():
    assert ".ci/docs" in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "mkdocs build --strict" in (ROOT / ".ci" / "docs").read_text()


def test_the_commands_of_the_readme_are_understood():
    lines = README.replace("\\\n", "").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("    ensadv-fast ")]
    assert [words[1] for words in commands] == ["train", "evaluate", "diagnose"]
    for words in commands:
        assert cli.make_parser(words[1]).parse_args(words[1:]).command == words[1]


def test_every_preset_and_run_is_explained():
    text = (DOCS / "training.md").read_text()
    assert [name for name in [*PRESETS, *RUNS] if f"| `{name}` |" not in text] == []


# ---- tables and pictures -----------------------------------------------------------------------------------------

@pytest.fixture
def report():
    return loaded(ROOT / "bench" / "report.py")


def test_tables_come_from_the_results(report):
    for path, tables in report.DOCUMENTS.items():
        text = path.read_text()
        assert report.rendered(text, tables) == text, f"{path}: run bench/report.py"


def test_results_are_shown_and_tables_have_results(report, monkeypatch, tmp_path):
    shown = {file for tables in report.DOCUMENTS.values() for file, _ in tables.values()}
    assert {path.name for path in report.RESULTS.iterdir()} <= shown
    assert re.findall(r"<!-- table: (\w+) -->", README) == ["headline", "main_job"]
    results = (DOCS / "results.md").read_text()
    with pytest.raises(ValueError, match=r"0 tables targets_cpu, and bench/results/ops_cpu.json exists"):
        report.rendered(results.replace("<!-- table: targets_cpu -->", ""), report.DETAILS)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match=r"1 tables headline, and bench/results/attack_step_cpu.json is missing"):
        report.rendered(README)


def test_cells_that_were_not_measured_stay_empty(report, monkeypatch, tmp_path):
    result = report.load("ops_cpu.json")
    result["rows"] = [r for r in result["rows"] if (r["size"], r["dtype"]) == ("imagenet", "float32")]
    for row in result["rows"]:
        row["contenders"].pop("torch.compile", None)
    (tmp_path / "ops_cpu.json").write_text(json.dumps(result))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    lines = [line for line in report.per_op("ops_cpu.json").splitlines() if line.startswith("| sign_step-free")]
    assert [cell.strip() for cell in lines[0].strip("|").split("|")].count(report.NONE) == 5


def test_pictures_come_from_the_results():
    for path, make in loaded(ROOT / "bench" / "pictures.py").PICTURES.items():
        assert path.read_text() == make(), f"{path}: run bench/pictures.py"
        assert str(path.relative_to(ROOT)) in README


# ---- names -------------------------------------------------------------------------------------------------------

def test_names_in_the_tables_exist():
    tables = (README, "| attack |", ea), ((DOCS / "api" / "ops.md").read_text(), "| op ", ops)
    for text, head, face in tables:
        cells = re.findall(r"^\| (`[^|]*)\|", text.split(head)[1].split("\n\n")[0], re.M)
        found = [n for cell in cells for n in re.findall(r"`([a-z0-9_]+)`", cell)]
        assert len(found) > 8
        assert [n for n in found if not hasattr(face, n)] == []


def shown_names() -> set[str]:
    """What the API pages have an entry for, a page's `members` too."""
    shown = set()
    for page in DOCS.glob("api/*.md"):
        for path, options in re.findall(r"^::: ([\w.]+)\n((?:    .*\n)*)", page.read_text() + "\n", re.M):
            shown.add(path)
            members = re.search(r"members: \[([^]]*)\]", options)
            shown |= {f"{path}.{name}" for name in re.findall(r"\w+", members[1])} if members else set()
    return shown


def test_every_public_name_has_an_entry():
    shown = shown_names()
    entries = {id(inspect.unwrap(pkgutil.resolve_name(path))) for path in shown if ".compat.art" not in path}
    faces = loaded(DOCS / "site_check.py").FACES
    public = [(face, name) for face in faces for name in importlib.import_module(face).__all__]
    assert len(public) > 150
    missing = [f"{face}.{name}" for face, name in public
               if not isinstance(value := getattr(importlib.import_module(face), name), ModuleType)
               and id(inspect.unwrap(value)) not in entries]
    assert missing == []
    art = ast.parse((ROOT / "ensadv_fast" / "compat" / "art" / "__init__.py").read_text())  # importing it imports ART
    (listed,) = (ast.literal_eval(node.value) for node in art.body
                 if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
    assert [name for name in listed if f"ensadv_fast.compat.art.{name}" not in shown] == []


def test_every_face_with_public_names_is_looked_at():
    faces = {"ensadv_fast", *(f"ensadv_fast.{folder}" for folder in MAY_IMPORT)}
    inner = {"ensadv_fast.bench", "ensadv_fast.cli", "ensadv_fast.report", "ensadv_fast.sources", "ensadv_fast.system"}
    assert faces - inner <= set(loaded(DOCS / "site_check.py").FACES)


# ---- documents ---------------------------------------------------------------------------------------------------

def test_documents_keep_their_lengths():
    pages = {str(page.relative_to(ROOT)) for page in PAGES if "api/" not in str(page)}
    assert pages - GENERATED - {"CHANGELOG.md"} == set(MOST_LINES)
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in MOST_LINES}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES[name]} == {}


def test_prose_lines_stay_short():
    """All but rows of tables and what is generated."""
    for page in PAGES:
        if str(page.relative_to(ROOT)) not in GENERATED:
            text = re.sub(r"<!-- table: (\w+) -->.*?<!-- end: \1 -->", "", page.read_text(), flags=re.S)
            long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
            assert long == [], page


def test_every_rule_names_tests_that_exist():
    lines = (DOCS / "rules.md").read_text().splitlines()
    assert max(map(len, lines)) <= 120
    rules = [line for line in lines if line.startswith("- ")]
    assert len(rules) > 70
    for rule in rules:
        said, tests = re.fullmatch(r"- (.*?\.) (`[^ `]+`(?:, `[^ `]+`)*)", rule).groups()
        for path in re.findall(r"`([^`]+)`", tests):
            assert re.match(r"(tests|csrc|\.ci)/", path), rule
            assert list(ROOT.glob(path.rstrip("/"))), f"{rule}: there is no {path}"


def test_paths_in_documents_exist():
    """What starts like a path of the repository, of the package or of layer 1."""
    roots = [ROOT, ROOT / "ensadv_fast", ROOT / "csrc" / "kernels"]
    for page in set(PAGES) - {ROOT / "CHANGELOG.md"}:
        for path in re.findall(r"`((?:[\w.]+/)+[\w.]*)`", page.read_text()):
            if any((root / path.split("/")[0]).exists() for root in roots) and "NAME" not in path:
                assert any((root / path).exists() for root in roots), f"{page}: {path}"


def test_links_between_documents_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+\.(?:md|svg))(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_the_design_shows_the_import_table():
    text = (DOCS / "design.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", text.split("## Folders of the package")[1], re.M))
    shown = {folder: set() if may == "nothing" else set(may.split(", ")) for folder, may in rows.items()}
    assert shown == MAY_IMPORT


# ---- the site ----------------------------------------------------------------------------------------------------

def test_what_a_page_loads_from_elsewhere_is_found(tmp_path):
    outside = loaded(DOCS / "site_check.py").outside
    (tmp_path / "good.html").write_text('<a href="https://x.org">x</a><script src="a.js"></script><img src="data:,">')
    (tmp_path / "good.css").write_text("a{background:url(b.svg)}")
    assert outside(tmp_path) == []
    bad = ('<script src="https://x.org/a.js">', '<link href="//x.org/a.css" rel=stylesheet>', '<img src="http://x.org/a">',
           '<p style="background:url(https://x.org/a)">', "<style>@import 'https://x.org/a.css'</style>")
    for i, text in enumerate(bad):
        (tmp_path / f"bad{i}.html").write_text(text)
    (tmp_path / "bad.css").write_text("@font-face{src:url('https://x.org/f.woff')}")
    assert len(outside(tmp_path)) == len(bad) + 1


def test_the_site_names_every_document():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert pages | {"index.md", "contributing.md", "changelog.md"} == set(re.findall(r"[\w/]+\.md", nav))
