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

# A gradient that is waited for this long will not come. Control (below) waits longer: a rank may evaluate for hours.
TIMEOUT = datetime.timedelta(minutes=10)
PATIENCE = datetime.timedelta(days=7)
EVERY = 4  # steps from one vote to the next


class Ranks:
    """This process among those of the run: `rank` of `world`, the `local`-th on its machine.

    Gradients and sums go by NCCL between GPUs and by gloo on the CPU. What concerns control (votes, gathering,
    barriers) always goes by gloo, in a group of its own: it never waits for a GPU. Without torchrun there is one rank,
    and every method returns at once. A process that is gone makes the others' next call raise a RuntimeError.
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
        """Rank 0's values into these tensors of every rank: one broadcast for each dtype."""
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
        """Wait until every rank is here."""
        if self.world > 1:
            dist.barrier(group=self._control)

    def agree(self, flag: bool) -> bool:
        """Does any rank say so?"""
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
        """ValueError on every rank unless all have this value; what: its name in the message."""
        if self.world == 1:
            return
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._control)
        if others := [r for r in range(self.world) if values[r] != values[0]]:
            raise ValueError(f"train: {what} differs between processes: rank {others[0]} has {values[others[0]]}, rank "
                             f"0 has {values[0]}; every process must be started with the same options and data")


class Vote:
    """Has any rank been asked to stop? All ranks learn it at the same step, and none waits for it.

    Called once a step with the signal that this rank has got, 0 for none; the highest of all is what comes out. On
    every fourth step the ranks' answers are sent on their way and those sent four steps ago are read: a signal takes
    effect 4 to 8 steps after it came, at once without torchrun.
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
        """Wait for the answers that are under way, and read them."""
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._told)


_here = Ranks()


def here() -> Ranks:
    """The ranks that are open in this process; one alone where none are."""
    return _here


def launched() -> bool:
    """Has torchrun started this process?"""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def neighbours() -> int:
    """How many ranks share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", _here.world))


@contextmanager
def opened(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun's environment names, joined for the time of the `with`; where ranks are open already,
    or where torchrun has started no other process, what there is.

    device: where the run computes; a plain "cuda" makes each rank's own GPU the current one. A process group that the
    caller has made is used and left open. Raises ValueError for an environment that makes no sense or names more
    processes than there are GPUs, and RuntimeError where the others do not come.
    """
    global _here
    if _here.world > 1 or not (launched() or dist.is_available() and dist.is_initialized()):
        yield _here
        return
    rank, world, local = (_environment(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not 0 <= rank < world:
        raise ValueError(f"train: got RANK={rank} of WORLD_SIZE={world}, want 0 <= RANK < WORLD_SIZE")
    if device.type == "cuda" and device.index is None:
        if local >= torch.cuda.device_count():
            raise ValueError(f"train: LOCAL_RANK={local} has no GPU: this machine has {torch.cuda.device_count()}; "
                             "start at most as many processes (--nproc-per-node)")
        torch.cuda.set_device(local)
    if world == 1:
        yield _here
        return
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(control, dist.ProcessGroup)  # every rank is a member
    _here = Ranks(rank, world, local, control)
    try:
        yield _here
    except BaseException:
        own = own and device.type != "cuda"  # NCCL might wait for the others; the end of the process ends it
        raise
    finally:
        _here = Ranks()
        if own:
            dist.destroy_process_group()


def _environment(name: str) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        raise ValueError(f"train: the environment's {name} is {os.environ.get(name)!r}, want the number that torchrun "
                         "sets") from None
