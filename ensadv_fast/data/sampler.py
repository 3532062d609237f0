"""The order in which samples come: a function of seed and epoch, for any batch size and any number of ranks."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops.keys import derive_seed


class Sampler:
    """Shuffled batches of positions in a data set, shared out over ranks; they can stop and go on anywhere.

    The order of epoch e is a function of (seed, e) only, and is cut into global batches of `batch_size`. Rank r of W
    has the samples r, r + W, r + 2W... of each global batch. So the first k / W samples of all ranks are together the
    first k of the global batch, and what is trained on does not depend on W.

    Iterating yields this rank's part of the rest of the current epoch, int64 [B] on `device`, and then moves to the
    next epoch. `state_dict` taken after a batch describes the position right behind it, in global samples: it is the
    same on all ranks, and a run may go on from it with another number of ranks.

    Args:
        n: samples in the set.
        batch_size: samples of a global batch, over all ranks; at least `world`.
        seed: of the order.
        device: where batches go.
        rank, world: this process's number and how many there are.
        drop_last: leave out the last global batch of an epoch where it is smaller than the others. Without it that
            batch must have a sample for every rank, since ranks that train wait for each other.
        shuffle: False is for evaluation: the order of every epoch is 0..n-1, and a rank without a sample in the last
            global batch yields one batch less.

    Raises:
        ValueError: naming what is wanted and what came.
    """

    def __init__(self, n: int, batch_size: int, seed: int, device: torch.device | str = "cpu", *, rank: int = 0,
                 world: int = 1, drop_last: bool = False, shuffle: bool = True) -> None:
        for name, value in (("n", n), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"Sampler: {name} must be >= 1, got {value}")
        if not 0 <= rank < world:
            raise ValueError(f"Sampler: rank must be >= 0 and less than world={world}, got {rank}")
        if batch_size < world:
            raise ValueError(f"Sampler: batch_size must be at least the number of ranks, {world}, each of which needs "
                             f"a sample, got {batch_size}")
        if drop_last and n < batch_size:
            raise ValueError(f"Sampler: n must be at least batch_size={batch_size} with drop_last, which leaves out a "
                             f"smaller batch, got {n}: give a smaller batch_size, or drop_last=False")
        self.n, self.batch_size, self.seed, self.device = n, batch_size, seed, device
        self.rank, self.world, self.drop_last, self.shuffle = rank, world, drop_last, shuffle
        self.epoch = self.position = 0
        self._check_tail(0)

    def _check_tail(self, position: int) -> None:
        """Raise ValueError where an epoch continued from `position` ends in a batch of fewer samples than ranks."""
        tail = (self.n - position) % self.batch_size
        if self.shuffle and not self.drop_last and 0 < tail < self.world:
            raise ValueError(f"Sampler: the last global batch of an epoch has {tail} samples for {self.world} ranks "
                             f"(n={self.n}, batch_size={self.batch_size}, from position {position}): give "
                             "drop_last=True, or another batch_size")

    def __len__(self) -> int:
        """Global batches in one epoch."""
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The order of this epoch, int64 [n] on the CPU: a permutation of 0..n-1."""
        if not self.shuffle:
            return torch.arange(self.n, device="cpu")
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
        return torch.randperm(self.n, generator=generator, device="cpu")

    def spans(self, position: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of an epoch's global batches from `position` on; those without a sample of this rank are left
        out."""
        while position < self.n:
            stop = min(position + self.batch_size, self.n)
            if self.drop_last and stop - position < self.batch_size or position + self.rank >= stop:
                return
            yield position, stop
            position = stop

    def share(self, order: Tensor, start: int, stop: int) -> Tensor:
        """This rank's samples of the global batch [start, stop) of an order: int64 [B]."""
        return order[start + self.rank:stop:self.world]

    def next_epoch(self) -> None:
        """Move to the start of the next epoch."""
        self.epoch, self.position = self.epoch + 1, 0

    def __iter__(self) -> Iterator[Tensor]:
        order = upload(self.order(self.epoch), self.device)  # one copy an epoch, none a batch
        for start, stop in self.spans(self.position):
            self.position = stop
            yield self.share(order, start, stop)
        self.next_epoch()

    def state_dict(self) -> dict[str, int]:
        """The position right behind the batch last yielded, and the seed: plain numbers, alike on all ranks."""
        return {"n": self.n, "seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken, with any batch size and number of ranks. Raises ValueError for a position in
        another order (n, seed), or one from which the epoch ends in a batch of fewer samples than ranks."""
        if (state["n"], state["seed"]) != (self.n, self.seed):
            raise ValueError(f"Sampler: the saved position is of n={state['n']}, seed={state['seed']}, "
                             f"this sampler has n={self.n}, seed={self.seed}")
        self._check_tail(state["position"])
        self.epoch, self.position = state["epoch"], state["position"]


def upload(t: Tensor, device: torch.device | str) -> Tensor:
    """A CPU tensor on `device`; on CUDA from pinned memory, so that the host does not wait."""
    if torch.device(device).type != "cuda":
        return t.to(device)
    return (t if t.is_pinned() else t.pin_memory()).to(device, non_blocking=True)
