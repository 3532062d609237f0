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
from ..system import machine
from ..system.ranks import neighbours
from . import checkpoints, logs, sync_norm
from .job import Job, Run, make_source
from .logs import NONFINITE
from .meter import Meter
from .optimizers import learning_rate
from .step import Update, labels, prepare


def make_adversary(setup: Run, job: Job, model: nn.Module, total: int) -> EnsembleAdversary:
    """The adversary of a job's recipe; a recipe without an attack yields clean batches. total: the job's steps."""
    config, recipe = setup.config, job.recipe
    if recipe.attack is None:
        return EnsembleAdversary(model, fraction=0.0, key=ops.fresh_key("cpu", job.seed))
    attack = recipe.attack if not isinstance(recipe.attack, str) else make_attack(
        recipe.attack, config.eps, alpha=config.alpha, step=recipe.step, steps=recipe.steps, rule=recipe.rule)
    live = recipe.crafting_loss == "plain" or TrainingLossSource(
        model, smoothing=config.label_smoothing, aux=config.aux, live=True, fold=False, channels_last=False, dtype=None,
        crafting=recipe.crafting)
    static = [make_source(config, setup.build(spec, config.download), recipe.crafting, recipe.crafting_loss)
              for spec in job.static]
    return EnsembleAdversary(
        model, static, attack, live=live, fraction=recipe.fraction, mix=recipe.mix, select=recipe.select,
        crafting=recipe.crafting, start_step=recipe.start(total),
        eps_dist=None if recipe.eps_dist == "fixed" else EpsDistribution(config.eps, recipe.eps_dist),
        key=ops.fresh_key("cpu", derive_seed(job.seed, "adversary")))


def make_monitor(setup: Run, job: Job, model: nn.Module) -> OverfittingMonitor | None:
    """What watches an adversarially trained model, on images of its own training set; None for clean training."""
    train, n = setup.dataset.train, min(setup.config.monitor, len(setup.dataset.train))
    if job.recipe.attack is None or not n:
        return None
    seed = derive_seed(job.seed, "monitor")
    with data.Stream(train, data.Sampler(len(train), n, seed), device=setup.device, seed=seed) as stream:
        x, y, _ = next(iter(stream))  # damaged files are left out
    return OverfittingMonitor(model, x, y, eps=setup.config.eps, key=ops.fresh_key("cpu", seed))


def make_stream(setup: Run, job: Job) -> data.Stream:
    """This rank's batches of the training set."""
    config, train = setup.config, setup.dataset.train
    sampler = data.Sampler(len(train), config.batch_size, derive_seed(job.seed, "order"), rank=setup.ranks.rank,
                           world=setup.ranks.world)
    augment = None if config.augment == "none" else data.Augment(train.in_shape[1], crop=config.augment)
    return data.Stream(
        train, sampler, device=setup.device, seed=derive_seed(job.seed, "augment"), augment=augment,
        workers=config.loaders or max(1, machine.cores() // neighbours()), channels_last=config.channels_last,
        max_corrupt=float(config.max_corrupt))  # a share, where an integer would be a number of images


class Training:
    """A job under way: everything that moves in it, and what of that its checkpoint holds.

    All ranks train one network: they start from the same weights, every batch is a part of the same global batch,
    gradients are averaged by DistributedDataParallel, and statistics (of BatchNorm, say) are rank 0's after every
    step. Crafting uses the network itself, without the wrapper that communicates.
    """

    def __init__(self, setup: Run, job: Job) -> None:
        self.setup, self.job, config, world = setup, job, setup.config, setup.ranks.world
        self.model = self._make_model()
        self.update = Update(config, self.model if world == 1 else _parallel(self.model, setup.device), job.recipe.lam,
                             setup.device)
        self.stream = make_stream(setup, job)
        self.per_epoch = len(self.stream.sampler)
        self.total = job.epochs * self.per_epoch  # steps
        dropout = torch.get_rng_state()  # building static sources draws initial weights that are replaced at once
        self.adversary = make_adversary(setup, job, self.model, self.total)
        torch.set_rng_state(dropout)
        self.monitor = make_monitor(setup, job, self.model)
        self.meter = Meter(setup.device, world=world)
        self.buffers = list(self.model.buffers())
        self.step, self.seconds = 0, 0.0
        self.since: int | None = None  # the next line covers steps after this one alone; None: all since the last line

    def _make_model(self) -> nn.Module:
        """The network with its initial weights, alike on all ranks; torch's generators are left ready for dropout."""
        setup, job = self.setup, self.job
        torch.manual_seed(derive_seed(job.seed, "weights"))
        model = prepare(setup.config, setup.build(job.spec))
        if job.init is not None:
            models.load_weights(model, job.init)
        if setup.ranks.world > 1 and setup.config.sync_bn:
            model = sync_norm.convert(model)
        if setup.ranks.rank:
            torch.manual_seed(derive_seed(job.seed, "rank", setup.ranks.rank))  # each rank's dropout is its own
        return model

    @property
    def is_monitored_step(self) -> bool:
        """Does the monitor look at the model after this step, an epoch's last?"""
        return self.monitor is not None and self.step % self.per_epoch == 0

    @property
    def images(self) -> int:
        """Images of the data set that all ranks have seen."""
        at = self.stream.sampler
        return at.epoch * at.n + at.position

    def advance(self, x: Tensor, y: Tensor, index: Tensor) -> tuple[float, int]:
        """One step on this rank's part of a global batch; its learning rate and its source."""
        config, ranks, images = self.setup.config, self.setup.ranks, len(y)
        lr = learning_rate(config, self.step, self.total, self.per_epoch)
        part = Part(ranks.rank, ranks.world, self.stream.global_size)
        if not images:  # all of its files are damaged: the others wait for gradients all the same
            x, y, index = x.new_zeros(1, *x.shape[1:]), y.new_zeros(1), index.new_zeros(1)
        self.update.clear()
        with self.meter.span("attack"), self.update.autocast():
            batches = self.adversary.micro(config.accumulate, x, y, index, part)
        with self.meter.span("train"):
            ours, whole = Counts.total(b.counts for b in batches), batches[0].all_counts
            scale = ranks.world * ours.share(whole, self.job.recipe.lam) if images else 0.0
            loss, logits = self.update(batches, lr, scale=scale, index=index)
            ranks.copy(self.buffers)
        if images:
            self.meter.add(loss, logits, *labels(batches), images=images)
        self.step += 1
        return lr, batches[0].source

    def watch(self) -> dict[str, Any] | None:
        """What the monitor sees after an epoch, on rank 0."""
        if self.monitor is None or not self.is_monitored_step or not self.setup.ranks.main:
            return None
        found = self.monitor(self.step)
        return None if found is None else found.to_dict()

    def check_finite(self) -> None:
        """Report the steps whose gradients were not finite, with the images that they were computed on.

        FloatingPointError where config.nan is "stop", else a warning. It waits for the device; every rank calls it.
        """
        found, folder = self.update.nonfinite(), self.setup.folder
        if found is None:
            return
        index = self.setup.ranks.gather(found.index)
        stop = self.setup.config.nan == "stop"
        if index is not None:  # rank 0
            attacked = self.job.recipe.attack is not None and found.step >= self.adversary.start_step
            source = self.adversary.source_at(found.step) if attacked else -1
            logs.append(folder / NONFINITE, {"job": self.job.name, "step": found.step + 1, "source": source,
                                             "count": found.count, "by": self.step, "skipped": not stop,
                                             "index": index})
        message = (f"train: {self.job.name}: the gradients of step {found.step + 1} are not finite ({found.count} such "
                   f"steps up to step {self.step}); the positions of its images in the data set are in "
                   f"{folder / NONFINITE}")
        if stop:
            raise FloatingPointError(f"{message}. No later step is saved: --resume --nan skip goes on without such "
                                     "steps, or take a smaller --lr or a --clip")
        if self.setup.ranks.main:
            warnings.warn(f"{message}. They are left out", stacklevel=2)

    def open_log(self) -> logs.Log:
        """Where this job's log lines go, from this step on."""
        return logs.Log(self.setup.folder, self.job.name, tensorboard=self.setup.config.tensorboard, step=self.step)

    def line(self) -> dict[str, Any]:
        """What happened on all ranks since the last line; the one place where the host waits for the device."""
        stream = self.stream

        def reduce(sums: Tensor) -> Tensor:  # a NaN after the sums stands for bad gradients: one read has both
            bad = torch.where(self.update.watch.seen, torch.nan, 0.0).double().view(1)
            return torch.cat([self.setup.ranks.sum(sums), bad])

        record = self.meter.line(reduce, skipped=stream.corrupt)
        if self.since is not None:
            record, self.since = {**record, "since": self.since}, None
        if not record["finite"]:
            self.check_finite()
        if record["skipped"] > stream.limit:
            raise data.CorruptImages(f"train: {self.job.name}: at most {stream.limit} images of an epoch may be "
                                     f"damaged (--max-corrupt), got {record['skipped']} on all ranks together")
        return record

    def save(self) -> None:
        """Write the checkpoint, with the generators of every rank; every rank calls it. The last one is the result,
        and those before it are deleted then."""
        self.check_finite()
        setup = self.setup
        told = setup.ranks.gather((_get_rng(setup.device), self.meter.state_dict()))
        if told is None:  # not rank 0
            return
        rng, counted = zip(*told, strict=True)
        path, checkpoints = self.job.path(setup.folder), self.job.checkpoints(setup.folder, setup.config.keep)
        checkpoints.save({
            "job": self.job.name, "spec": self.job.spec, "step": self.step, "seconds": self.seconds,
            "model": self.model.state_dict(), **self.update.state_dict(), "adversary": self.adversary.state_dict(),
            "sampler": self.stream.state_dict(), "rng": list(rng), "meter": Meter.total(list(counted)),
            "monitor": self.monitor and self.monitor.state_dict()})
        checkpoints.publish(self.step, path)
        if self.step == self.total:
            checkpoints.forget()

    def resume(self) -> None:
        """Go on where the newest whole checkpoint stops, if there is one: rank 0 finds it, all of them read it."""
        ranks, job, folder = self.setup.ranks, self.job, self.setup.folder
        state = job.settle(folder) if ranks.main else None
        step = ranks.tell(state and state["step"])
        if step is None:
            return
        if state is None:
            path = job.checkpoints(folder).path(step)
            state = checkpoints.load(path if path.exists() else job.path(folder))
        ranks.same("the checkpoint's step", state["step"])
        if state["step"] == self.total:  # the training is over: the rest of the state is not needed
            if ranks.main:
                job.checkpoints(folder).forget()
            self.step, self.seconds = state["step"], state["seconds"]
            return
        try:
            self.load(state)
        except KeyError as e:
            raise ValueError(f"train: the checkpoint of {job.name} in {folder} is of another version: it has no {e}; "
                             "delete it to train this model again") from e

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, also one of another number of ranks: ranks that it has no generators of keep their
        own."""
        self.model.load_state_dict(state["model"])
        self.update.load_state_dict(state)
        self.adversary.load_state_dict(state["adversary"])
        self.stream.load_state_dict(state["sampler"])
        if self.setup.ranks.rank < len(state["rng"]):
            _set_rng(state["rng"][self.setup.ranks.rank], self.setup.device)
        self.step, self.seconds = state["step"], state["seconds"]
        if "meter" not in state:  # of version 0.1
            self.since = self.step
        elif self.setup.ranks.main:
            self.meter.load_state_dict(state["meter"])
        if self.monitor and state.get("monitor"):
            self.monitor.load_state_dict(state["monitor"])


def _parallel(model: nn.Module, device: torch.device) -> nn.parallel.DistributedDataParallel:
    """`model` with gradients that are averaged over the ranks. Buffers are left alone: `Training.advance` copies them
    after a step, in time for the attack's forward passes; DDP would copy them before the next training forward."""
    ddp = nn.parallel.DistributedDataParallel
    buffers = "forward_sync_buffers"  # of torch 2.13 and later
    buffers = buffers if buffers in inspect.signature(ddp).parameters else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False}
    return ddp(model, device_ids=[device] if device.type == "cuda" else None, **options)


def _get_rng(device: torch.device) -> dict[str, Any]:
    """The states of torch's generators in this process: the CPU's, and its GPU's."""
    return {"cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def _set_rng(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
