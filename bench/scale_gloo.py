"""What the cost model is checked against: all-reduces and EAT steps of 1, 2 and 4 gloo processes on this machine's CPU.

Each process has one thread. Beside the steps that communicate, the same processes train without talking to each other,
which shows how much they slow each other down on the cores that they share.
"""
from __future__ import annotations

import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from networks import NETWORKS, images
from torch import nn

import ensadv_fast as ea
from ensadv_fast.bench import timing

WORLDS = (1, 2, 4)
SIZES = tuple(4**k * 1024 for k in range(9))  # bytes of an all-reduce, 1 KiB to 64 MiB
STATIC = 2


class EAT:
    """A network in training on `STATIC` static sources and itself, each in its turn."""

    def __init__(self, network: str, batch: int, rank: int = 0, distributed: bool = False) -> None:
        spec = NETWORKS[network]
        torch.manual_seed(0)
        self.net = spec.make().train()
        self.model = nn.parallel.DistributedDataParallel(self.net) if distributed else self.net
        self.x, self.y = images(spec, batch, seed=rank)
        self.crafted = batch // 2
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9)
        self.attack = ea.fgsm(spec.eps)
        self.static = [ea.Source(spec.make().eval()) for _ in range(STATIC)]
        self.adversary = ea.EnsembleAdversary(self.model, self.static, self.attack, select="rotate",
                                              key=ea.fresh_key(seed=0))

    def learn(self) -> None:
        """A clean forward and backward pass."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(self.x), self.y).backward()

    def craft(self, source: ea.Source) -> None:
        self.attack(source, self.x[:self.crafted], self.y[:self.crafted])

    def step(self) -> None:
        batch = self.adversary(self.x, self.y)
        self.optimizer.zero_grad()
        ea.mixed_cross_entropy(self.model(batch.x), batch.y, batch.is_adv).backward()
        self.optimizer.step()

    def round(self) -> None:
        for _ in self.adversary.sources:
            self.step()


def costs(network: str, batch: int, seconds: float = 1.5) -> dict[str, float]:
    """Seconds an image (update: a step) on one thread of a CPU on which nothing else runs."""
    eat = EAT(network, batch)
    eat.learn()
    live = eat.adversary.sources[-1]

    def forward() -> None:
        with torch.no_grad():
            eat.net(eat.x)

    timed = timing.time_calls({"forward": forward, "train": eat.learn, "update": eat.optimizer.step,
                               "live": lambda: eat.craft(live), "static": lambda: eat.craft(eat.static[0])},
                              seconds, "cpu")
    n = {"forward": batch, "train": batch, "update": 1, "live": eat.crafted, "static": eat.crafted}
    return {name: t.median / 1e3 / n[name] for name, t in timed.items()}


def _once(call: Callable[[], object]) -> float:
    """Seconds of a call that all ranks begin at once; the slowest rank counts."""
    dist.barrier()
    start = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - start


def _together(call: Callable[[], object], times: int) -> float:
    """The median of several such calls, the first left out."""
    call()
    return statistics.median(_once(call) for _ in range(times))


def _all_reduces(sizes: tuple[int, ...], rounds: int = 9) -> list[float]:
    """Median seconds of an all-reduce of each size, all sizes in turn: what disturbs one then disturbs all. Small ones
    go in rows, as a barrier costs as much as one of them."""
    seconds: list[list[float]] = [[] for _ in sizes]
    for _ in range(rounds + 1):
        for nbytes, found in zip(sizes, seconds):
            data, row = torch.zeros(nbytes // 4), max(1, min(50, 2**22 // nbytes))
            found.append(_once(lambda: [dist.all_reduce(data) for _ in range(row)]) / row)
    return [statistics.median(found[1:]) for found in seconds]


def _rank(rank: int, world: int, folder: str, network: str, batch: int, rounds: int, sizes: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store{world}", world), rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=120))
    found = {"world": world, "bytes": sizes, "all_reduce": _all_reduces(sizes) if world > 1 else []}
    eat, alone = EAT(network, batch, rank, distributed=world > 1), EAT(network, batch, rank)

    def clean() -> None:
        alone.learn()
        alone.optimizer.step()

    found |= {"clean_apart": _together(clean, 3 * rounds),
              "eat": _together(eat.round, rounds) / len(eat.adversary.sources)}
    if rank == 0:
        if world == 1:
            found["costs"] = costs(network, batch)
        Path(folder, f"{world}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # torch's own teardown of a process with gloo threads aborts now and then


def measure(network: str, batch: int, rounds: int = 8, worlds: tuple[int, ...] = WORLDS,
            sizes: tuple[int, ...] = SIZES) -> list[dict]:
    """For each number of processes: seconds of an all-reduce of each of `bytes`, of a clean step of processes that do
    not communicate, and of a step of EAT that does; beside one process, what its parts cost."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            mp.start_processes(_rank, args=(world, folder, network, batch, rounds, sizes), nprocs=world,
                               start_method="spawn")
            found.append(json.loads(Path(folder, f"{world}.json").read_text()))
    return found
