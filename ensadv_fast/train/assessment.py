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
from .job import Run, make_source
from .plan import Plan, checkpoint_spec


def evaluation_attacks(config: Config) -> dict[str, attacks.BaseAttack]:
    """FGSM, R+FGSM, I-FGSM (steps of eps/steps, as in the released MNIST code) and PGD."""
    return {"fgsm": make_attack("fgsm", config.eps),
            "rand_fgsm": make_attack("rand_fgsm", config.eps, alpha=config.alpha),
            "ifgsm": make_attack("ifgsm", config.eps, step=1 / config.eval_steps, steps=config.eval_steps),
            "pgd": make_attack("pgd", config.eps, steps=config.eval_steps)}


def evaluation_key(config: Config) -> Tensor:
    """The key of all that the evaluation draws."""
    return ops.fresh_key("cpu", derive_seed(config.seed, "evaluation"))


def assess_all(executor: Executor, setup: Run, plan: Plan) -> evaluate.TransferMatrix | None:
    """Every source's examples shown to every target, and every target's own to itself, shared out over ranks; None on
    all but rank 0."""
    targets = {job.name: checkpoint_spec(job, setup.folder) for job in plan.target_jobs()}
    todo = [({name: checkpoint_spec(source, setup.folder)}, targets) for name, source in reversed(plan.sources.items())]
    todo += [({name: spec}, {name: spec}) for name, spec in targets.items()]
    todo = todo[setup.ranks.rank::setup.ranks.world]
    futures = [executor.submit(assess, setup.config, setup.folder, setup.progress, *names) for names in todo]
    matrix = evaluate.TransferMatrix()
    for future in tqdm(as_completed(futures), total=len(futures), desc="evaluation",
                       disable=None if setup.progress else True):
        matrix = matrix.merge(future.result())
    parts = setup.ranks.gather(matrix)
    return None if parts is None else functools.reduce(evaluate.TransferMatrix.merge, parts)


def assess(config: Config, folder: Path, progress: bool, sources: dict[str, str],
           targets: dict[str, str]) -> evaluate.TransferMatrix:
    """The attacks of the evaluation, from these sources on these targets, both given as name -> spec. A target is
    attacked as it is, another network as a `Source`."""
    setup = Run.open(config, folder, progress)
    networks = {name: setup.build(spec).eval() for name, spec in targets.items()}
    crafting = {name: networks[name] if name in networks else make_source(config, setup.build(spec, config.download))
                for name, spec in sources.items()}
    with torch.backends.cudnn.flags(benchmark=False, deterministic=True):
        return evaluate.transfer_matrix(networks, crafting, evaluation_attacks(config),
                                        setup.dataset.test.batches(config.eval_batch_size), key=evaluation_key(config))


def draw_examples(setup: Run, plan: Plan) -> examples.Samples:
    """A few test images, attacked on the last source (a held-out one if there is any), for the report. Of each target
    the first seed says what it takes them for."""
    config, source = setup.config, None
    name = next(reversed(plan.sources), None)
    if name is not None:
        spec = checkpoint_spec(plan.sources[name], setup.folder)
        source = make_source(config, setup.build(spec, config.download))
    first = {target: setup.build(checkpoint_spec(next(iter(per_seed.values())), setup.folder)).eval()
             for target, per_seed in plan.targets.items()}
    return example_images.craft(setup.dataset.test, evaluation_attacks(config), name, source, first,
                                evaluation_key(config))
