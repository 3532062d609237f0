"""What the tests of layer 1 share: numbers by definition, arrays at any address, batches of them, and the module."""
import os
from functools import cache
from types import SimpleNamespace

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from kernels_build import load

kernels = load()

examples = settings(deadline=None, derandomize=True, max_examples=int(os.environ.get("ENSADV_EXAMPLES", 100)))
INF, NAN = float("inf"), float("nan")
SPECIALS = np.array([0.0, -0.0, NAN, INF, -INF, 1e-40, -1e-45, 6e-8, -3e-8, 6.1e-5, 1e-30, 1.0, -1.0, 0.5, 1.00001,
                     65504.0, -65520.0, 3.4e38, -3.4e38])
WIDE = {"float32": np.float32, "float64": np.float64}
NARROW = ("float16", "bfloat16")
DTYPES = (*WIDE, *NARROW, "uint8")
RAW = {**WIDE, "float16": np.uint16, "bfloat16": np.uint16, "uint8": np.uint8}


# ---- 16-bit numbers, by definition: a table of all of them, and searching in it ---------------------------------

@cache
def numbers(dtype: str) -> np.ndarray:
    """The values of all 65,536 patterns, float64: sign * 2^(exponent - bias) * significand, spelled out."""
    fraction_bits, bias, top = {"float16": (10, 15, 31), "bfloat16": (7, 127, 255)}[dtype]
    bits = np.arange(65536)
    exponent, fraction = (bits & 0x7FFF) >> fraction_bits, bits & ((1 << fraction_bits) - 1)
    significand = np.where(exponent > 0, fraction + (1 << fraction_bits), fraction).astype(np.float64)
    value = np.ldexp(significand, np.maximum(exponent, 1) - bias - fraction_bits)
    value[exponent == top] = np.where(fraction[exponent == top], np.nan, np.inf)
    return np.where(bits < 0x8000, value, -value)


def infinity(dtype: str) -> int:
    return {"float16": 0x7C00, "bfloat16": 0x7F80}[dtype]


def nearest(v: np.ndarray, dtype: str) -> np.ndarray:
    """Patterns of the numbers nearest to v, ties to the even pattern; beyond the largest, infinity as IEEE has it."""
    v = np.asarray(v, np.float64)
    inf = infinity(dtype)
    table = numbers(dtype)[: inf + 1].copy()
    table[inf] = 2 * table[inf - 1] - table[inf - 2]  # where the next number would be, were there one
    magnitude = np.minimum(np.abs(v), table[inf])
    up = np.clip(np.searchsorted(table, magnitude), 1, inf)
    down = up - 1
    below, above = magnitude - table[down], table[up] - magnitude
    bits = np.where((above < below) | ((above == below) & (up % 2 == 0)), up, down)
    bits = np.where(np.isnan(v), inf + 1, bits)
    return (bits | np.where(np.signbit(v), 0x8000, 0)).astype(np.uint16)


def values(array: np.ndarray, dtype: str) -> np.ndarray:
    """float64; uint8 stands for the float32 number nearest to level / 255."""
    if dtype == "uint8":
        return (array.astype(np.float32) / np.float32(255)).astype(np.float64)
    return numbers(dtype)[array] if dtype in NARROW else array.astype(np.float64)


def compute(array: np.ndarray, dtype: str, wide: bool = False) -> np.ndarray:
    """In the type that arithmetic is done in: float32, or float64 (`wide`)."""
    return values(array, dtype).astype(np.float64 if wide else np.float32)


def same(a: np.ndarray, b: np.ndarray, dtype: str) -> None:
    """Bit for bit; a NaN equals any NaN."""
    raw = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[a.itemsize]
    equal = (a.view(raw) == b.view(raw)) | (np.isnan(values(a, dtype)) & np.isnan(values(b, dtype)))
    where = np.flatnonzero(~equal)
    assert where.size == 0, f"{where.size} differ, first at {where[0]}: {a[where[0]]} != {b[where[0]]}"


# ---- arrays whose base is misaligned and whose surroundings are watched ------------------------------------------

def place(array: np.ndarray, lead: int) -> np.ndarray:
    """A copy of `array` that begins `lead` elements into an allocation and ends with it."""
    buffer = np.empty(lead + array.size, array.dtype)
    buffer[lead:] = array
    return buffer[lead:]


def cast(v: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "uint8":
        return np.rint(255 * np.clip(np.nan_to_num(v), 0, 1)).astype(np.uint8)
    return nearest(v.astype(np.float32), dtype) if dtype in NARROW else v.astype(WIDE[dtype])


def images(rng, n: int, dtype: str, lead: int = 0, specials: bool = False, spread: float = 0.1) -> np.ndarray:
    v = rng.uniform(-spread, 1 + spread, n)
    if specials:
        v = np.where(rng.random(n) < 0.3, rng.choice(SPECIALS, n), v)
    return place(cast(v, dtype), lead)


def gradients(rng, n: int, dtype: str, lead: int = 0, specials: bool = True) -> np.ndarray:
    v = np.where(rng.random(n) < 0.2, rng.choice([0.0, NAN], n), rng.normal(size=n))
    if specials:
        v = np.where(rng.random(n) < 0.3, rng.choice(SPECIALS, n), v)
    return place(cast(v, dtype), lead)


class Output:
    """Room for n elements amid others that must stay as they are."""

    def __init__(self, n: int, dtype: str, lead: int = 0, tail: int = 0):
        self.dtype = dtype
        raw = np.dtype(RAW[dtype])
        self.buffer = np.full((lead + n + tail) * raw.itemsize, 0xFF, np.uint8).view(raw)
        self.array = self.buffer[lead:lead + n]
        self.rest = [self.buffer[:lead], self.buffer[lead + n:]]

    def result(self) -> np.ndarray:
        assert all((part.view(np.uint8) == 0xFF).all() for part in self.rest), "wrote outside the output"
        return self.array


def ref(array: np.ndarray | None, dtype: str):
    return None if array is None else kernels.Array(array, dtype)


@st.composite
def batches(draw, longest: int = 300):
    """A batch of at most `longest` elements in whole samples, where its arrays lie, and a source of values."""
    n = draw(st.sampled_from([*range(1, 13), 0]))
    inner = draw(st.integers(1, longest // max(n, 1)))
    lead = st.integers(0, 9)
    return SimpleNamespace(n=n, inner=inner, size=n * inner, leads=[draw(lead) for _ in range(4)],
                           rng=np.random.default_rng(draw(st.integers(0, 2**32 - 1))))
