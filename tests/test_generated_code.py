"""What nvcc makes of the kernels: 16-byte loads and stores in the PTX, and no spills or stack by ptxas -v."""
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCES = {path.stem: path for path in (Path(__file__).parent.parent / "csrc/kernels/cuda").glob("*.cu")}
# Files that hold no loop over a batch of images; every other kernel must move memory in 16-byte words.
NOT_OVER_IMAGES = {"launch", "sample_eps", "split_key"}
MATRIX = {"ensemble_linear"}  # matrix products: their operands are copied to shared memory without passing a register
ARCHS = ("80", "90")

HOME = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
NVCC = shutil.which("nvcc", path=f"{HOME}/bin" if HOME else None)
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc here: there is no generated code to look at")


@dataclass
class Compiled:
    ptx: dict[tuple[str, str], str]  # (architecture, mangled kernel name): its body
    resources: dict[tuple[str, str], str]  # the same: ptxas -v's line on stack and spills


def compile_kernels(source: Path, folder: Path) -> Compiled:
    """With setup.py's flags, for each architecture it builds for."""
    folder.mkdir()
    gencode = [f"-gencode=arch=compute_{a},code=[sm_{a},compute_{a}]" for a in ARCHS]
    command = [NVCC, "-O3", "-fmad=false", "-std=c++20", *gencode, "-Xptxas", "-v", "--keep", "--keep-dir", folder,
               "-c", source, "-o", folder / "out.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ptx = {}
    for arch in ARCHS:
        text = (folder / f"{source.stem}.compute_{arch}.ptx").read_text()
        for entry in re.finditer(r"\.entry\s+(\w+)\(.*?^}", text, re.S | re.M):
            ptx[arch, entry[1]] = entry[0]
    report = r"Compiling entry function '(\w+)' for 'sm_(\d+)'\n.*Function properties for \1\n\s*(.+)"
    resources = {(m[2], m[1]): m[3] for m in re.finditer(report, done.stderr + done.stdout)}
    assert ptx.keys() == resources.keys(), "PTX and ptxas -v disagree on which kernels there are"
    return Compiled(ptx, resources)


def wide_moves(body: str, what: str) -> int:
    """16-byte global loads ("ld") or stores ("st") in a kernel's PTX."""
    copies = re.findall(r"\bcp\.async\.cg\.shared\.global \[\S+\], \[\S+\], 16\b", body) if what == "ld" else []
    return len(copies + re.findall(rf"\b{what}\.global(?:\.\w+)*?\.(?:v4\.[fbsu]32|v2\.[fbsu]64)\b", body))


def spills(resources: str) -> bool:
    return resources != "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"


def moves_wanted(kernel: str) -> tuple[int, int]:
    """Image-sized tensors that a kernel reads and writes: as many 16-byte loads and stores at least. A gradient is
    read by a branch for each dtype that it may have."""
    ball = int("Lb1E" in kernel)  # the last template argument: is there a center, or a residual?
    grads = 1 if "kernelId" in kernel else 3  # float64 goes with float64 alone
    if "_sums_kernel" in kernel:  # one number per block is written
        return grads, 0
    if "momentum_step_kernel" in kernel:  # x, grad, momentum; momentum, out
        return 2 + grads + ball, 2
    if "sign_step_kernel" in kernel or "l2_step_kernel" in kernel:  # x, grad; out
        return 1 + grads + ball, 1
    if "bias_act_kernel" in kernel:  # x, and the residual where there is one; out
        return 1 + ball, 1
    return 1, 1


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Compiled]:
    folder = tmp_path_factory.mktemp("nvcc")
    with ThreadPoolExecutor(2) as pool:
        jobs = {name: pool.submit(compile_kernels, path, folder / name) for name, path in SOURCES.items()}
        return {name: job.result() for name, job in jobs.items()}


@pytest.mark.parametrize("op", sorted(SOURCES.keys() - NOT_OVER_IMAGES))
def test_memory_moves_in_16_byte_words(compiled, op):
    assert compiled[op].ptx, f"{op}.cu holds no kernel"
    for (arch, kernel), body in compiled[op].ptx.items():
        found, wanted = (wide_moves(body, "ld"), wide_moves(body, "st")), moves_wanted(kernel)
        assert found[0] >= wanted[0] and found[1] >= wanted[1], \
            f"sm_{arch} {kernel}: {found} 16-byte loads and stores, wanted {wanted}"


@pytest.mark.parametrize("op", sorted(SOURCES.keys()))
def test_the_ptx_is_the_same_for_every_architecture(compiled, op):
    """So that executing one (csrc/ptx_on_cpu) is executing all."""
    ptx = compiled[op].ptx
    for arch, kernel in ptx:
        assert ptx[arch, kernel] == ptx[ARCHS[0], kernel], f"sm_{arch} {kernel}"


@pytest.mark.parametrize("op", sorted(MATRIX))
def test_products_of_16_bit_numbers_use_the_tensor_cores(compiled, op):
    """And those of float32 do not: they would be TF32's."""
    products = {key: body for key, body in compiled[op].ptx.items() if "BlockTile" in key[1]}
    assert len(products) == 10 * len(ARCHS)
    for (arch, kernel), body in products.items():
        narrow = "half_t" in kernel or "bfloat_t" in kernel
        found = [bool(re.search(rf"\b{re.escape(name)}\b", body)) for name in (
            "mma.sync.aligned.m16n8k16.row.col.f32", "ldmatrix.sync.aligned.m8n8.x4", "fma.rn.f32",
            "cp.async.wait_group")]
        assert found == [narrow, narrow, not narrow, True], f"sm_{arch} {kernel}"


@pytest.mark.parametrize("op", sorted(SOURCES.keys()))
def test_no_spills_and_no_stack(compiled, op):
    for (arch, kernel), resources in compiled[op].resources.items():
        assert not spills(resources), f"sm_{arch} {kernel}: {resources}"


def test_these_checks_can_fail(tmp_path):
    """A kernel that moves single floats, and one whose array is indexed at run time and so lives on the stack."""
    source = tmp_path / "bad.cu"
    source.write_text("""
        __global__ void scalar(const float* x, float* out) { out[threadIdx.x] = x[threadIdx.x]; }
        __global__ void stack(const float4* x, float4* out, const int* where) {
            float values[32];
            for (int i = 0; i < 32; ++i) values[where[i]] = x[i].x + x[i].y + x[i].z + x[i].w;
            out[threadIdx.x] = make_float4(values[where[32]], values[where[33]], 0, 0);
        }""")
    bad = compile_kernels(source, tmp_path / "out")
    assert len(bad.ptx) == 2 * len(ARCHS)
    for (arch, kernel), body in bad.ptx.items():
        scalar = "scalar" in kernel
        assert (wide_moves(body, "ld") == 0) == scalar and (wide_moves(body, "st") == 0) == scalar
        assert spills(bad.resources[arch, kernel]) == (not scalar)
