"""A network in training, on one process or on all ranks together: its step, its log line and its checkpoint."""
from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import data, models, ops
from ..adversary.adversary import EnsembleAdversary
from ..adversary.batches import Counts, EpsDistribution, Part
from ..attacks.by_name import make_attack
from ..diagnose.monitor import OverfittingMonitor
from ..ops.keys import derive_seed
from ..sources.training_loss import TrainingLossSource
from ..system import machine, ranks
from . import checkpoints, logs, sync_norm
from .job import Job, Run, make_source
from .meter import Meter
from .optimizers import learning_rate
from .step import Update, labels, prepare

NONFINITE = "nonfinite.jsonl"  # in a run folder: a line for each look that found such steps


def make_adversary(run: Run, job: Job, model: nn.Module, total: int) -> EnsembleAdversary:
    """The adversary of a job's recipe; a recipe without an attack yields clean batches."""
    config, r = run.config, job.recipe
    if r.attack is None:
        return EnsembleAdversary(model, fraction=0.0, key=ops.fresh_key("cpu", job.seed))
    attack = r.attack if not isinstance(r.attack, str) else make_attack(
        r.attack, config.eps, alpha=config.alpha, step=r.step, steps=r.steps, rule=r.rule)
    live = r.crafting_loss == "plain" or TrainingLossSource(
        model, smoothing=config.label_smoothing, aux=config.aux, live=True, fold=False, channels_last=False, dtype=None,
        crafting=r.crafting)
    return EnsembleAdversary(
        model, [make_source(config, run.build(s, config.download), r.crafting, r.crafting_loss) for s in job.static],
        attack, live=live, fraction=r.fraction, mix=r.mix, select=r.select, crafting=r.crafting,
        start_step=r.start(total), eps_dist=None if r.eps_dist == "fixed" else EpsDistribution(config.eps, r.eps_dist),
        key=ops.fresh_key("cpu", derive_seed(job.seed, "adversary")))


def make_monitor(run: Run, job: Job, model: nn.Module) -> OverfittingMonitor | None:
    """The watch over an adversarially trained model, on images of its own training set."""
    train, n = run.dataset.train, min(run.config.monitor, len(run.dataset.train))
    if job.recipe.attack is None or not n:
        return None
    seed = derive_seed(job.seed, "monitor")
    with data.Stream(train, data.Sampler(len(train), n, seed), device=run.device, seed=seed) as stream:
        x, y, _ = next(iter(stream))  # which leaves damaged files out
    return OverfittingMonitor(model, x, y, eps=run.config.eps, key=ops.fresh_key("cpu", seed))


class Training:
    """A job under way: everything that moves in it, and what of that its checkpoint holds.

    All ranks train one network: they start from the same weights, every batch is a part of the same global batch,
    gradients are averaged by DistributedDataParallel, and statistics (of BatchNorm, say) are rank 0's after every
    step. Crafting uses the network itself, without the wrapper that communicates.
    """

    def __init__(self, run: Run, job: Job) -> None:
        config, here, train = run.config, run.ranks, run.dataset.train
        self.run, self.job = run, job
        torch.manual_seed(derive_seed(job.seed, "weights"))
        self.model = prepare(config, run.build(job.spec))
        if job.init is not None:
            models.load_weights(self.model, job.init)
        if here.world > 1 and config.sync_bn:
            self.model = sync_norm.convert(self.model)
        if here.rank:
            torch.manual_seed(derive_seed(job.seed, "rank", here.rank))  # dropout of its own
        self.update = Update(config, self.model if here.world == 1 else _parallel(self.model, run.device),
                             job.recipe.lam, run.device)
        sampler = data.Sampler(len(train), config.batch_size, derive_seed(job.seed, "order"), rank=here.rank,
                               world=here.world)
        augment = None if config.augment == "none" else data.Augment(train.in_shape[1], crop=config.augment)
        self.stream = data.Stream(
            train, sampler, device=run.device, seed=derive_seed(job.seed, "augment"), augment=augment,
            workers=config.loaders or max(1, machine.cores() // ranks.neighbours()),
            channels_last=config.channels_last, max_corrupt=config.max_corrupt)
        self.per_epoch = len(sampler)
        self.total = job.epochs * self.per_epoch  # steps
        dropout = torch.get_rng_state()  # building static sources draws initial weights that are replaced at once
        self.adversary = make_adversary(run, job, self.model, self.total)
        torch.set_rng_state(dropout)
        self.monitor = make_monitor(run, job, self.model)
        self.meter = Meter(run.device, world=here.world)
        self.buffers = list(self.model.buffers())
        self.step, self.seconds = 0, 0.0

    @property
    def images(self) -> int:
        """Images of the data set that all ranks have seen."""
        at = self.stream.sampler
        return at.epoch * at.n + at.position

    def advance(self, x: Tensor, y: Tensor, index: Tensor) -> tuple[float, int]:
        """One step on this rank's part of a global batch; its learning rate and its source."""
        config, here, images = self.run.config, self.run.ranks, len(y)
        lr = learning_rate(config, self.step, self.total, self.per_epoch)
        part = Part(here.rank, here.world, self.stream.global_size)
        if not images:  # all of its files are damaged: the others wait for gradients all the same
            x, y, index = x.new_zeros(1, *x.shape[1:]), y.new_zeros(1), index.new_zeros(1)
        self.update.clear()
        with self.meter.span("attack"), self.update.autocast():
            batches = self.adversary.micro(config.accumulate, x, y, index, part)
        with self.meter.span("train"):
            ours = Counts.total(b.counts for b in batches)
            scale = here.world * ours.share(batches[0].all_counts, self.job.recipe.lam) if images else 0.0
            loss, logits = self.update(batches, lr, scale=scale, index=index)
            here.copy(self.buffers)
        if images:
            self.meter.add(loss, logits, *labels(batches), images=images)
        self.step += 1
        return lr, batches[0].source

    def watch(self) -> dict[str, Any] | None:
        """What the monitor sees after an epoch, on rank 0."""
        if self.monitor is None or self.step % self.per_epoch or not self.run.ranks.main:
            return None
        found = self.monitor(self.step)
        return None if found is None else found.to_dict()

    def check_finite(self) -> None:
        """Tell of steps whose gradients were not finite, with the images they were computed on, and raise
        FloatingPointError where config.nan is "stop". It waits for the device; every rank calls it."""
        found, here, folder = self.update.nonfinite(), self.run.ranks, self.run.folder
        if found is None:
            return
        index = here.gather(found.index)
        stop = self.run.config.nan == "stop"
        if index is not None:
            logs.append(folder / NONFINITE, {
                "job": self.job.name, "step": found.step + 1, "source": self.adversary.source_at(found.step)
                if found.step >= self.adversary.start_step and self.job.recipe.attack else -1, "count": found.count,
                "by": self.step, "skipped": not stop, "index": index})
        message = (f"train: {self.job.name}: the gradients of step {found.step + 1} are not finite ({found.count} such "
                   f"steps up to step {self.step}); the positions of its images in the data set are in "
                   f"{folder / NONFINITE}")
        if stop:
            raise FloatingPointError(f"{message}. No later step is saved: --resume --nan skip goes on without such "
                                     "steps, or take a smaller --lr or a --clip")
        if here.main:
            warnings.warn(f"{message}. They are left out", stacklevel=2)

    def line(self) -> dict[str, Any]:
        """What happened on all ranks since the last line; the one place where the host waits for the device."""
        here, stream = self.run.ranks, self.stream

        def reduce(sums: Tensor) -> Tensor:  # a NaN beside the sums: one read tells of bad gradients too
            return torch.cat([here.sum(sums), torch.where(self.update.watch.seen, torch.nan, 0.0).double().view(1)])

        record = self.meter.line(reduce, skipped=stream.corrupt)
        if not record["finite"]:
            self.check_finite()
        if record["skipped"] > stream.limit:
            raise data.CorruptImages(f"train: {self.job.name}: {record['skipped']} images of an epoch cannot be "
                                     f"decoded on all ranks together, at most {stream.limit} are borne "
                                     "(--max-corrupt)")
        return record

    def save(self) -> None:
        """Write the checkpoint, with what every rank has of its own; every rank calls it. The last one is the result,
        and those before it are dropped then."""
        self.check_finite()
        rng = self.run.ranks.gather(_rng(self.run.device))
        if rng is None:
            return
        path, checkpoints = self.job.path(self.run.folder), self.job.checkpoints(self.run.folder, self.run.config.keep)
        checkpoints.save({
            "job": self.job.name, "spec": self.job.spec, "step": self.step, "seconds": self.seconds,
            "model": self.model.state_dict(), **self.update.state_dict(), "adversary": self.adversary.state_dict(),
            "sampler": self.stream.state_dict(), "rng": rng, "monitor": self.monitor and self.monitor.state_dict()})
        checkpoints.publish(self.step, path)
        if self.step == self.total:
            checkpoints.forget()

    def resume(self) -> None:
        """Go on where the newest whole checkpoint stops, if there is one: rank 0 finds it, all of them read it."""
        here, job, folder = self.run.ranks, self.job, self.run.folder
        state = job.newest(folder) if here.main else None
        step = here.tell(state and state["step"])
        if step is None:
            return
        if state is None:
            path = job.checkpoints(folder).path(step)
            state = checkpoints.load(path if path.exists() else job.path(folder))
        here.same("the checkpoint's step", state["step"])
        if state["step"] == self.total:  # nothing will move any more
            self.step, self.seconds = state["step"], state["seconds"]
            return
        try:
            self.load(state)
        except KeyError as e:
            raise ValueError(f"train: the checkpoint of {job.name} in {folder} is of another version: it has no {e}; "
                             "delete it to train this model again") from e

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, also one of another number of ranks: those that it knows nothing of keep the fresh
        generators of their own seed."""
        self.model.load_state_dict(state["model"])
        self.update.load_state_dict(state)
        self.adversary.load_state_dict(state["adversary"])
        self.stream.load_state_dict(state["sampler"])
        if self.run.ranks.rank < len(state["rng"]):
            _set_rng(state["rng"][self.run.ranks.rank], self.run.device)
        self.step, self.seconds = state["step"], state["seconds"]
        if self.monitor and state.get("monitor"):
            self.monitor.load_state_dict(state["monitor"])


def _parallel(model: nn.Module, device: torch.device) -> nn.parallel.DistributedDataParallel:
    """Averages gradients and nothing else: buffers are copied after a step, before the attack's forward passes, and not
    before the next training forward."""
    ddp = nn.parallel.DistributedDataParallel
    buffers = "forward_sync_buffers"  # of torch 2.13 and later
    buffers = buffers if buffers in inspect.signature(ddp).parameters else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False}
    return ddp(model, device_ids=[device] if device.type == "cuda" else None, **options)


def _rng(device: torch.device) -> dict[str, Any]:
    """The states of torch's generators in this process: the CPU's, and its GPU's."""
    return {"cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def _set_rng(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
