"""The training driver: what is trained and how (the dataclasses on top), and the one loop that trains it.

A run trains source networks, then targets by one or more presets and seeds, shows all of them to white-box and
transferred attacks, and leaves everything in one folder. `python -m ensadv_fast train` with no arguments is the main
job: on 4,000 real MNIST digits, a plain, an adversarially trained and an ensemble-adversarially trained network D.
"""
from __future__ import annotations

import functools
import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import attacks, checkpoint, data, evaluate, models, ops, report, samples, workers
from .adversary import EnsembleAdversary, EpsDistribution, mixed_cross_entropy
from .data import derive_seed
from .diagnose.monitor import OverfittingMonitor
from .source import Source

# ------------------------------------------------------------------------------------------------ presets


@dataclass(frozen=True)
class Recipe:
    """How a model is trained adversarially. `suffix` names the result: D, D_adv, D_ens."""

    suffix: str = ""
    attack: str | attacks.Attack | None = None  # a name in ATTACKS, or any attack; None trains on clean images only
    rule: str | None = None  # the label the attack uses; None leaves the attack's own
    step: float | None = None  # in units of eps, of iterative attacks
    steps: int | None = None
    static: bool = False  # static sources besides the live model
    fraction: float = 0.5
    mix: str = "replace"
    lam: float = 1.0
    eps_dist: str = "fixed"
    select: str = "uniform"
    crafting: str = "eval"
    delay: float = 0.0  # the share of all steps that comes before the first adversarial batch


PRESETS = {
    "plain": Recipe(),
    # The released MNIST code (Tramer et al.): doubled batch, half and half, the source's predicted label, dropout
    # active while crafting; without static sources it is their "standard" adversarial training.
    "fgsm-at": Recipe("_adv", "fgsm", rule="predicted", mix="append", crafting="train"),
    "tramer": Recipe("_ens", "fgsm", rule="predicted", mix="append", crafting="train", static=True),
    # Kurakin et al., Algorithm 1: k = m/2 replaced, lambda 0.3, eps per sample; adversarial examples from iteration
    # 10,000 of about 150,000 on.
    "kurakin": Recipe("_kurakin", "step_ll", lam=0.3, eps_dist="truncated_normal", delay=1 / 15),
    # Wong et al., "Fast is better than free" (ICLR 2020): uniform start, one step of 1.25 eps, crafted in train mode.
    "fast-at": Recipe("_fast", "pgd", step=1.25, steps=1, fraction=1.0, crafting="train"),
    # Madry et al. (ICLR 2018): adversarial batch only.
    "pgd-at": Recipe("_pgd", "pgd", steps=10, fraction=1.0),
}
MAIN = ("plain", "fgsm-at", "tramer")

ITERATIVE = ("ifgsm", "iter_ll", "pgd", "mifgsm", "nifgsm", "difgsm", "tifgsm", "sinifgsm", "vmifgsm", "vnifgsm")
ATTACKS = ("fgsm", "rand_fgsm", "step_ll", "rand_step_ll", "step_rnd", *ITERATIVE, "cw_linf", "fast_grad_l2",
           "fast_grad_linf", "fast_entropy", "random_sign", "random_normal")


def make_attack(name: str, eps: float, *, alpha: float | None = None, step: float | None = None,
                steps: int | None = None, rule: str | None = None) -> attacks.BaseAttack:
    """The attack of this name. alpha, step: in units of eps, for those attacks that have one; None is the attack's
    own default. ValueError for a name that is not in ATTACKS."""
    if name not in ATTACKS:
        raise ValueError(f"attack: got {name!r}, want one of {', '.join(ATTACKS)}")
    options: dict[str, Any] = {} if rule is None else {"rule": rule}
    if name.startswith("rand_") and alpha is not None:
        options["alpha"] = alpha * eps
    iterative = name in ITERATIVE
    if iterative and steps is not None:
        options["steps"] = steps
    attack = getattr(attacks, name)(eps=eps, **options)
    # A step in units of eps, so that it follows an eps drawn per sample.
    return replace(attack, step=None, step_over_eps=step) if iterative and step is not None else attack


# ------------------------------------------------------------------------------------------------- config


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; each field is an option of `ensadv-fast train`. The defaults are the main job.

    Options that default to None leave the choice to the preset.
    """

    preset: str = _option("main", f"how targets are trained: main (= {','.join(MAIN)}) or one or more of "
                          f"{', '.join(PRESETS)}, separated by commas")
    data: str = _option("digits", "digits, mnist[:DIR], fashion-mnist[:DIR] or cifar10[:DIR]")
    model: str = _option("mnist:D", "the target: mnist:A|B|C|C_tanh|D, timm:NAME, torchvision:NAME, "
                         "package.module:callable")
    static: tuple[str, ...] = _option(("mnist:B", "mnist:D"), "static sources, each optionally with =CHECKPOINT; "
                                      "those without are trained first")
    held_out: tuple[str, ...] = _option(("mnist:A",), "sources that no target is trained on")
    eps: float = _option(0.3, "the L-infinity budget in image units, e.g. 0.3 or 8/255")
    epochs: int = _option(16, "epochs of each target")
    source_epochs: int = _option(6, "epochs of each source that is trained here")
    batch_size: int = _option(64, "clean images in a training step")
    optimizer: str = _option("adam", "adam, sgd (Nesterov 0.9) or rmsprop (decay 0.9, eps 1, as for Inception)")
    lr: float = _option(1e-3, "peak learning rate")
    schedule: str = _option("constant", "constant, cosine, cyclic (up to 2/5 of the steps, then down) or decay "
                            "(x 0.94 every two epochs)")
    weight_decay: float = _option(0.0, "weight decay")
    label_smoothing: float = _option(0.0, "label smoothing")
    attack: str | None = _option(None, f"training attack: {', '.join(ATTACKS)}")
    rule: str | None = _option(None, "label of the training attack: true, predicted, least_likely, random")
    step: float | None = _option(None, "step of an iterative training attack, in units of eps")
    steps: int | None = _option(None, "steps of an iterative training attack")
    fraction: float | None = _option(None, "share of the batch that is replaced by adversarial examples")
    mix: str | None = _option(None, "replace, or append (the doubled batch)")
    lam: float | None = _option(None, "weight of adversarial examples in the loss")
    eps_dist: str | None = _option(None, "eps per example: fixed, uniform, truncated_normal")
    select: str | None = _option(None, "how the source of a batch is chosen: uniform, rotate")
    crafting: str | None = _option(None, "eval, or train (dropout active while crafting)")
    delay: float | None = _option(None, "share of the steps before the first adversarial batch")
    alpha: float = _option(1 / 6, "random part of R+FGSM in units of eps (the MNIST code: 0.05 of 0.3)")
    eval_steps: int = _option(10, "steps of I-FGSM and PGD in the evaluation")
    eval_batch_size: int = _option(250, "images in an evaluation batch")
    seed: int = _option(0, "the first seed")
    seeds: int = _option(3, "how many seeds each target is trained with; sources are shared by all")
    dtype: str = _option("float32", "of training: float32 or bfloat16 (autocast)")
    source_dtype: str = _option("auto", "of crafting on static and held-out sources: auto, float32 or bfloat16")
    download: bool = _option(False, "let timm and torchvision download pretrained weights of sources")
    device: str = _option("auto", "auto, cpu or cuda")
    workers: int = _option(0, "processes that train and evaluate different networks at the same time; 0: one a core on "
                           "the CPU, one on a GPU")
    threads: int = _option(0, "CPU threads of each worker; 0: the cores divided among the workers")
    save_every: int = _option(0, "steps between checkpoints; 0: once an epoch")
    log_every: int = _option(50, "steps between lines of metrics.jsonl")
    monitor: int = _option(64, "training images on which adversarial training is watched for catastrophic overfitting, "
                           "after each epoch; 0: none")

    def __post_init__(self) -> None:
        for name in ("epochs", "source_epochs", "batch_size", "eval_steps", "eval_batch_size", "seeds",
                     "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name}: got {getattr(self, name)}, want at least 1")
        if self.monitor < 0:
            raise ValueError(f"train: monitor: got {self.monitor}, want 0 or more")
        for name in ("eps", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"train: {name}: got {getattr(self, name)}, want a positive number")
        for name, wanted in (("optimizer", ("adam", "sgd", "rmsprop")),
                             ("schedule", ("constant", "cosine", "cyclic", "decay")),
                             ("dtype", ("float32", "bfloat16")),
                             ("eps_dist", (None, "fixed", "uniform", "truncated_normal")),
                             ("attack", (None, *ATTACKS))):
            if getattr(self, name) not in wanted:
                raise ValueError(f"train: {name}: got {getattr(self, name)!r}, want one of "
                                 f"{', '.join(w for w in wanted if w)}")
        for name, recipe in self.recipes().items():
            if recipe.static and not self.static:
                raise ValueError(f"train: preset {name} needs at least one static source (--static)")
        for spec in (self.model, *self.static, *self.held_out):
            models.parse(spec)

    def recipes(self) -> dict[str, Recipe]:
        """The presets of this run with the options that override them."""
        names = MAIN if self.preset == "main" else tuple(self.preset.split(","))
        if unknown := [n for n in names if n not in PRESETS]:
            raise ValueError(f"train: preset: got {unknown[0]!r}, want main or one or more of {', '.join(PRESETS)}")
        given = {f.name: getattr(self, f.name) for f in fields(Recipe)
                 if f.name not in ("suffix", "static") and getattr(self, f.name) is not None}
        return {n: PRESETS[n] if PRESETS[n].attack is None else replace(PRESETS[n], **given) for n in names}


# What may differ when a run is resumed: nothing that its numbers depend on.
RUNTIME_OPTIONS = ("device", "workers", "threads", "save_every", "log_every", "monitor")


# ------------------------------------------------------------------------------------------ the one loop


@dataclass(frozen=True)
class Job:
    """One network to train: `name` is its checkpoint's, `seed` decides all that is random in it, and `static` are
    the specs, with checkpoints, of the static sources it is trained on."""

    name: str
    spec: str
    recipe: Recipe
    seed: int
    epochs: int
    static: tuple[str, ...] = ()

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


def learning_rate(config: Config, step: int, total: int, per_epoch: int) -> float:
    """The learning rate of a step: a function of the step alone, so nothing of it needs saving."""
    t = step / total
    factor = {"constant": 1.0,
              "cosine": 0.5 * (1 + math.cos(math.pi * t)),
              "cyclic": t / 0.4 if t < 0.4 else (1 - t) / 0.6,
              "decay": 0.94 ** (step // (2 * per_epoch))}[config.schedule]
    return config.lr * factor


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **options)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(model.parameters(), alpha=0.9, eps=1.0, **options)
    return torch.optim.Adam(model.parameters(), **options)


def make_adversary(run: Run, job: Job, model: nn.Module, total: int) -> EnsembleAdversary:
    """The adversary of a job's recipe; a recipe without an attack yields clean batches."""
    config, r = run.config, job.recipe
    if r.attack is None:
        return EnsembleAdversary(model, fraction=0.0, key=ops.fresh_key("cpu", job.seed))
    attack = r.attack if not isinstance(r.attack, str) else make_attack(
        r.attack, config.eps, alpha=config.alpha, step=r.step, steps=r.steps, rule=r.rule)
    return EnsembleAdversary(
        model, [make_source(config, run.build(s, config.download), r.crafting) for s in job.static], attack,
        fraction=r.fraction, mix=r.mix, select=r.select, crafting=r.crafting, start_step=round(r.delay * total),
        eps_dist=None if r.eps_dist == "fixed" else EpsDistribution(config.eps, r.eps_dist),
        key=ops.fresh_key("cpu", derive_seed(job.seed, "adversary")))


def make_monitor(run: Run, job: Job, model: nn.Module) -> OverfittingMonitor | None:
    """The watch over an adversarially trained model, on images of its own training set."""
    train, n = run.dataset.train, min(run.config.monitor, len(run.dataset.train))
    if job.recipe.attack is None or not n:
        return None
    seed = derive_seed(job.seed, "monitor")
    index = next(iter(data.Sampler(len(train), n, seed, run.device)))
    return OverfittingMonitor(model, *train.batch(index), eps=run.config.eps, key=ops.fresh_key("cpu", seed))


def make_source(config: Config, model: nn.Module, crafting: str = "eval") -> Source:
    dtype = config.source_dtype if config.source_dtype == "auto" else getattr(torch, config.source_dtype)
    return Source(model, dtype=dtype, crafting=crafting)


def fit(run: Run, job: Job) -> float:
    """Train one network, or go on where its checkpoint stops; the seconds it took. Its checkpoint is the result.

    A job depends on its seed, the config and the static sources alone: not on the jobs before or beside it, and (on
    the CPU, bit for bit) not on whether it was interrupted.
    """
    config, train, path = run.config, run.dataset.train, job.path(run.folder)
    torch.manual_seed(derive_seed(job.seed, "weights"))
    model = run.build(job.spec)
    optimizer = make_optimizer(config, model)
    sampler = data.Sampler(len(train), config.batch_size, derive_seed(job.seed, "order"), run.device)
    total = job.epochs * len(sampler)
    dropout = torch.get_rng_state()  # building static sources draws initial weights that are replaced at once
    adversary = make_adversary(run, job, model, total)
    torch.set_rng_state(dropout)
    monitor = make_monitor(run, job, model)
    step, before = 0, 0.0
    if path.exists():
        state = checkpoint.load(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        adversary.load_state_dict(state["adversary"])
        sampler.load_state_dict(state["sampler"])
        _set_rng(state["rng"])
        step, before = state["step"], state["seconds"]
        if monitor and state.get("monitor"):
            monitor.load_state_dict(state["monitor"])
    save_every = config.save_every or len(sampler)
    autocast = torch.autocast(run.device.type, torch.bfloat16) if config.dtype == "bfloat16" else nullcontext()
    start = last = time.perf_counter()
    seen = 0
    model.train()
    with run.bar(total=job.epochs * len(train), initial=sampler.epoch * len(train) + sampler.position,
                 unit=" images", desc=job.name) as bar:
        while step < total:
            for index in sampler:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, step, total, len(sampler))
                x, y = train.batch(index)
                optimizer.zero_grad(set_to_none=True)  # crafting and the forward pass can use their memory
                with autocast:
                    batch = adversary(x, y, index)
                with autocast:  # entered anew: its cached casts of the weights may stem from a forward without grad
                    logits = model(batch.x)
                loss = mixed_cross_entropy(logits, batch.y, batch.is_adv, job.recipe.lam, config.label_smoothing)
                loss.backward()
                optimizer.step()
                step += 1
                seen += len(index)
                bar.update(len(index))
                watch = monitor(step) if monitor and step % len(sampler) == 0 else None
                if step % config.log_every == 0 or step == total or watch:
                    now = time.perf_counter()
                    measured = _measured(logits, batch.y, batch.is_adv)
                    run.log({"job": job.name, "step": step, "epoch": sampler.epoch, "loss": loss.item(), **measured,
                             "lr": group["lr"], "source": batch.source, "images_per_second": seen / (now - last),
                             "monitor": watch and watch.to_dict()})
                    bar.set_postfix({k: f"{v:.3f}" for k, v in measured.items() if v is not None}, refresh=False)
                    last, seen = now, 0
                if step % save_every == 0 or step == total:
                    checkpoint.save(path, {
                        "job": job.name, "spec": job.spec, "step": step, "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(), "adversary": adversary.state_dict(),
                        "sampler": sampler.state_dict(), "rng": _rng(), "monitor": monitor and monitor.state_dict(),
                        "seconds": before + time.perf_counter() - start})
    seconds = before + time.perf_counter() - start
    if bar.disable and run.progress:  # no terminal: a line for each network instead of the bar
        print(f"{job.name}: {step} steps, {seconds:.0f} s", file=sys.stderr, flush=True)
    return seconds


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


# ------------------------------------------------------------------------------------------------ the run


def open_folder(config: Config, folder: Path, resume: bool) -> None:
    """Start the run folder, or check that it is the one of this config."""
    path = folder / "config.json"
    if not path.exists():
        (folder / "models").mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(path, asdict(config))
        return
    if not resume:
        raise FileExistsError(f"train: {folder} already holds a run: go on with it by --resume {folder}, or give "
                              "another folder")
    saved = asdict(load_config(folder))
    different = [k for k, v in asdict(config).items() if v != saved[k] and k not in RUNTIME_OPTIONS]
    if different:
        raise ValueError(f"train: the run in {folder} was started with other options: " + ", ".join(
            f"{k} = {saved[k]!r}, now {getattr(config, k)!r}" for k in different))


def load_config(folder: Path) -> Config:
    """The config of the run in this folder. FileNotFoundError, or ValueError where it is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"train: no run in {folder} (there is no {path})")
    try:
        saved = json.loads(path.read_text())
        return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
    except (ValueError, TypeError) as e:
        raise ValueError(f"train: {path} is corrupt or of another version ({e})") from e


def unique(specs: tuple[str, ...], taken: dict[str, Any], by_file: bool = False) -> dict[str, str]:
    """Short names for specs that differ from each other and from `taken`: D, D_2. by_file: those that would share one
    take their checkpoint's: D_adv-seed0."""
    names: dict[str, str] = {}
    short = [models.short_name(spec) for spec in specs]
    for spec, base in zip(specs, short, strict=True):
        file = models.parse(spec)[2]
        if by_file and file is not None and (short.count(base) > 1 or base in taken):
            base = Path(file).stem
        i, name = 2, base
        while name in names or name in taken:
            name, i = f"{base}_{i}", i + 1
        names[name] = spec
    return names


def plan(config: Config, folder: Path) -> tuple[dict[str, Job | str], dict[str, dict[int, Job]]]:
    """The sources by name, each a job or the spec of a network that exists, and the targets by name and seed."""
    static = unique(config.static, {})
    held_out = unique(config.held_out, static)
    sources: dict[str, Job | str] = {}
    for name, spec in (static | held_out).items():
        family, _, file = models.parse(spec)
        exists = file is not None or (config.download and family in ("timm", "torchvision"))
        # Sources have seeds of their own: also a static D is another network than any target D.
        sources[name] = spec if exists else Job(f"source-{name}", spec, PRESETS["plain"],
                                                derive_seed(config.seed, "source", name), config.source_epochs)
    targets: dict[str, dict[int, Job]] = {}
    for recipe in config.recipes().values():
        name = models.short_name(config.model) + recipe.suffix
        specs = tuple(trained(sources[s], folder) for s in static) if recipe.static else ()
        targets[name] = {seed: Job(f"{name}-seed{seed}", config.model, recipe, derive_seed(seed, "target"),
                                   config.epochs, specs) for seed in range(config.seed, config.seed + config.seeds)}
    return sources, targets


def trained(network: Job | str, folder: Path) -> str:
    """The spec of a network with the checkpoint that its job leaves."""
    return network if isinstance(network, str) else f"{network.spec}={network.path(folder)}"


def forget_unsaved(folder: Path, jobs: list[Job]) -> None:
    """Drop what an interrupted run wrote after its last checkpoints: half-written files, and metrics that will
    come again."""
    for half in folder.rglob("*.tmp"):
        half.unlink()
    steps = {job.name: checkpoint.load(job.path(folder))["step"] for job in jobs if job.path(folder).exists()}
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and (r := json.loads(line))["step"] <= steps.get(r["job"], 0)]
    checkpoint.atomic_write(path, lambda f: f.write("".join(kept).encode()))


def run(config: Config, folder: str | Path, *, resume: bool = False, progress: bool = True,
        say: Callable[[str], object] = print) -> dict[str, Any]:
    """Train and evaluate everything that `config` asks for in `folder`; the contents of results.json.

    resume: go on with the run that is in the folder; its trained networks are kept, interrupted ones continue.
    progress: show bars where stderr is a terminal. say: where the table goes. With more than one worker, processes
    are spawned: a script that calls this needs the usual `if __name__ == "__main__":`.
    Raises FileNotFoundError, FileExistsError, ValueError (bad options, corrupt files).
    """
    begin = time.perf_counter()
    folder = Path(folder)
    shared = Run.open(config, folder, progress)
    open_folder(config, folder, resume)
    sources, targets = plan(config, folder)
    everyone = [job for per_seed in targets.values() for job in per_seed.values()]
    forget_unsaved(folder, [*(s for s in sources.values() if isinstance(s, Job)), *everyone])
    n = config.workers or (1 if shared.device.type == "cuda" else min(workers.cores(), len(sources) + len(everyone)))
    threads = config.threads or max(1, workers.cores() // n)
    if n == 1 and shared.device.type == "cpu":
        torch.set_num_threads(threads)
    with workers.pool(n, threads) as executor:
        seconds = train_all(executor, shared, sources, targets)
        middle = time.perf_counter()
        matrix = assess_all(executor, shared, sources, targets)
    roles = {name: "static" if i < len(config.static) else "held_out" for i, name in enumerate(sources)}
    roles = dict(sorted(roles.items(), key=lambda item: item[1]))  # held-out ones first
    now = time.perf_counter()
    results = report.results(matrix, shared.dataset.name, config.eps, roles, targets, {
        "train": seconds, "training": middle - begin, "evaluation": now - middle, "total": now - begin,
        "workers": n, "threads_per_worker": threads})
    report.save(folder, results)
    _samples(shared, sources, targets).save(folder / samples.FILE)
    report.write(folder)
    say(report.text(results))
    return results


def train_all(executor: Executor, run: Run, sources: dict[str, Job | str],
              targets: dict[str, dict[int, Job]]) -> dict[str, float]:
    """Train every network that is not trained yet: the sources, and targets as soon as the static sources are
    there, the costly ones first. The seconds of each."""
    def submit(job: Job) -> Future:
        return executor.submit(fit_job, run.config, run.folder, run.progress, job)

    futures = {job.name: submit(job) for job in sources.values() if isinstance(job, Job)}
    for name in list(sources)[:len(run.config.static)]:
        if isinstance(job := sources[name], Job):
            futures[job.name].result()
    for per_seed in reversed(targets.values()):
        futures |= {job.name: submit(job) for job in per_seed.values()}
    for future in as_completed(futures.values()):
        future.result()  # raises the first error at once, which ends the other workers
    return {name: future.result() for name, future in futures.items()}


def fit_job(config: Config, folder: Path, progress: bool, job: Job) -> float:
    """`fit`, in whatever process it is called."""
    with torch.backends.cudnn.flags(benchmark=False, deterministic=True):
        return fit(Run.open(config, folder, progress), job)


def evaluation_attacks(config: Config) -> dict[str, attacks.BaseAttack]:
    """FGSM, R+FGSM, I-FGSM (steps of eps/steps, as in the released MNIST code) and PGD."""
    return {"fgsm": make_attack("fgsm", config.eps),
            "rand_fgsm": make_attack("rand_fgsm", config.eps, alpha=config.alpha),
            "ifgsm": make_attack("ifgsm", config.eps, step=1 / config.eval_steps, steps=config.eval_steps),
            "pgd": make_attack("pgd", config.eps, steps=config.eval_steps)}


def assess_all(executor: Executor, run: Run, sources: dict[str, Job | str],
               targets: dict[str, dict[int, Job]]) -> evaluate.TransferMatrix:
    """Every source's examples shown to every target, and every target's own to itself."""
    specs = {job.name: trained(job, run.folder) for per_seed in targets.values() for job in per_seed.values()}
    todo = [({name: trained(network, run.folder)}, specs) for name, network in reversed(sources.items())]
    todo += [({name: spec}, {name: spec}) for name, spec in specs.items()]
    futures = [executor.submit(assess, run.config, run.folder, run.progress, *names) for names in todo]
    matrix = evaluate.TransferMatrix()
    for future in tqdm(as_completed(futures), total=len(futures), desc="evaluation",
                       disable=None if run.progress else True):
        matrix = matrix.merge(future.result())
    return matrix


def assess(config: Config, folder: Path, progress: bool, sources: dict[str, str],
           targets: dict[str, str]) -> evaluate.TransferMatrix:
    """The attacks of the evaluation, from these sources on these targets, both given as name -> spec. A target is
    attacked as it is, another network as a `Source`."""
    run = Run.open(config, folder, progress)
    networks = {name: run.build(spec).eval() for name, spec in targets.items()}
    crafting = {name: networks[name] if name in networks else make_source(config, run.build(spec, config.download))
                for name, spec in sources.items()}
    with torch.backends.cudnn.flags(benchmark=False, deterministic=True):
        return evaluate.transfer_matrix(networks, crafting, evaluation_attacks(config),
                                        run.dataset.test.batches(config.eval_batch_size), key=_evaluation_key(config))


def _evaluation_key(config: Config) -> Tensor:
    return ops.fresh_key("cpu", derive_seed(config.seed, "evaluation"))


def _samples(run: Run, sources: dict[str, Job | str], targets: dict[str, dict[int, Job]]) -> samples.Samples:
    """A few test images, attacked on the last source (a held-out one if there is any), for the report."""
    name = next(reversed(sources), None)
    source = None if name is None else make_source(run.config, run.build(trained(sources[name], run.folder),
                                                                         run.config.download))
    first = {t: run.build(trained(next(iter(per_seed.values())), run.folder)).eval()
             for t, per_seed in targets.items()}
    return samples.craft(run.dataset.test, evaluation_attacks(run.config), name, source, first,
                         _evaluation_key(run.config))
