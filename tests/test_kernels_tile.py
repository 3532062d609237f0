"""The index arithmetic of the CUDA matrix product, on the CPU: a tile copied to shared memory, read as ldmatrix reads
it, multiplied as mma does and stored gives the product. The emulation also refuses bank conflicts of ldmatrix, and
places that are written twice."""
import numpy as np
import pytest
from kernels_arrays import kernels

TILES = {("float16", "large"): (128, 128, 32), ("float16", "small"): (64, 64, 64), ("float32", "small"): (64, 64, 32)}


@pytest.mark.parametrize("inner_first", [False, True])
@pytest.mark.parametrize(("dtype", "tile"), TILES)
def test_a_tile_is_the_product(dtype, tile, inner_first):
    rng = np.random.default_rng(0)
    m, n, k = TILES[dtype, tile]
    a, b = rng.integers(-9, 9, (m, k)).astype(np.float32), rng.integers(-9, 9, (k, n)).astype(np.float32)
    operand = b if inner_first else np.ascontiguousarray(b.T)
    assert np.array_equal(kernels.matrix_tile(a, operand, dtype, tile, inner_first), a @ b)


@pytest.mark.parametrize(("dtype", "elements"), [(np.float32, 4), (np.uint16, 8)])
def test_a_chunk_keeps_what_its_bits_say(dtype, elements):
    chunk = np.arange(1, elements + 1).astype(dtype)
    for keep in range(2**elements):
        bits = keep >> np.arange(elements) & 1
        assert np.array_equal(kernels.kept(chunk, keep), chunk * bits.astype(dtype))
