"""The written rules that can be read off the tree and the built extension (docs/rules.md)."""
import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "ensadv_fast"
OPS = sorted(path.stem for path in (CSRC / "ops").glob("*.cpp") if path.stem != "build_info")
# Where an op's Python half is not called as the op: (module, public name).
PYTHON = {"split_key": ("keys", "split")}
COMPOSED = {"project"}  # public ops that call other ops and have no kernel of their own


def run(*command, cwd=ROOT) -> str:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


# ---- layers ------------------------------------------------------------------------------------------------------

def includes(folder: str) -> list[tuple[Path, str]]:
    """(file, what it includes): a path from csrc/ for our own headers, <name> for others."""
    found = []
    for path in sorted((CSRC / folder).rglob("*.*")):
        for quote, name in re.findall(r'^\s*#\s*include\s+(["<])([^">]+)', path.read_text(), re.M):
            own = quote == '"'
            found.append((path, str((path.parent / name).resolve().relative_to(CSRC)) if own else f"<{name}>"))
    return found


STANDARD = r"<[a-z_]+>"  # of the C++ library: no directory, no extension
ALLOWED = {
    "kernels": [STANDARD, r"<(immintrin|cpuid)\.h>", r"<cuda_\w+\.h>", r"kernels/.*"],
    "ops": [STANDARD, r"<torch/csrc/stable/.*>", r"<torch/headeronly/.*>",
            r"<torch/csrc/inductor/aoti_torch/c/shim\.h>", r"kernels/[^/]*\.h", r"kernels/cuda/launch\.h", r"ops/.*"],
    "numpy": [STANDARD, r"<pybind11/.*>", r"kernels/.*", r"numpy/.*"],
    "selftest": [STANDARD, r"<cuda_runtime\.h>", r"<sys/mman\.h>", r"kernels/.*", r"selftest/.*"],
}


@pytest.mark.parametrize("folder", ALLOWED)
def test_layers_include_downward_only(folder):
    found = includes(folder)
    assert found
    for path, name in found:
        assert any(re.fullmatch(pattern, name) for pattern in ALLOWED[folder]), f"{path} includes {name}"


def test_every_source_folder_has_its_rule():
    assert {path.name for path in CSRC.iterdir()} == set(ALLOWED)


def test_one_file_knows_the_processor():
    """Intrinsics, and questions to the processor, stand in cpu/x86.h alone; platform.h marks the loops' clones."""
    words = r"immintrin\.h|cpuid\.h|__builtin_cpu|__(x86_64|SSE\w*|AVX\w*|aarch64|ARM\w*)__|\btarget(_clones)?\("
    found = {str(path.relative_to(CSRC)) for path in CSRC.rglob("*.*") if re.search(words, path.read_text())}
    assert found == {"kernels/cpu/x86.h", "kernels/platform.h"}


def imports(path: Path) -> set[str]:
    """Modules of the package that a module imports, at its top or inside functions: "ops.keys", "source"...

    Not counted: a module's own package, and what only type checkers see."""
    here = list(path.relative_to(PACKAGE).with_suffix("").parts)
    package = here[:-1]
    tree = ast.parse(path.read_text())
    unseen = {node for top in ast.walk(tree) if isinstance(top, ast.If) and "TYPE_CHECKING" in ast.unparse(top.test)
              for node in ast.walk(top)}
    found = set()
    for node in set(ast.walk(tree)) - unseen:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)] + (node.module or "").split(".") * bool(node.module)
            found |= {".".join([*base, alias.name]) for alias in node.names}
            found |= {".".join(base)} if base != package else set()
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ensadv_fast":
            found |= {".".join([*node.module.split(".")[1:], alias.name]) for alias in node.names}
    modules = {".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py")}
    packages = {name.removesuffix(".__init__"): name for name in modules if name.endswith(".__init__")}
    return {packages.get(name, name) for name in found} & modules - {".".join(here)}


def test_ops_import_nothing_above_them():
    for path in (PACKAGE / "ops").glob("*.py"):
        above = {name for name in imports(path) if not name.startswith("ops")}
        assert not above, f"{path} imports {above}"


def test_python_modules_have_a_direction():
    """No cycle among the package's imports (graphlib raises CycleError, which names it)."""
    graph = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): imports(path)
             for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("ops.__init__") < order.index("source") < order.index("attacks") < order.index("adversary")


def test_an_installed_package_has_every_folder():
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    there = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "ensadv_fast").rglob("__init__.py")}
    assert set(re.findall(r'"([\w.]+)"', listed)) == there


def test_optional_packages_are_not_imported():
    """Neither importing the package nor any of its modules asks for what it can do without; compat/art's classes are
    ART's, so it alone asks for ART."""
    code = """if True:
        import importlib, pathlib, sys
        import torch
        class Watch:
            def find_spec(self, name, *_):
                assert name.split(".")[0] not in (
                    "torchvision", "timm", "PIL", "torchattacks", "autoattack", "pyautoattack", "foolbox", "eagerpy",
                    "cleverhans", "art", "tensorboard"), name
        sys.meta_path.insert(0, Watch())
        import ensadv_fast
        root = pathlib.Path(ensadv_fast.__file__).parent
        for path in sorted(root.rglob("*.py")):
            module = ".".join(("ensadv_fast", *path.relative_to(root).with_suffix("").parts))
            if not module.endswith("__main__") and ".compat.art" not in module:
                importlib.import_module(module.removesuffix(".__init__"))"""
    run(sys.executable, "-W", "error", "-c", code)


# ---- sizes of C++ files and functions ------------------------------------------------------------------------------

SOURCES = sorted(path for path in CSRC.rglob("*.*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))
NO_CODE = re.compile(r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])+'|^[ \t]*\#(?:\\\n|[^\n])*""",
                     re.S | re.M)
SCOPE = re.compile(r"(template\s*<.*>\s*)?(namespace|struct|class|enum)\b(?!.*\()|extern\b", re.S)


def functions(source: str) -> list[tuple[int, int]]:
    """First and last line of every function, from its `template` on: a body in braces with a parenthesis before it, in
    a namespace or class. What macros expand to is not seen."""
    text = NO_CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), source)
    found, start = [], 0
    scopes = []  # for each open brace: is it a namespace's or class's, and where its function begins, if it is one's
    for i in (match.start() for match in re.finditer(r"[{};]", text)):
        header = text[start:i]
        if text[i] == "{":
            scope = bool(SCOPE.match(header.strip()))
            outermost = not scope and "(" in header and all(outer for outer, _ in scopes)
            scopes.append((scope, start + len(header) - len(header.lstrip()) if outermost else None))
        elif text[i] == "}":
            _, first = scopes.pop()
            if first is not None:
                found.append((text.count("\n", 0, first) + 1, text.count("\n", 0, i) + 1))
        start = i + 1
    return found


def test_functions_are_found():
    source = """
        namespace a {
        struct B {
          B(int n) : n_(n) { n = 0; }  // one line {
          int n_ = 0, list[2] = {1, 2};
        };
        #define MACRO(T) \\
          void never(T) { \\
          }
        template <class T>
        T two(T t) {
          if (t) {
            return [&] { return "}" + t; }();
          }
        }
        }"""
    assert functions(source) == [(4, 4), (10, 15)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_cpp_files_and_functions_are_short(path):
    source = path.read_text()
    lines = source.splitlines()
    assert len(lines) <= 350 and max(map(len, lines)) <= 120
    too_long = [f"{last - first + 1} lines from line {first} on" for first, last in functions(source)
                if last - first + 1 > 40]
    assert too_long == []


# ---- ops ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_six_places(op):
    module, public = PYTHON.get(op, (op, op))
    places = [CSRC / f"kernels/{op}.h", CSRC / f"kernels/cpu/{op}.cpp", CSRC / f"kernels/cuda/{op}.cu",
              PACKAGE / f"ops/{module}.py"]
    assert [str(p) for p in places if not p.exists()] == []
    python = places[-1].read_text()
    assert f'register_fake("{op}")' in python
    assert re.search(r"^def (\w+_)?reference\(", python, re.M)
    from ensadv_fast import ops
    from ensadv_fast.testing import CASES
    assert getattr(ops, public).__doc__
    assert [case for case in CASES if case.op == op], f"{op} has no OpCase in ensadv_fast/testing.py"


def test_every_case_is_of_an_op():
    from ensadv_fast.testing import CASES
    assert {case.op for case in CASES} - COMPOSED == set(OPS)


# ---- the built extension -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def extension() -> Path:
    folder = Path(importlib.util.find_spec("ensadv_fast").origin).parent
    (path,) = folder.glob("_C*.so")
    return path


def symbols(extension: Path, *options: str) -> list[tuple[str, str]]:
    """(type letter, name without its version)."""
    if shutil.which("nm") is None:
        pytest.skip("no nm here (binutils)")
    lines = run("nm", "-D", *options, extension).splitlines()
    return [(line.split()[-2], line.split()[-1].split("@")[0]) for line in lines]


def test_only_the_build_info_is_exported(extension):
    """Besides it: weak or unique parts of the C++ library, and the marks some linkers set at a segment's end."""
    marks = {"__bss_start", "_edata", "_end", "_init", "_fini"}
    names = {name for kind, name in symbols(extension, "--defined-only")
             if not (kind in "WVu" and re.match(r"_ZN?[A-Z]*K?(St|9__gnu_cxx)", name)) and name not in marks}
    assert names == {"ensadv_build_info"}


def test_the_extension_asks_for_the_stable_abi_alone(extension):
    """No symbol of Python (one file serves every version), and of torch only its C functions."""
    undefined = [name for _, name in symbols(extension, "--undefined-only")]
    assert [n for n in undefined if re.match(r"_?Py[A-Z_]", n)] == []
    assert [n for n in undefined if re.search(r"(^|[0-9])(c10|2at|5torch)[0-9]", n)] == []
    assert [n for n in undefined if n.startswith(("aoti_torch_", "torch_"))]


def test_the_extension_links_libtorch_and_no_cuda(extension):
    if shutil.which("readelf") is None:
        pytest.skip("no readelf here (binutils)")
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-d", extension)))
    assert "libtorch.so" in needed
    assert not [n for n in needed if re.match(r"lib(cuda|cudart|c10|python|torch_python|torch_cuda)\b", n)]


# ---- the build ---------------------------------------------------------------------------------------------------

BUILD_FILES = [ROOT / "setup.py", ROOT / "CMakeLists.txt", ROOT / "CMakePresets.json", ROOT / "pyproject.toml"]


@pytest.mark.parametrize("flag", ["-march=native", "-mtune=native", "use_fast_math", "-ffast-math", "-Ofast"])
def test_no_flag_that_ties_to_a_machine_or_breaks_the_numbers(flag):
    for path in [*BUILD_FILES, *(p for p in CSRC.rglob("*.*"))]:
        assert flag not in path.read_text(), f"{path} has {flag}"


def test_both_builds_share_the_floating_point_flags():
    """What the tests of layer 1 and the self-test find holds for the package only where both are built alike."""
    def flags(name):
        found = set(re.findall(r"(?<![\w-])-(?:O\d|f[a-z][a-z=-]*[a-z])", (ROOT / name).read_text()))
        return {flag for flag in found if not re.match(r"-f(visibility|sanitize|no-sanitize|no-omit)", flag)}
    assert {"-O3", "-ffp-contract=off", "-fmad=false"} <= flags("setup.py") == flags("CMakeLists.txt")


def test_setup_stays_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 100


def test_build_products_are_not_in_git():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    products = ["ensadv_fast/_C.abi3.so", "build/x", "runs/x", "ensadv_fast.egg-info/x", "dist/x"]
    assert run("git", "check-ignore", *products).split() == products
    assert run("git", "ls-files", "--", "*.so", "*.o", "*.a", "build", "runs") == ""
