"""The attacks that a run shows to its networks."""
from __future__ import annotations

import functools
from concurrent.futures import Executor, as_completed
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .. import attacks, evaluate, ops
from ..attacks.by_name import make_attack
from ..evaluate import example_images
from ..ops.keys import derive_seed
from ..report import examples
from .config import Config
from .job import Job, Run, make_source
from .plan import trained


def evaluation_attacks(config: Config) -> dict[str, attacks.BaseAttack]:
    """FGSM, R+FGSM, I-FGSM (steps of eps/steps, as in the released MNIST code) and PGD."""
    return {"fgsm": make_attack("fgsm", config.eps),
            "rand_fgsm": make_attack("rand_fgsm", config.eps, alpha=config.alpha),
            "ifgsm": make_attack("ifgsm", config.eps, step=1 / config.eval_steps, steps=config.eval_steps),
            "pgd": make_attack("pgd", config.eps, steps=config.eval_steps)}


def assess_all(executor: Executor, run: Run, sources: dict[str, Job | str],
               targets: dict[str, dict[int, Job]]) -> evaluate.TransferMatrix | None:
    """Every source's examples shown to every target, and every target's own to itself, shared out over ranks; None on
    all but rank 0."""
    specs = {job.name: trained(job, run.folder) for per_seed in targets.values() for job in per_seed.values()}
    todo = [({name: trained(network, run.folder)}, specs) for name, network in reversed(sources.items())]
    todo += [({name: spec}, {name: spec}) for name, spec in specs.items()]
    todo = todo[run.ranks.rank::run.ranks.world]
    futures = [executor.submit(assess, run.config, run.folder, run.progress, *names) for names in todo]
    matrix = evaluate.TransferMatrix()
    for future in tqdm(as_completed(futures), total=len(futures), desc="evaluation",
                       disable=None if run.progress else True):
        matrix = matrix.merge(future.result())
    parts = run.ranks.gather(matrix)
    return None if parts is None else functools.reduce(evaluate.TransferMatrix.merge, parts)


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
                                        run.dataset.test.batches(config.eval_batch_size), key=evaluation_key(config))


def evaluation_key(config: Config) -> Tensor:
    return ops.fresh_key("cpu", derive_seed(config.seed, "evaluation"))


def draw_examples(run: Run, sources: dict[str, Job | str], targets: dict[str, dict[int, Job]]) -> examples.Samples:
    """A few test images, attacked on the last source (a held-out one if there is any), for the report."""
    name = next(reversed(sources), None)
    source = None if name is None else make_source(run.config, run.build(trained(sources[name], run.folder),
                                                                         run.config.download))
    first = {t: run.build(trained(next(iter(per_seed.values())), run.folder)).eval()
             for t, per_seed in targets.items()}
    return example_images.craft(run.dataset.test, evaluation_attacks(run.config), name, source, first,
                                evaluation_key(run.config))
