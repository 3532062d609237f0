"""Regular Hadamard matrices: orthogonal rows of +1 and -1, all with the same sum."""
import functools
import math

import torch
from torch import Tensor

ORDERS = (1, 4, 16, 36, 64, 100)  # those up to 100: a regular Hadamard matrix has order 4 u^2, or 1

# q, one subset of Z_q x Z_q, and the linear map ((a, b), (c, d)) whose powers map it to the other three subsets. Each
# subset is its own negative and has q (q - 1) / 2 elements, and the squares of the four subsets' characters add up to
# q^2 at every character but the trivial one. For q = 3 the subsets are the four lines through 0; for q = 5 a search
# found them.
_SUBSETS = {
    36: (3, ((0, 0), (0, 1), (0, 2)), ((0, 1), (1, 1))),
    100: (5, ((0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (4, 0), (1, 1), (4, 4), (2, 1), (3, 4)), ((0, 1), (2, 0))),
}


@functools.cache
def regular_hadamard(order: int) -> Tensor:
    """int8 [k, k] of +1 and -1 with H H^T = k I and every row and column sum sqrt(k), k = `order` in ORDERS.

    4: J - 2 I. 16 and 64: its Kronecker powers (orders and row sums multiply). 36 and 100: Williamson's array
    (Williamson 1944) of four commuting symmetric matrices A_i of order q^2 with A_1^2 + .. + A_4^2 = 4 q^2 I. Here
    A_i[g, h] = -1 where g - h lies in the subset D_i of Z_q x Z_q and +1 elsewhere. The row sums of each A_i are q.
    With the array's first block column negated, each of its rows has three blocks with a plus sign and one with a
    minus sign, so the row sums of the array are 2 q.

    The tensor is shared: do not write into it. Raises ValueError for another order.
    """
    if order not in ORDERS:
        raise ValueError(f"regular_hadamard: order must be one of {', '.join(map(str, ORDERS))}, got {order!r}")
    if order in _SUBSETS:
        return _williamson(*_SUBSETS[order])
    matrix = torch.ones(1, 1, dtype=torch.int8, device="cpu")
    for _ in range(round(math.log(order, 4))):
        matrix = torch.kron(matrix, 1 - 2 * torch.eye(4, dtype=torch.int8, device="cpu"))
    return matrix


def _williamson(q: int, subset: tuple[tuple[int, int], ...], linear_map: tuple[tuple[int, int], ...]) -> Tensor:
    a, b = torch.meshgrid(torch.arange(q, device="cpu"), torch.arange(q, device="cpu"), indexing="ij")
    points = torch.stack([a, b], -1).view(-1, 2)
    difference = (points[:, None] - points) % q
    members, blocks = torch.tensor(subset, device="cpu"), []
    for _ in range(4):
        inside = (difference[:, :, None] == members).all(-1).any(-1)
        blocks.append(torch.where(inside, -1, 1).to(torch.int8))
        members = members @ torch.tensor(linear_map, device="cpu").T % q
    w, x, y, z = blocks
    rows = [[-w, x, y, z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]]
    return torch.cat([torch.cat(row, 1) for row in rows])
