"""The live source under DistributedDataParallel: crafting communicates with nobody, training as always."""
import contextlib
import datetime
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from networks import batch, small_net
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import ensadv_fast as ea

WORLD = 2


@contextlib.contextmanager
def group(rank: int, store: str):
    """One of `WORLD` processes on this machine, with a thread of its own."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD,
                            timeout=datetime.timedelta(seconds=20))
    try:
        yield
    finally:
        dist.destroy_process_group()


def worker(rank: int, store: str) -> None:
    with group(rank, store):
        net = small_net()
        ddp = nn.parallel.DistributedDataParallel(net)
        reduced = []

        def count_and_reduce(state, bucket):
            reduced.append(bucket.index())
            return allreduce_hook(None, bucket)

        ddp.register_comm_hook(None, count_and_reduce)
        static = [ea.Source(small_net(1)), ea.Source(ddp, dtype=torch.float32)]
        adversary = ea.EnsembleAdversary(ddp, static, ea.pgd(0.1, steps=2), select="rotate", key=ea.fresh_key(seed=0))
        attacks = [ea.fgsm(0.1), ea.pgd(0.1, steps=2, restarts=2), ea.rand_step_ll(0.1)]
        x, y = batch(seed=rank)
        if rank == 0:  # alone: whatever waited for the other process would time out
            for attack in attacks:
                for source in (ddp, ea.Ensemble([ddp, static[0]]), ea.Source(ddp, live=True, crafting="train")):
                    attack(source, x, y)
        dist.barrier()
        assert reduced == [] and all(p.grad is None for p in net.parameters())

        # A training step between crafted batches: reduced once, alike on both, in the trainer's autocast.
        seen = []
        net[-1].register_forward_hook(lambda m, args, out: seen.append(out.dtype))
        for step in range(4):
            seen.clear()
            count = len(reduced)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                made = adversary(x, y)
                assert made.source == step % 3 and len(reduced) == count
                assert set(seen) == ({torch.bfloat16} if made.source == 2 else set())
                loss = F.cross_entropy(ddp(made.x), made.y)
            loss.backward()
            assert len(reduced) > count
        grads = torch.cat([p.grad.flatten() for p in net.parameters()])
        both = [torch.empty_like(grads) for _ in range(WORLD)]
        dist.all_gather(both, grads)
        assert torch.equal(*both) and grads.abs().max() > 0
        dist.barrier()
    os._exit(0)  # all asserted: torch's own teardown of a process with gloo threads aborts now and then


def test_crafting_on_a_ddp_model_communicates_with_nobody(tmp_path):
    mp.start_processes(worker, args=(str(tmp_path / "store"),), nprocs=WORLD, start_method="spawn")


class Inside(nn.Module):
    """Normalisation, then the wrapped network, then what reads the wrapper."""

    def __init__(self, ddp: nn.Module):
        super().__init__()
        self.ddp, self.scale = ddp, nn.BatchNorm2d(3)

    def forward(self, x):
        return self.ddp(self.scale(x)) * (1.0 if self.ddp.training else 2.0)


def worker_inside(rank: int, store: str) -> None:
    """Ranks that craft different numbers of steps, with wrappers inside, inside of each other, and compiled."""
    with group(rank, store):
        net = small_net()
        ddp = nn.parallel.DistributedDataParallel(net)  # its buffers are sent at every forward pass in training mode
        x, y = batch(seed=rank)
        models = {"sequential": nn.Sequential(nn.Identity(), ddp), "inside": Inside(ddp),
                  "parallel": nn.Sequential(nn.DataParallel(ddp)),
                  "compiled": torch.compile(ddp, backend="eager"),
                  "compiled-inside": nn.Sequential(torch.compile(nn.Sequential(ddp), backend="eager"))}
        for model in models.values():
            for live in (ea.Source(model, live=True, dtype=None), ea.Source(model, live=True, crafting="train")):
                model.train()
                for _ in range(1 + 2 * rank):
                    ea.pgd(0.1, steps=1 + 3 * rank)(live, x, y)
                assert all(m.training for m in net.modules()) and "forward" not in vars(ddp)
            for source in (ea.Source(model), ea.Source(model, dtype=torch.float32, fold=False, channels_last=False)):
                assert not any(isinstance(m, nn.parallel.DistributedDataParallel) for m in source.module.modules())
                ea.pgd(0.1, steps=1 + 3 * rank)(source, x, y)
            if rank == 0:  # alone
                ea.pgd(0.1, steps=2)(model, x, y)
            assert all(p.grad is None for p in net.parameters())
        plain = ea.fgsm(0.1)(nn.Sequential(nn.Identity(), net), x, y)
        assert torch.equal(ea.fgsm(0.1)(models["sequential"], x, y), plain)
        assert torch.equal(ea.fgsm(0.1)(models["compiled"], x, y), plain)
        dist.barrier()
        F.cross_entropy(models["inside"](x), y).backward()  # and training communicates as before
        grads = torch.cat([p.grad.flatten() for p in net.parameters()])
        both = [torch.empty_like(grads) for _ in range(WORLD)]
        dist.all_gather(both, grads)
        assert torch.equal(*both) and grads.abs().max() > 0
        dist.barrier()
    os._exit(0)  # as above


def test_wrappers_inside_a_model_communicate_with_nobody(tmp_path):
    mp.start_processes(worker_inside, args=(str(tmp_path / "store"),), nprocs=WORLD, start_method="spawn")
