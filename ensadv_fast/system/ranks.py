"""The processes that train one network together: those that torchrun started, or this one alone."""
from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = datetime.timedelta(minutes=10)  # of gradients: one that has not come by then will not come
PATIENCE = datetime.timedelta(days=7)  # of votes, gathering and barriers: a rank may evaluate for hours
EVERY = 4  # steps from one vote to the next


class Ranks:
    """This process among those of the run: `rank` of `world`, the `local`-th on its machine.

    Gradients and sums go by NCCL between GPUs and by gloo on the CPU. Votes, gathering and barriers always go by gloo,
    in a group of their own (`control`), which never waits for a GPU. Without torchrun there is one rank, and every
    method returns at once. Where a process is gone, the others' next call raises a RuntimeError.
    """

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0, control: dist.ProcessGroup | None = None) -> None:
        self.rank, self.world, self.local, self._control = rank, world, local, control

    @property
    def main(self) -> bool:
        """Is this the rank that writes files and prints?"""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """The GPU of this rank where `device` is "cuda" without a number, else `device`."""
        alone = self.world == 1 or device.type != "cuda" or device.index is not None
        return device if alone else torch.device("cuda", self.local)

    def sum(self, t: Tensor) -> Tensor:
        """The sum of `t` over all ranks, in place: one all-reduce."""
        if self.world > 1:
            dist.all_reduce(t)
        return t

    def copy(self, tensors: Sequence[Tensor]) -> None:
        """Copy rank 0's values into these tensors of every rank: one broadcast for each dtype."""
        if self.world == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            mine = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.detach().reshape(-1) for t in mine])
            dist.broadcast(flat, 0)
            if not self.main:
                parts = flat.split([t.numel() for t in mine])
                torch._foreach_copy_(mine, [p.view(t.shape) for p, t in zip(parts, mine, strict=True)])

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.world > 1:
            dist.barrier(group=self._control)

    def agree(self, flag: bool) -> bool:
        """Is the flag true on any rank?"""
        if self.world == 1:
            return flag
        told = torch.tensor([int(flag)])
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self._control)
        return bool(told)

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value by rank, on rank 0; None elsewhere."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.main else None
        dist.gather_object(value, values, 0, group=self._control)
        return values

    def tell(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, group=self._control)
        return values[0]

    def same(self, what: str, value: Any) -> None:
        """Raise ValueError on every rank unless all have the same value. what: its name in the message."""
        if self.world == 1:
            return
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._control)
        if others := [r for r in range(self.world) if values[r] != values[0]]:
            raise ValueError(f"train: {what} differs between processes: rank {others[0]} has {values[others[0]]}, rank "
                             f"0 has {values[0]}; every process must be started with the same options and data")


class Vote:
    """Has any rank been asked to stop? All ranks learn it at the same step, and none waits for it.

    It is called once a step with the number of the signal that this rank got, 0 for none, and returns the highest
    number of all ranks. On every fourth step each rank sends its number and reads those sent four steps before. So a
    signal takes effect 4 to 8 steps after it came; without torchrun, at once.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self._told = ranks, torch.zeros(1, dtype=torch.int64)
        self._work: dist.Work | None = None

    def __call__(self, step: int, asked: int) -> int:
        if self.ranks.world == 1:
            return asked
        if step % EVERY:
            return 0
        found = self.close()
        self._told[0] = asked
        self._work = dist.all_reduce(self._told, dist.ReduceOp.MAX, group=self.ranks._control, async_op=True)
        return found

    def close(self) -> int:
        """Wait for the numbers that were sent last, and return the highest; 0 where none are under way."""
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._told)


_current = Ranks()


def current_ranks() -> Ranks:
    """The ranks that :func:`opened` has joined in this process; without it one rank alone."""
    return _current


def _torchrun_started_this() -> bool:
    """Has torchrun started this process?"""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def neighbours() -> int:
    """How many ranks share this machine, this one included."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", _current.world))


@contextmanager
def opened(device: torch.device) -> Iterator[Ranks]:
    """Join the ranks that torchrun's environment names, for the time of the `with`.

    Where ranks are joined already, or torchrun has started no other process, it gives those that there are.

    device: where the run computes; a plain "cuda" makes each rank's own GPU the current one. A process group that the
    caller has made is used and left open. Raises ValueError for an environment that makes no sense or names more
    processes than there are GPUs, and RuntimeError where the others do not come.
    """
    global _current
    if _current.world > 1 or not (_torchrun_started_this() or dist.is_available() and dist.is_initialized()):
        yield _current
        return
    rank, world, local = (_read_environment(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not 0 <= rank < world:
        raise ValueError(f"train: RANK must be >= 0 and less than WORLD_SIZE={world}, got {rank}")
    if device.type == "cuda" and device.index is None:
        if local >= torch.cuda.device_count():
            raise ValueError(f"train: LOCAL_RANK={local} has no GPU: this machine has {torch.cuda.device_count()}; "
                             "start at most as many processes (--nproc-per-node)")
        torch.cuda.set_device(local)
    if world == 1:
        yield _current
        return
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(control, dist.ProcessGroup)  # every rank is a member
    _current = Ranks(rank, world, local, control)
    try:
        yield _current
    except BaseException:
        own = own and device.type != "cuda"  # NCCL might wait for the others; the end of the process ends it
        raise
    finally:
        _current = Ranks()
        if own:
            dist.destroy_process_group()


def _read_environment(name: str) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        raise ValueError(f"train: the environment's {name} must be the number that torchrun sets, got "
                         f"{os.environ.get(name)!r}") from None
