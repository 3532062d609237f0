"""What csrc/ptx_on_cpu makes of single instructions: tiny programs with known answers."""
import numpy as np
import ptx_on_cpu as ptx
import pytest
from ptx_on_cpu import Fault

pytestmark = pytest.mark.skipif(ptx.NVCC is None, reason="no nvcc here: csrc/ptx_on_cpu is not built")
HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"
REGISTER = {"pred": "pred", "f32": "f32", "f64": "f64"}
NUMPY = {"u8": np.uint8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "b32": np.uint32, "u32": np.uint32,
         "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f32": np.float32, "f64": np.float64}
INF, NAN = np.inf, np.nan


def kernel(body: str, params: str = ".param .u64 a") -> str:
    registers = "".join(f".reg .{t} %{r}<40>;\n" for t, r in (
        ("pred", "p"), ("b16", "h"), ("b32", "r"), ("b64", "d"), ("f32", "f"), ("f64", "g")))
    return f"{HEAD}.visible .entry k({params})\n{{\n{registers}{body}\nret;\n}}\n"


def each(opcode: str, types: str, *inputs, immediates: str = ""):
    """opcode, of one result and its sources, a thread for each number: types "f32 f32 f32", or "pred f32 f32"."""
    out, *sources = types.split()
    kept = "u32" if out == "pred" else out
    arrays = np.broadcast_arrays(*[np.asarray(x) for x in inputs])
    arrays = [np.ascontiguousarray(np.atleast_1d(a).astype(NUMPY[t])) for a, t in zip(arrays, sources)]
    n = len(arrays[0])
    assert n < 256 or n % 256 == 0
    text = [f".reg .{REGISTER.get(out, 'b' + out[1:])} %o; .reg .b64 %at; .reg .b32 %t; mov.u32 %t, %tid.x; "
            "mov.u32 %r0, %ctaid.x; mad.lo.s32 %t, %r0, 256, %t;"]
    for k, t in enumerate(sources):
        size = NUMPY[t](0).nbytes
        text.append(f".reg .{REGISTER.get(t, 'b' + t[1:])} %s{k}; ld.param.u64 %d0, [p{k}]; "
                    f"mul.wide.u32 %d1, %t, {size}; add.s64 %at, %d0, %d1; ld.global.{t} %s{k}, [%at];")
    text.append(f"{opcode} %o, {', '.join(f'%s{k}' for k in range(len(sources)))}{immediates};")
    if out == "pred":
        text.append(".reg .u32 %kept; selp.u32 %kept, 1, 0, %o;")
    text.append(f"ld.param.u64 %d0, [out]; mul.wide.u32 %d1, %t, {NUMPY[kept](0).nbytes}; add.s64 %at, %d0, %d1; "
                f"st.global.{kept} [%at], {'%kept' if out == 'pred' else '%o'};")
    params = ", ".join([f".param .u64 p{k}" for k in range(len(sources))] + [".param .u64 out"])
    module, results = ptx.Module(kernel("\n".join(text), params)), []
    for scatter in (False, True):  # whole warps and parts of them take different ways through the executor
        result = np.zeros(n, NUMPY[kept])
        module.launch("k", (n + 255) // 256, min(n, 256), *arrays, result, scatter=scatter)
        results.append(result)
    assert np.array_equal(results[0].view(np.uint8), results[1].view(np.uint8))
    return results[0]


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


@pytest.mark.parametrize("mode,wanted", [("rn", 1.0), ("rz", 1.0), ("rm", 1.0), ("rp", 1.0 + 2.0 ** -23)])
def test_addition_rounds_as_it_says(mode, wanted):
    assert each(f"add.{mode}.f32", "f32 f32 f32", [1, -1], [2.0 ** -25, -2.0 ** -25]).tolist() == \
        [wanted, -{"rm": 1.0 + 2.0 ** -23, "rp": 1.0}.get(mode, wanted)]


def test_fused_and_separate_products_differ():
    a = np.float32(1 + 2.0 ** -12)
    assert each("fma.rn.f32", "f32 f32 f32 f32", a, a, -(1 + 2.0 ** -11)).tolist() == [2.0 ** -24]
    assert each("mul.rn.f32", "f32 f32 f32", a, a).tolist() == [1 + 2.0 ** -11]


def test_subnormals_are_flushed_where_that_is_said():
    tiny = [1e-40, -1e-40, 1.0]
    assert each("mul.rn.f32", "f32 f32 f32", tiny, 1.0).tolist() == np.float32(tiny).tolist()
    assert bits(each("mul.rn.ftz.f32", "f32 f32 f32", tiny, 1.0)).tolist() == bits([0.0, -0.0, 1.0]).tolist()


def test_saturation():
    assert each("add.rn.sat.f32", "f32 f32 f32", [0.5, 2, -3, NAN], 0.25).tolist() == [0.75, 1, 0, 0]


def test_comparisons_answer_a_nan():
    a, b = [1, 1, 2, NAN, 1, NAN], [2, 1, 1, 1, NAN, NAN]
    for name, wanted in {
            "eq": "010000", "ne": "101000", "lt": "100000", "le": "110000", "gt": "001000", "ge": "011000",
            "equ": "010111", "neu": "101111", "ltu": "100111", "leu": "110111", "gtu": "001111", "geu": "011111",
            "num": "111000", "nan": "000111"}.items():
        for t in ("f32", "f64"):
            assert "".join(map(str, each(f"setp.{name}.{t}", f"pred {t} {t}", a, b))) == wanted, name


def test_signed_and_unsigned_comparisons():
    assert each("setp.lt.s32", "pred s32 s32", [-1, 1], [1, -1]).tolist() == [1, 0]
    most = 2 ** 32 - 1
    assert each("setp.lt.u32", "pred u32 u32", np.uint32([most, 1]), np.uint32([1, most])).tolist() == [0, 1]


@pytest.mark.parametrize("opcode,wanted", [
    ("cvt.rni.s32.f32", [2, 4, -2, -1, 2147483647, -2147483648, 0]),
    ("cvt.rzi.s32.f32", [2, 3, -2, 0, 2147483647, -2147483648, 0]),
    ("cvt.rmi.s32.f32", [2, 3, -3, -1, 2147483647, -2147483648, 0]),
    ("cvt.rpi.s32.f32", [3, 4, -2, 0, 2147483647, -2147483648, 0])])
def test_floats_become_integers(opcode, wanted):
    assert each(opcode, "s32 f32", [2.5, 3.5, -2.5, -0.75, 3e9, -INF, NAN]).tolist() == wanted


def test_conversions_between_integers():
    assert each("cvt.u16.u32", "u16 u32", 0x12345).tolist() == [0x2345]
    assert each("cvt.s64.s32", "s64 s32", -5).tolist() == [-5]
    assert each("cvt.u64.u32", "u64 u32", np.uint32(2 ** 32 - 5)).tolist() == [2 ** 32 - 5]
    assert each("cvt.sat.s16.s32", "s16 s32", [70000, -70000, 3]).tolist() == [32767, -32768, 3]
    assert each("cvt.rn.f32.s64", "f32 s64", 2 ** 40 + 1).tolist() == [2.0 ** 40]
    assert each("cvt.rn.f32.f64", "f32 f64", 1 + 2.0 ** -24).tolist() == [1.0]
    assert each("cvt.rz.f32.f64", "f32 f64", 2 - 2.0 ** -30).tolist() == [2 - 2.0 ** -23]


def floats_of_all_kinds() -> np.ndarray:
    """Numbers of both 16-bit formats, points halfway between them, and their neighbours; random bits."""
    rng = np.random.default_rng(3)
    half = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    bfloat = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)
    middle = (bits(bfloat) + 0x8000).view(np.float32)
    with np.errstate(all="ignore"):
        half_middle = ((half.astype(np.float64) + np.roll(half, -1)) / 2).astype(np.float32)
        near = [np.nextafter(m, np.float32(d)) for m in (middle, half_middle) for d in (-INF, INF)]
    any_bits = rng.integers(0, 2 ** 32, 65536, np.uint32).view(np.float32)
    return np.concatenate([half, bfloat, middle, half_middle, *near, any_bits])


def same(got, wanted, nan_above: int):
    got, wanted = got.astype(np.int64), wanted.astype(np.int64)
    both_nan = ((got & 0x7fff) > nan_above) & ((wanted & 0x7fff) > nan_above)
    assert ((got == wanted) | both_nan).all()


def test_float16_conversions_are_those_of_numpy():
    x = floats_of_all_kinds()
    with np.errstate(all="ignore"):
        same(each("cvt.rn.f16.f32", "b16 f32", x), x.astype(np.float16).view(np.uint16), 0x7c00)
    every = np.arange(65536, dtype=np.uint16)
    got = each("cvt.f32.f16", "f32 b16", every)
    assert np.array_equal(got, every.view(np.float16).astype(np.float32), equal_nan=True)


def test_bfloat16_conversion_is_that_of_torch():
    torch = pytest.importorskip("torch")
    x = floats_of_all_kinds()
    wanted = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    same(each("cvt.rn.bf16.f32", "b16 f32", x), wanted, 0x7f80)


def test_a_pair_is_packed_first_source_up():
    assert each("cvt.rn.f16x2.f32", "b32 f32 f32", 1.0, 2.0).tolist() == [0x3c004000]
    assert each("cvt.rn.bf16x2.f32", "b32 f32 f32", 1.0, 2.0).tolist() == [0x3f804000]


@pytest.mark.parametrize("op", ["add", "sub", "mul"])
def test_pairs_of_float16_round_each_once(op):
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 2 ** 32, 4096, np.uint32) for _ in range(2))
    x, y = (v.view(np.float16).astype(np.float64) for v in (a, b))
    with np.errstate(all="ignore"):
        wanted = {"add": x + y, "sub": x - y, "mul": x * y}[op].astype(np.float16).view(np.uint16)
    same(each(f"{op}.rn.f16x2", "b32 b32 b32", a, b).view(np.uint16), wanted, 0x7c00)


def test_fused_float16_rounds_once():
    one_up = np.float16(1 + 2.0 ** -10).view(np.uint16)  # its square is 1 + 2^-9 + 2^-20
    tie = np.float16(2.0 ** -11 + 2.0 ** -20).view(np.uint16)
    got = each("fma.rn.f16", "b16 b16 b16 b16", one_up, one_up, tie).view(np.float16)
    assert got.tolist() == [np.float16(1 + 2.0 ** -9 + 2.0 ** -10)]  # 2^-11 + 2 * 2^-20 beyond 1 + 2^-9: over the tie
    assert each("mul.rn.f16", "b16 b16 b16", one_up, one_up).view(np.float16).tolist() == [np.float16(1 + 2.0 ** -9)]
    # In bfloat16 1.5 times 1 + 2^-7 is a tie; a term too small for a double beside it decides.
    a, b, tiny = np.uint16(0x3fc0), np.uint16(0x3f81), np.uint16([0x0000, 0x0080, 0x8080])  # 0, 2^-126, -2^-126
    assert each("fma.rn.bf16", "b16 b16 b16 b16", a, b, tiny).tolist() == [0x3fc2, 0x3fc2, 0x3fc1]


def test_smaller_and_larger():
    a, b = [1, NAN, 2, -0.0, 0.0], [2, 1, NAN, 0.0, -0.0]
    assert bits(each("min.f32", "f32 f32 f32", a, b)).tolist() == bits([1, 1, 2, -0.0, -0.0]).tolist()
    assert bits(each("max.f32", "f32 f32 f32", a, b)).tolist() == bits([2, 1, 2, 0.0, 0.0]).tolist()


def test_byte_permutes():
    a, b = 0x33221100, 0x776655f4
    assert each("prmt.b32", "b32 b32 b32 b32", a, b, [0x7210, 0x4444, 0x0123, 0xc8c8]).tolist() == \
        [0x77221100, 0xf4f4f4f4, 0x00112233, 0xff00ff00]


def test_bits_and_shifts():
    assert each("brev.b32", "b32 b32", 1).tolist() == [2 ** 31]
    assert each("bfind.shiftamt.u32", "u32 u32", [1, 0]).tolist() == [31, 2 ** 32 - 1]
    assert each("popc.b32", "u32 b32", 0xf0f0).tolist() == [8]
    assert each("clz.b64", "u32 b64", 1).tolist() == [63]
    assert each("shl.b32", "b32 b32 u32", 1, [31, 32, 33]).tolist() == [2 ** 31, 0, 0]
    assert each("shr.s32", "s32 s32 u32", -8, [1, 40]).tolist() == [-4, -1]
    assert each("bfi.b32", "b32 b32 b32 u32 u32", 0xff, 0, 4, 4).tolist() == [0xf0]
    assert each("bfe.s32", "s32 s32 u32 u32", 0xf0, 4, 4).tolist() == [-1]
    assert each("bfe.u32", "u32 u32 u32 u32", 0xf0, 4, 4).tolist() == [15]
    assert each("shf.l.wrap.b32", "b32 b32 b32 u32", 0x80000000, 1, 1).tolist() == [3]
    assert each("lop3.b32", "b32 b32 b32 b32", 0b1100, 0b1010, 0b0110, immediates=", 0x96").tolist() == [0]


def test_products_of_integers():
    assert each("mul.wide.s32", "s64 s32 s32", -3, 2 ** 31 - 1).tolist() == [-3 * (2 ** 31 - 1)]
    assert each("mul.hi.u32", "u32 u32 u32", 2 ** 31, 6).tolist() == [3]
    assert each("mul.lo.s64", "s64 s64 s64", 2 ** 40, 2 ** 30).tolist() == [0]
    assert each("mad.lo.s32", "s32 s32 s32 s32", 3, -4, 5).tolist() == [-7]
    assert each("div.s32", "s32 s32 s32", [-7, 7], [2, -2]).tolist() == [-3, -3]
    assert each("rem.s64", "s64 s64 s64", -7, 2).tolist() == [-1]
    with pytest.raises(Fault, match="divides by zero"):
        each("div.u32", "u32 u32 u32", 1, 0)


def warp(body: str, n: int = 32, threads: int = 32) -> list[int]:
    """%r1: the lane; %r2: the result that each lane stores."""
    out = np.zeros(n, np.uint32)
    text = f"ld.param.u64 %d0, [a]; mov.u32 %r1, %tid.x; {body} mul.wide.u32 %d1, %r1, 4; add.s64 %d2, %d0, %d1; " \
           "st.global.u32 [%d2], %r2;"
    ptx.Module(kernel(text)).launch("k", 1, threads, out)
    return out.tolist()


def test_shuffles():
    lanes = list(range(32))
    assert warp("shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;") == [k ^ 5 for k in lanes]
    assert warp("shfl.sync.down.b32 %r2, %r1, 4, 31, -1;") == [min(k + 4, 31) if k < 28 else k for k in lanes]
    assert warp("shfl.sync.up.b32 %r2, %r1, 4, 0, -1;") == [k - 4 if k >= 4 else k for k in lanes]
    assert warp("shfl.sync.idx.b32 %r2|%p1, %r1, 3, 31, -1;") == [3] * 32
    # Segments of eight: the upper bits of the last but one operand keep lanes to theirs.
    assert warp("shfl.sync.down.b32 %r2, %r1, 4, 0x181f, -1;") == [k + 4 if k % 8 < 4 else k for k in lanes]


def test_votes():
    assert warp("setp.lt.u32 %p1, %r1, 3; vote.sync.ballot.b32 %r2, %p1, -1;") == [7] * 32
    assert warp("setp.lt.u32 %p1, %r1, 3; vote.sync.all.pred %p2, %p1, -1; selp.u32 %r2, 1, 0, %p2;") == [0] * 32


def test_guards_and_branches():
    assert warp("mov.u32 %r2, 7; setp.lt.u32 %p1, %r1, 2; @%p1 mov.u32 %r2, 1; @!%p1 add.s32 %r2, %r2, %r1; "
                "setp.eq.u32 %p2, %r1, 5; @%p2 bra L1; bra.uni L2; L1: mov.u32 %r2, 99; L2:") == \
        [1, 1, 9, 10, 11, 99] + [7 + k for k in range(6, 32)]


def test_pairs_of_registers():
    assert warp("mov.u32 %r3, 0x00050007; mov.b32 {%h1, %h2}, %r3; mov.b32 %r2, {%h2, %h1};")[0] == 0x00070005
    assert warp("mov.u64 %d3, 0x0000000500000007; mov.b64 {_, %r2}, %d3;")[0] == 5


def test_local_memory():
    body = ".local .align 8 .b8 mine[16]; mov.u64 %d5, mine; cvta.local.u64 %d6, %d5; st.u32 [%d6+4], %r1; " \
           "ld.local.u32 %r2, [mine+4];"
    assert warp(body) == list(range(32))


@pytest.mark.parametrize("body", [
    "add.f32 %f1, %f1, %f2;",  # ptxas may fuse it: nobody knows its result
    "ex2.approx.f32 %f1, %f1;", "add.rn.relu.f32 %f1, %f1, %f2;", "ld.global.cs.f32 %f1, [%d1];",
    "atom.global.add.u32 %r1, [%d1], 1;", "bar.sync 1;", "mov.u32 %r1, %clock;", "add.s32 %r1, %r2;",
    "add.s32 %r1, %d1, 1;", "mul.rn.f32 %f1, %f2, 1;", "bra nowhere;"])
def test_what_is_not_known_is_an_error(body):
    with pytest.raises(Fault):
        ptx.Module(kernel(body))
