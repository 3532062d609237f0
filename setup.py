"""Builds ensadv_fast/_C: one extension against torch's stable ABI, with CUDA kernels if there is an nvcc.

Environment: ENSADV_CUDA=0|1|auto (without CUDA, with it or fail, or as found; default auto), TORCH_CUDA_ARCH_LIST.
"""
import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
ABI_TARGET = "0x020a000000000000"  # torch 2.10, the oldest release this extension runs on


def find_cuda():
    """(toolkit root, version) or None. nvcc on the PATH may be a wrapper script, so nvcc itself names its root."""
    wanted = os.environ.get("ENSADV_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"setup.py: ENSADV_CUDA must be 0, 1 or auto, got {wanted!r}")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if wanted == "0" or nvcc is None:
        if wanted == "1":
            raise SystemExit("setup.py: ENSADV_CUDA=1, but no nvcc in CUDA_HOME/bin or on the PATH")
        print(f"ensadv_fast: building WITHOUT CUDA kernels ({'ENSADV_CUDA=0' if wanted == '0' else 'no nvcc'})")
        return None
    told = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
    top = re.search(r"TOP=(\S+)", told.stderr + told.stdout)
    root = Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parent.parent
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+\.\d+)", text).group(1)
    print(f"ensadv_fast: building with CUDA {version} kernels (toolkit {root})")
    return root, version


def commit():
    """The git commit, with a mark if the tree is not clean; 'unknown' outside a checkout."""
    run = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"], cwd=ROOT,
                         capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else "unknown"


def extension():
    cuda = find_cuda()
    archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    sources = sorted([*ROOT.glob("csrc/ops/*.cpp"), *ROOT.glob("csrc/kernels/cpu/*.cpp")])
    cxx = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
           "-fno-trapping-math", "-fno-wrapv", "-Wall", f"-DTORCH_TARGET_VERSION={ABI_TARGET}",
           f'-DENSADV_COMMIT="{commit()}"', f'-DENSADV_CUDA_VERSION="{cuda[1] if cuda else "none"}"',
           f'-DENSADV_CUDA_ARCHS="{archs.replace(";", " ") if cuda else "none"}"']
    link = {}
    if cuda:
        cpp_extension.CUDA_HOME = str(cuda[0])  # None with a CPU-only torch, even where nvcc stands
        sources += sorted(ROOT.glob("csrc/kernels/cuda/*.cu"))
        cxx.append("-DENSADV_WITH_CUDA")
        lib = next(p for p in (cuda[0] / "lib64", cuda[0] / "lib", cuda[0] / "targets/x86_64-linux/lib") if p.exists())
        link = {"library_dirs": [str(lib)], "libraries": ["cudart_static", "dl", "rt", "pthread"]}
    ext = cpp_extension.CppExtension(
        "ensadv_fast._C", [str(p.relative_to(ROOT)) for p in sources], py_limited_api=True,
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-fmad=false", "-Xcompiler", "-fvisibility=hidden"]},
        extra_link_args=["-s", "-Wl,--no-as-needed", "-ltorch"],
        depends=[str(p) for pattern in ("**/*.h", "**/*.cuh") for p in ROOT.glob(f"csrc/{pattern}")])
    for key, values in link.items():
        getattr(ext, key).extend(values)
    # Symbols resolve in the torch that was imported. libtorch must stay linked although no symbol is taken from it: it
    # brings libtorch_cuda into scope, if there is one, and with it the current CUDA stream.
    ext.libraries = [name for name in ext.libraries if name not in ("c10", "torch")]
    return ext


setup(ext_modules=[extension()], cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
      options={"bdist_wheel": {"py_limited_api": "cp310"}})
