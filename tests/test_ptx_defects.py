"""Defects planted in the PTX of real kernels, and in tiny programs, are found by csrc/ptx_on_cpu; without them it finds
nothing, and the results are right."""
import ctypes
import re

import numpy as np
import ptx_on_cpu as ptx
import pytest
from ptx_on_cpu import Fault
from test_ptx_instructions import kernel

pytestmark = pytest.mark.skipif(ptx.NVCC is None, reason="no nvcc here: there is no PTX to plant defects in")
KERNELS = ptx.ROOT / "csrc/kernels/cuda"


SMALL_HALF = ("linear_kernel", "half_tELi64", "Lb0E")  # the small tile, b not turned


class Tensor(ctypes.Structure):  # In and Out of tensor_ref.h
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32)]


class NullArgs(ctypes.Structure):
    _fields_ = [("x", Tensor), ("out", Tensor), ("numel", ctypes.c_int64), ("inner", ctypes.c_int64)]


class Problem(ctypes.Structure):  # of ensemble_linear.cu
    _fields_ = [("a", Tensor), ("b", Tensor), ("bias", Tensor), ("out", Tensor), ("keep", ctypes.c_void_p),
                ("mask", ctypes.c_void_p), ("members", ctypes.c_int64), ("batch", ctypes.c_int32),
                ("inner", ctypes.c_int32), ("cols", ctypes.c_int32), ("shared", ctypes.c_bool),
                ("turned", ctypes.c_bool), ("reduce", ctypes.c_bool), ("a_width", ctypes.c_int32),
                ("b_width", ctypes.c_int32), ("aligned", ctypes.c_bool)]


def entry(text: str, *parts: str) -> str:
    (name,) = [n for n in re.findall(r"\.entry (\w+)\(", text) if all(p in n for p in parts)]
    return name


def mutated(text: str, name: str, pattern: str, replacement: str, count: int = 1) -> str:
    """The text with so many places of one entry changed."""
    start = text.index(f".entry {name}(")
    end = text.index("\n}\n", start)
    body, changed = re.subn(pattern, replacement, text[start:end], count=count)
    assert changed
    return text[:start] + body + text[end:]


def with_buffers(call, *arrays):
    for a in arrays:
        ptx.library().ptx_add_buffer(a.ctypes.data, a.nbytes)
    try:
        call()
    finally:
        for a in arrays:
            ptx.library().ptx_remove_buffer(a.ctypes.data)


@pytest.fixture(scope="module")
def null_text():
    return ptx.ptx_of(KERNELS / "null.cu")


def run_null(text: str, n: int, lead: int = 0, aligned: bool = True) -> bool:
    """Whether out is x then. `lead`: elements that x lies beyond an aligned address."""
    name = entry(text, "null_kernelIfE")
    room = np.arange(n + 8, dtype=np.float32)
    first = (-room.ctypes.data % 16) // 4 + lead
    x, out = room[first:first + n], np.zeros(n + 4, np.float32)
    out = out[(-out.ctypes.data % 16) // 4:][:n]
    args = NullArgs(Tensor(x.ctypes.data, 0), Tensor(out.ctypes.data, 0), n, n)
    with_buffers(lambda: ptx.Module(text).launch(name, 2, 256, args, np.uint8(aligned)), x, out)
    return bool((x == out).all())


@pytest.mark.parametrize("n", [1, 7, 8, 9, 300, 5000])
def test_the_plain_kernel_is_right(null_text, n):
    assert run_null(null_text, n) and run_null(null_text, n, lead=1, aligned=False)


def test_an_off_by_one(null_text):
    """Elements of a short pack are read while j < count + 1."""
    name = entry(null_text, "null_kernelIfE")
    text = mutated(null_text, name, r"(setp\.lt\.s32 \t%p\d+, %r\d+), 4;", r"\1, 3;", 0)
    with pytest.raises(Fault, match="outside of every buffer"):
        run_null(text, 3)


def test_a_misaligned_load(null_text):
    with pytest.raises(Fault, match=r"ld\.global\.v4\.u32.*is misaligned"):
        run_null(null_text, 64, lead=1, aligned=True)
    text = mutated(null_text, entry(null_text, "null_kernelIfE"), r"(ld\.global\.v4\.u32 .*)\+16\]", r"\1+12]")
    with pytest.raises(Fault, match="is misaligned"):
        run_null(text, 64)


SUMS = """
#include "{reduce}"
using namespace ensadv;
extern "C" __global__ void sums(const float* x, double* out) {{
  double slots[kSlotPack];
  for (int j = 0; j < kSlotPack; ++j) slots[j] = x[threadIdx.x * kSlotPack + j];
  const double sum = fold_block(slots);
  if (threadIdx.x == 0) out[0] = sum;
}}
"""


@pytest.fixture(scope="module")
def sums_text(tmp_path_factory):
    source = tmp_path_factory.mktemp("sums") / "sums.cu"
    source.write_text(SUMS.format(reduce=KERNELS / "reduce.cuh"))
    return ptx.ptx_of(source)


def run_sums(text: str, seed: int = 1) -> float:
    x, out = np.arange(2048, dtype=np.float32), np.zeros(1)
    ptx.Module(text).launch("sums", 1, 256, x, out, seed=seed)
    return out[0]


def test_a_missing_barrier(sums_text):
    assert run_sums(sums_text) == 2047 * 1024
    text = mutated(sums_text, "sums", r"bar\.sync \t0;", "")
    for seed in range(8):  # whichever warp comes first
        with pytest.raises(Fault, match="race|nobody wrote"):
            run_sums(text, seed)


@pytest.fixture(scope="module")
def linear_text():
    return ptx.ptx_of(KERNELS / "ensemble_linear.cu")


def run_linear(text: str) -> tuple[np.ndarray, np.ndarray]:
    """out and what it should be, of small integers in float16: their sums are exact."""
    members, batch, cols, inner = 2, 70, 72, 160
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-3, 4, (members, rows, inner)).astype(np.float16) for rows in (batch, cols))
    wanted = (a.astype(np.float32) @ b.astype(np.float32).transpose(0, 2, 1)).astype(np.float16)
    room = [np.zeros(v.size + 8, np.float16) for v in (a, b, wanted)]
    x, w, out = (r[(-r.ctypes.data % 16) // 2:][:v.size] for r, v in zip(room, (a, b, wanted)))
    x[:], w[:] = a.ravel(), b.ravel()
    tensors = [Tensor(v.ctypes.data if v is not None else None, 1) for v in (x, w, None, out)]
    args = Problem(*tensors, None, None, members, batch, inner, cols, False, False, False, 16, 16, True)
    name = entry(text, *SMALL_HALF)
    with_buffers(lambda: ptx.Module(text).launch(name, (2, 2, members), 128, args, shared=65536), x, w, out)
    return out, wanted.ravel()


def test_the_tensor_core_path_is_right(linear_text):
    got, wanted = run_linear(linear_text)
    assert np.array_equal(got, wanted) and np.abs(got).max() > 50


@pytest.mark.parametrize("pattern,replacement", [
    (r"(mma\.sync\S+ \{[^}]*\},\s*\{[^}]*\},\s*)\{(%r\d+), ?(%r\d+)\}", r"\1{\3, \2}"),  # b's halves
    (r"(ldmatrix\.sync\S+ )\{(%r\d+), (%r\d+),", r"\1{\3, \2,"),  # two of ldmatrix's matrices
])
def test_a_wrong_lane_of_mma(linear_text, pattern, replacement):
    name = entry(linear_text, *SMALL_HALF)
    got, wanted = run_linear(mutated(linear_text, name, pattern, replacement))
    assert not np.array_equal(got, wanted)


def test_a_copy_that_is_not_waited_for(linear_text):
    name = entry(linear_text, *SMALL_HALF)
    with pytest.raises(Fault, match="asynchronous copy is still to fill|nobody wrote"):
        run_linear(mutated(linear_text, name, r"cp\.async\.wait_group \d;", "", 0))


def test_a_barrier_too_few_in_the_pipeline(linear_text):
    name = entry(linear_text, *SMALL_HALF)
    with pytest.raises(Fault, match="race|nobody wrote|still to fill"):
        run_linear(mutated(linear_text, name, r"bar\.sync \t0;", ""))


SHARED = ".shared .align 4 .b8 room[256]; mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; mov.u32 %r3, room; " \
         "add.s32 %r4, %r3, %r2; "


@pytest.mark.parametrize("body,threads,what", [
    (SHARED + "ld.shared.u32 %r5, [%r4];", 32, "nobody wrote"),
    (SHARED + "ld.shared.u32 %r5, [%r4+256];", 32, "outside of shared memory"),
    (SHARED + "st.shared.u32 [%r3], %r1;", 32, "race"),
    (SHARED + "st.shared.u32 [%r4], %r1; xor.b32 %r6, %r2, 4; add.s32 %r6, %r3, %r6; ld.shared.u32 %r5, [%r6];", 32,
     "race|nobody wrote"),
    (SHARED + "st.shared.u32 [%r4], %r1; bar.warp.sync -1; xor.b32 %r6, %r2, 128; add.s32 %r6, %r3, %r6; "
     "ld.shared.u32 %r5, [%r6];", 64, "race|nobody wrote"),  # of another warp
    (SHARED + "setp.lt.u32 %p1, %r1, 32; @%p1 bra L; bar.sync 0; bra.uni E; L: bar.sync 0; E:", 64,
     "divergent barrier"),
    (SHARED + "setp.lt.u32 %p1, %r1, 32; @%p1 bra E; bar.sync 0; E:", 64, "divergent barrier"),
    (SHARED + "setp.lt.u32 %p1, %r1, 7; @%p1 bra L; bar.sync 0; bra.uni E; L: bar.sync 0; E:", 32, "divergent"),
    (SHARED + "setp.lt.u32 %p1, %r1, 7; @%p1 bra L; shfl.sync.idx.b32 %r5, %r1, 0, 31, -1; L: bar.warp.sync -1;", 32,
     "divergent|never come"),
    ("trap;", 32, "trap"),
    ("mov.u64 %d1, 64; ld.global.u32 %r1, [%d1];", 32, "outside of every buffer"),
])
def test_wrong_programs_are_found(body, threads, what):
    for scatter in (False, True):
        with pytest.raises(Fault, match=what):
            ptx.Module(kernel(body)).launch("k", 1, threads, np.zeros(1), scatter=scatter)


def test_right_programs_are_not():
    """Neighbours' words after bar.warp.sync, other warps' after bar.sync, in any order."""
    body = SHARED + "st.shared.u32 [%r4], %r1; bar.warp.sync -1; xor.b32 %r6, %r2, 4; add.s32 %r6, %r3, %r6; " \
        "ld.shared.u32 %r5, [%r6]; bar.sync 0; xor.b32 %r6, %r2, 128; add.s32 %r6, %r3, %r6; " \
        "ld.shared.u32 %r7, [%r6]; bar.sync 0; st.shared.u32 [%r6], %r5; ld.param.u64 %d0, [a]; " \
        "mul.wide.u32 %d1, %r1, 4; add.s64 %d2, %d0, %d1; add.s32 %r7, %r7, %r5; st.global.u32 [%d2], %r7;"
    for seed in range(10):
        out = np.zeros(64, np.uint32)
        ptx.Module(kernel(body)).launch("k", 1, 64, out, seed=seed, scatter=seed % 2 == 1)
        assert out.tolist() == [(k ^ 32) + (k ^ 1) for k in range(64)]
