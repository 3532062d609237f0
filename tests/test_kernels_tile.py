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
    a, b = rng.integers(-9, 9, (m, k)), rng.integers(-9, 9, (k, n))
    operand = np.ascontiguousarray(b if inner_first else b.T).astype(np.float32)
    product = kernels.matrix_tile(a.astype(np.float32), operand, dtype, tile, inner_first)
    # In integers, which BLAS does not multiply: OpenBLAS 0.3.30's own float32 product was seen wrong under QEMU's SME.
    assert np.array_equal(product, a @ b)


@pytest.mark.parametrize(("dtype", "elements"), [(np.float32, 4), (np.uint16, 8)])
def test_a_chunk_keeps_what_its_bits_say(dtype, elements):
    chunk = np.arange(1, elements + 1).astype(dtype)
    for keep in range(2**elements):
        bits = keep >> np.arange(elements) & 1
        assert np.array_equal(kernels.kept(chunk, keep), chunk * bits.astype(dtype))
