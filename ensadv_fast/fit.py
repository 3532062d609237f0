"""The one loop that trains a network."""
from __future__ import annotations

import functools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint, data, models, ops, workers
from .adversary import EnsembleAdversary, EpsDistribution
from .config import Config
from .data import derive_seed
from .diagnose.monitor import OverfittingMonitor
from .optimizers import learning_rate
from .recipes import Recipe, make_attack
from .source import Source
from .training_loss import TrainingLossSource
from .update import Update


@dataclass(frozen=True)
class Job:
    """One network to train: `name` is its checkpoint's, `seed` decides all that is random in it, and `static` are
    the specs, with checkpoints, of the static sources it is trained on. `init`: a file of weights to start from."""

    name: str
    spec: str
    recipe: Recipe
    seed: int
    epochs: int
    static: tuple[str, ...] = ()
    init: str | None = None

    def path(self, folder: Path) -> Path:
        return folder / "models" / f"{self.name}.pt"


@dataclass(frozen=True)
class Run:
    """What all jobs of a run share."""

    config: Config
    folder: Path
    dataset: data.Dataset
    device: torch.device
    progress: bool

    @staticmethod
    @functools.lru_cache(maxsize=1)
    def open(config: Config, folder: Path, progress: bool) -> Run:
        """The run as this process sees it: each worker loads the data once."""
        device = models.device(config.device)
        return Run(config, folder, data.load(config.data).to(device), device, progress)

    def build(self, spec: str, download: bool = False) -> nn.Module:
        return models.build(spec, self.dataset.classes, self.dataset.in_shape, download).to(self.device)

    def log(self, record: dict[str, Any]) -> None:
        with open(self.folder / "metrics.jsonl", "a") as f:  # one short write: lines of other workers stay whole
            f.write(json.dumps(record) + "\n")

    def bar(self, **options: Any) -> tqdm:
        return tqdm(disable=None if self.progress else True, dynamic_ncols=True, unit_scale=True,
                    position=workers.bar_position, leave=workers.bar_position is None, **options)


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
    index = next(iter(data.Sampler(len(train), n, seed, run.device)))
    return OverfittingMonitor(model, *train.batch(index), eps=run.config.eps, key=ops.fresh_key("cpu", seed))


def make_source(config: Config, model: nn.Module, crafting: str = "eval", loss: str = "plain") -> Source:
    """A frozen source of the model. loss: "plain", or "training" (`Recipe.crafting_loss`)."""
    dtype = config.source_dtype if config.source_dtype == "auto" else getattr(torch, config.source_dtype)
    net, mean, std = models.parts(model)
    if loss == "plain":
        return Source(net, mean=mean, std=std, dtype=dtype, crafting=crafting)
    return TrainingLossSource(net, smoothing=config.label_smoothing, aux=config.aux, mean=mean, std=std, dtype=dtype,
                              crafting=crafting)


class Training:
    """A job under way: everything that moves in it, and what of that its checkpoint holds."""

    def __init__(self, run: Run, job: Job) -> None:
        config = run.config
        self.job = job
        torch.manual_seed(derive_seed(job.seed, "weights"))
        self.model = run.build(job.spec)
        if job.init is not None:
            models.load_weights(self.model, job.init)
        self.update = Update(config, self.model, job.recipe.lam, run.device)
        self.sampler = data.Sampler(len(run.dataset.train), config.batch_size, derive_seed(job.seed, "order"),
                                    run.device)
        self.total = job.epochs * len(self.sampler)  # steps
        dropout = torch.get_rng_state()  # building static sources draws initial weights that are replaced at once
        self.adversary = make_adversary(run, job, self.model, self.total)
        torch.set_rng_state(dropout)
        self.monitor = make_monitor(run, job, self.model)
        self.step, self.seconds = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"job": self.job.name, "spec": self.job.spec, "step": self.step, "seconds": self.seconds,
                "model": self.model.state_dict(), **self.update.state_dict(), "adversary": self.adversary.state_dict(),
                "sampler": self.sampler.state_dict(), "rng": _rng(),
                "monitor": self.monitor and self.monitor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.update.load_state_dict(state)
        self.adversary.load_state_dict(state["adversary"])
        self.sampler.load_state_dict(state["sampler"])
        _set_rng(state["rng"])
        self.step, self.seconds = state["step"], state["seconds"]
        if self.monitor and state.get("monitor"):
            self.monitor.load_state_dict(state["monitor"])


def fit(run: Run, job: Job) -> float:
    """Train one network, or go on where its checkpoint stops; the seconds it took. Its checkpoint is the result.

    A job depends on its seed, the config and the static sources alone: not on the jobs before or beside it, and (on
    the CPU, bit for bit) not on whether it was interrupted.
    """
    config, train, path = run.config, run.dataset.train, job.path(run.folder)
    t = Training(run, job)
    if path.exists():
        t.load_state_dict(checkpoint.load(path))
    sampler, per_epoch, before = t.sampler, len(t.sampler), t.seconds
    save_every = config.save_every or per_epoch
    start = last = time.perf_counter()
    seen = 0
    t.model.train()
    with run.bar(total=job.epochs * len(train), initial=sampler.epoch * len(train) + sampler.position,
                 unit=" images", desc=job.name) as bar:
        while t.step < t.total:
            for index in sampler:
                lr = learning_rate(config, t.step, t.total, per_epoch)
                x, y = train.batch(index)
                t.update.clear()
                with t.update.autocast():
                    batch = t.adversary(x, y, index)
                loss, logits = t.update(batch, lr)
                t.step += 1
                seen += len(index)
                bar.update(len(index))
                watch = t.monitor(t.step) if t.monitor and t.step % per_epoch == 0 else None
                if t.step % config.log_every == 0 or t.step == t.total or watch:
                    now = time.perf_counter()
                    measured = _measured(logits, batch.y, batch.is_adv)
                    run.log({"job": job.name, "step": t.step, "epoch": sampler.epoch, "loss": loss.item(), **measured,
                             "lr": lr, "source": batch.source, "images_per_second": seen / (now - last),
                             "monitor": watch and watch.to_dict()})
                    bar.set_postfix({k: f"{v:.3f}" for k, v in measured.items() if v is not None}, refresh=False)
                    last, seen = now, 0
                if t.step % save_every == 0 or t.step == t.total:
                    t.seconds = before + time.perf_counter() - start
                    checkpoint.save(path, t.state_dict())
    t.seconds = before + time.perf_counter() - start
    if bar.disable and run.progress:  # no terminal: a line for each network instead of the bar
        print(f"{job.name}: {t.step} steps, {t.seconds:.0f} s", file=sys.stderr, flush=True)
    return t.seconds


@torch.no_grad()
def _measured(logits: Tensor, y: Tensor, is_adv: Tensor) -> dict[str, float | None]:
    """Mean cross-entropy and accuracy of the clean and of the adversarial samples of a batch; None where there are
    none."""
    values = {"loss": F.cross_entropy(logits.float(), y, reduction="none"), "accuracy": (logits.argmax(1) == y).float()}
    return {f"{part}_{name}": v[mask].mean().item() if mask.any() else None
            for name, v in values.items() for part, mask in (("clean", ~is_adv), ("adv", is_adv))}


def _rng() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
