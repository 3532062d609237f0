"""Everything a training run depends on: the dataclass whose fields are the options of `ensadv-fast train`, and the run
folder's record of it."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .. import models
from ..attacks.by_name import ATTACKS
from ..ops.losses import RULES
from ..system.files import write_json
from .recipes import MAIN, PRESETS, Recipe
from .values import FLAG, SPECS, TEXT, Values, choice, integer, number, pattern


def _option(default: Any, values: Values, help: str) -> Any:
    """A field; where its default is None, None is a value too."""
    return field(default=default, metadata={"values": values, "help": help})


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; each field is an option of `ensadv-fast train`. The defaults are the main job.

    Options that default to None leave the choice to the preset. ValueError for a value that an option does not take,
    and for options that do not fit together.
    """

    preset: str = _option("main", TEXT, f"how targets are trained: main (= {','.join(MAIN)}) or one or more of "
                          f"{', '.join(PRESETS)}, separated by commas; or a whole run of ensadv_fast.train.RUNS, "
                          "such as cifar10-eat or imagenet-eat-ens3, whose options others override")
    data: str = _option("digits", TEXT, "digits; mnist, fashion-mnist, cifar10 or cifar100, each with :DIR where it "
                        "lies elsewhere; imagefolder:DIR or imagenet:DIR")
    size: int | None = _option(None, integer(1), "height and width of the images that networks take, of folders of "
                               "image files (224)")
    augment: str = _option("none", choice("none", "pad", "random", "resized"), "random crops and mirror images in "
                           "training: none, pad (4 zeros around), random, resized (of random area and shape)")
    model: str = _option("mnist:D", TEXT, "the target: mnist:A|B|C|C_tanh|D, cifar:resnet18, timm:NAME, "
                         "torchvision:NAME, package.module:callable")
    init: str | None = _option(None, TEXT, "a file of weights that targets start from")
    static: tuple[str, ...] = _option(("mnist:B", "mnist:D"), SPECS, "static sources, each optionally with "
                                      "=CHECKPOINT; those without are trained first")
    held_out: tuple[str, ...] = _option(("mnist:A",), SPECS, "sources that no target is trained on")
    eps: float = _option(0.3, number(above=0), "the L-infinity budget in image units, e.g. 0.3 or 8/255")
    epochs: int = _option(16, integer(1), "epochs of each target")
    source_epochs: int = _option(6, integer(0), "epochs of each source that is trained here; 0: none may be")
    batch_size: int = _option(64, integer(1), "clean images in a training step, on all ranks together")
    optimizer: str = _option("adam", choice("adam", "sgd", "rmsprop"), "adam, sgd (Nesterov 0.9) or rmsprop "
                             "(TensorFlow's, as for Inception: decay 0.9, momentum 0.9, eps 1 inside the root)")
    lr: float = _option(1e-3, number(above=0), "peak learning rate, taken as it is: not scaled by the batch or by "
                        "ranks")
    schedule: str = _option("constant", choice("constant", "cosine", "cyclic", "decay"), "constant, cosine, cyclic (up "
                            "to 2/5 of the steps, then down) or decay (x 0.94 every two epochs)")
    warmup: float = _option(0.0, number(0), "epochs in which the learning rate rises to its peak")
    weight_decay: float = _option(0.0, number(0), "weight decay")
    decay_all: bool = _option(True, FLAG, "weight decay on biases and normalisations too")
    label_smoothing: float = _option(0.0, number(0, most=1), "label smoothing")
    aux: float = _option(0.4, number(0), "weight of auxiliary logits in the loss, where the model gives some "
                         "(Inception)")
    clip: float = _option(0.0, number(0), "norm that gradients are clipped to; 0: none")
    ema: float = _option(0.0, number(0, below=1), "decay of an average of the weights, which is then what is "
                         "evaluated; 0: none")
    accumulate: int = _option(1, integer(1), "micro-batches that a training step adds up gradients over")
    nan: str = _option("stop", choice("stop", "skip"), "after a step whose gradients are not finite: stop, or skip the "
                       "step")
    attack: str | None = _option(None, choice(*ATTACKS), f"training attack: {', '.join(ATTACKS)}")
    rule: str | None = _option(None, choice(*RULES), "label of the training attack: true, predicted, least_likely, "
                               "random")
    step: float | None = _option(None, number(above=0), "step of an iterative training attack, in units of eps")
    steps: int | None = _option(None, integer(1), "steps of an iterative training attack")
    fraction: float | None = _option(None, number(above=0, most=1), "share of the batch that is replaced by "
                                     "adversarial examples")
    mix: str | None = _option(None, choice("replace", "append"), "replace, or append (the doubled batch)")
    lam: float | None = _option(None, number(0), "weight of adversarial examples in the loss")
    eps_dist: str | None = _option(None, choice("fixed", "uniform", "truncated_normal"), "eps per example: fixed, "
                                   "uniform, truncated_normal")
    select: str | None = _option(None, choice("uniform", "rotate"), "how the source of a batch is chosen: uniform, "
                                 "rotate")
    crafting: str | None = _option(None, choice("eval", "train"), "eval, or train (dropout active while crafting)")
    crafting_loss: str | None = _option(None, choice("plain", "training"), "loss that training examples are crafted "
                                        "on: plain, or training (with --label-smoothing and --aux, as Google's code "
                                        "does)")
    delay: float | None = _option(None, number(0, below=1), "share of the steps before the first adversarial batch")
    start_step: int | None = _option(None, integer(0), "instead of --delay: steps before the first adversarial batch")
    alpha: float = _option(1 / 6, number(0, most=1), "random part of R+FGSM in units of eps (the MNIST code: 0.05 of "
                           "0.3)")
    eval_steps: int = _option(10, integer(1), "steps of I-FGSM and PGD in the evaluation")
    eval_batch_size: int = _option(250, integer(1), "images in an evaluation batch")
    seed: int = _option(0, integer(), "the first seed")
    seeds: int = _option(3, integer(1), "how many seeds each target is trained with; sources are shared by all")
    dtype: str = _option("float32", choice("float32", "bfloat16", "float16"), "of training: float32, or autocast to "
                         "bfloat16 or float16 (with loss scaling)")
    channels_last: bool = _option(False, FLAG, "train in channels_last memory format")
    compile: bool = _option(False, FLAG, "pass the training forward through torch.compile")
    source_dtype: str = _option("auto", choice("auto", "float32", "bfloat16", "float16", "float64"), "of crafting on "
                                "static and held-out sources: auto, or a float dtype")
    download: bool = _option(False, FLAG, "let timm and torchvision download pretrained weights of sources")
    device: str = _option("auto", pattern("auto, cpu, cuda or cuda:N", r"auto|cpu|cuda(:\d+)?"), "auto, cpu or cuda")
    workers: int = _option(0, integer(0), "processes that train and evaluate different networks at the same time; 0: "
                           "one a core on the CPU, one on a GPU")
    threads: int = _option(0, integer(0), "CPU threads of each worker; 0: the cores divided among the workers")
    save_every: int = _option(0, integer(0), "steps between checkpoints; 0: once an epoch")
    log_every: int = _option(50, integer(1), "steps between lines of metrics.jsonl")
    evaluate: bool = _option(True, FLAG, "attack the trained networks, and write results.json and the report")
    keep: int = _option(2, integer(1), "checkpoints that are kept of a network in training")
    loaders: int = _option(0, integer(0), "processes of each rank that decode image files; 0: the machine's cores, "
                           "divided among its ranks")
    max_corrupt: float = _option(0.001, number(0, most=1), "share of the training images that may be damaged files in "
                                 "an epoch")
    sync_bn: bool = _option(False, FLAG, "batch normalisation over the batches of all ranks, instead of each its own")
    tensorboard: bool = _option(False, FLAG, "write TensorBoard's files into the run folder too")
    monitor: int = _option(64, integer(0), "training images on which adversarial training is watched for catastrophic "
                           "overfitting, after each epoch; 0: none")

    def __post_init__(self) -> None:
        check_options(vars(self))
        if self.warmup and self.warmup >= self.epochs:
            raise ValueError(f"train: warmup must be < epochs ({self.epochs}), got {self.warmup}")
        for name, recipe in self.recipes().items():
            if recipe.static and not self.static:
                raise ValueError(f"train: static must name a source or more for preset {name}, got none")
            if recipe.is_weightless():
                raise ValueError(f"train: lam must be > 0 where all samples of a batch are adversarial (preset {name}: "
                                 f"fraction {recipe.fraction}, mix replace), got {recipe.lam}: no sample would count")
        for spec in (self.model, *self.static, *self.held_out):
            models.parse(spec)
        if (file := models.parse(self.model)[2]) is not None:
            raise ValueError("train: model must be without weights (targets start from those of "
                             f"--init {file}), got {self.model!r}")

    def has_weights(self, spec: str) -> bool:
        """Has this source weights, so that it is not trained here?"""
        family, _, file = models.parse(spec)
        return file is not None or (self.download and family in ("timm", "torchvision"))

    def check_weights(self) -> None:
        """ValueError for a source without weights where none is to be trained here (source_epochs 0)."""
        missing = [s for s in (*self.static, *self.held_out) if not self.source_epochs and not self.has_weights(s)]
        if missing:
            roles = [f"--{role.replace('_', '-')} " + " ".join(f"{s}=FILE" if s in missing else s for s in specs)
                     for role in ("static", "held_out") if (specs := getattr(self, role))]
            raise ValueError(f"train: no weights for {', '.join(missing)}, and this run trains no sources: give files, "
                             f"{' '.join(roles)}; or --download for those that timm and torchvision publish; or "
                             "--source-epochs N to train them here")

    def recipes(self) -> dict[str, Recipe]:
        """The presets of this run with the options that override them."""
        names = MAIN if self.preset == "main" else tuple(self.preset.split(","))
        if unknown := [n for n in names if n not in PRESETS]:
            raise ValueError(f"train: preset must be main or one or more of {', '.join(PRESETS)} (a whole run comes "
                             f"from train.make_config), got {unknown[0]!r}{models.did_you_mean(unknown[0], PRESETS)}")
        given = {f.name: getattr(self, f.name) for f in fields(Recipe)
                 if f.name not in ("suffix", "static") and getattr(self, f.name) is not None}
        return {n: PRESETS[n] if PRESETS[n].attack is None else replace(PRESETS[n], **given) for n in names}


def check_options(given: Mapping[str, Any]) -> None:
    """ValueError for an option with a value that it does not take, whatever the others are."""
    for f in fields(Config):
        value, values = given.get(f.name, f.default), f.metadata["values"]
        if not (values.hold(value) or value is None and f.default is None):
            raise ValueError(f"train: {f.name} must be {values.words}, got {value!r}")


# What may differ when a run is resumed: nothing that its numbers depend on (on "nan" those of a run that would have
# stopped).
RUNTIME_OPTIONS = ("device", "workers", "threads", "save_every", "log_every", "evaluate", "keep", "loaders",
                   "max_corrupt", "tensorboard", "monitor", "nan")


DATA = "data_sha256"  # in config.json, beside the options; 0.1 wrote none


def open_folder(config: Config, folder: Path, resume: bool, digest: str | None = None) -> None:
    """Start the run folder, or check that it is the one of this config and, where both are known, of data with this
    digest (`Dataset.digest`)."""
    path = folder / "config.json"
    if not path.exists():
        (folder / "models").mkdir(parents=True, exist_ok=True)
        write_json(path, {**asdict(config), **({} if digest is None else {DATA: digest})})
        return
    if not resume:
        raise FileExistsError(f"train: {folder} already holds a run: go on with it by --resume {folder}, or give "
                              "another folder")
    saved = asdict(load_config(folder))
    different = [k for k, v in asdict(config).items() if v != saved[k] and k not in RUNTIME_OPTIONS]
    if different:
        raise ValueError(f"train: the run in {folder} was started with other options: " + ", ".join(
            f"{k} = {saved[k]!r}, now {getattr(config, k)!r}" for k in different))


    started = _read(folder).get(DATA, digest)
    if digest is not None and started != digest:
        raise ValueError(f"train: the data {config.data} must be those that the run in {folder} was started with "
                         f"(SHA-256 {started!s:.12}), got others (SHA-256 {digest:.12}); give another folder")


def load_config(folder: Path) -> Config:
    """The config of the run in this folder. FileNotFoundError, or ValueError where it is damaged."""
    saved = _read(folder)
    try:
        options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k != DATA}
        return Config(**options)
    except (ValueError, TypeError) as e:
        raise ValueError(f"train: {folder / 'config.json'} is corrupt or of another version ({e})") from e


def _read(folder: Path) -> dict[str, Any]:
    """The contents of config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"train: no run in {folder} (there is no {path})")
    try:
        saved = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"train: {path} is corrupt or of another version ({e})") from e
    if not isinstance(saved, dict):
        raise ValueError(f"train: {path} is corrupt or of another version (it must hold an object, got "
                         f"{type(saved).__name__})")
    return saved
