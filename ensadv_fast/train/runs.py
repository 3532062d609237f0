"""Whole runs by name: `ensadv-fast train --preset imagenet-eat-ens3 --data imagenet:DIR ...`.

Each is a `Config` with other defaults. Models are only named: none is made, imported or downloaded here.
"""
from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from .config import Config

# What Kurakin et al. (ICLR 2017) and Tramer et al. (ICLR 2018) have in common on ImageNet. What they leave open is as
# in TF-slim's Inception v3: weight decay 4e-5, on weights only. Google's code crafts on the training loss. Sources come
# with weights: none is trained unless --source-epochs says so. eps is the released code's 16/255; the papers write
# 16/256.
_INCEPTION = Config(
    data="imagenet:imagenet", size=299, augment="resized", model="timm:inception_v3+aux", static=(), held_out=(),
    preset="kurakin", eps=16 / 255, source_epochs=0, optimizer="rmsprop", lr=0.045, schedule="decay",
    weight_decay=4e-5, decay_all=False, label_smoothing=0.1, aux=0.4, crafting_loss="training", channels_last=True,
    seeds=1, workers=1, eval_batch_size=100)
# Tramer et al., section 4.2: 50 machines with 16 images each, 280 epochs.
_EAT = replace(_INCEPTION, static=("timm:inception_v3.tf_in1k", "timm:resnetv2_50.a1h_in1k"), preset="eat",
               batch_size=50 * 16, epochs=280)
_CIFAR = Config(data="cifar10", augment="pad", model="cifar:resnet18", static=(), held_out=(), preset="pgd-at",
                eps=8 / 255, epochs=30, source_epochs=15, batch_size=128, optimizer="sgd", lr=0.1, schedule="cyclic",
                weight_decay=5e-4, channels_last=True, seeds=1)

RUNS: dict[str, Config] = {
    # Kurakin et al., section 4.1: 50 machines with 32 images each, 150,000 steps (187 epochs), adversarial from step
    # 10,000 on.
    "imagenet-kurakin": replace(_INCEPTION, batch_size=50 * 32, epochs=187, start_step=10_000),
    "imagenet-eat-ens3": _EAT,
    "imagenet-eat-ens4": replace(_EAT, static=(*_EAT.static, "timm:inception_resnet_v2.tf_in1k")),
    # ResNet-50 as in Goyal et al. 2017 and He et al. 2019: a learning rate of 0.1 for each 256 images of the batch.
    "imagenet-resnet50-eat": Config(
        data="imagenet:imagenet", size=224, augment="resized", model="timm:resnet50",
        static=("timm:resnet18", "timm:resnet34"), held_out=(), preset="eat", eps=16 / 255, source_epochs=0,
        epochs=90, batch_size=1024, optimizer="sgd", lr=0.4, schedule="cosine", warmup=5, weight_decay=1e-4,
        decay_all=False, label_smoothing=0.1, dtype="bfloat16", channels_last=True, seeds=1, workers=1,
        eval_batch_size=100),
    # Madry et al. (ICLR 2018): ten steps, adversarial batches only.
    "cifar10-at": _CIFAR,
    # The sources are other networks than the target, and so is the held-out one; all are trained first.
    "cifar10-eat": replace(_CIFAR, preset="eat", static=("cifar:resnet14", "cifar:convnet64"),
                           held_out=("cifar:resnet34",)),
    # The released MNIST code of Tramer et al.: network A, B held out.
    "mnist-at": Config(data="mnist", model="mnist:A", static=(), held_out=("mnist:B",), preset="fgsm-at", epochs=12),
    "mnist-eat": Config(data="mnist", model="mnist:A", static=("mnist:A", "mnist:C", "mnist:D"),
                        held_out=("mnist:B",), preset="tramer", epochs=12),
}


def with_run_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """The options that are given; the others are those of the run that their preset names, if it names one."""
    run = RUNS.get(given.get("preset", ""))
    if run is None:
        return given
    others = {f.name: getattr(run, f.name) for f in fields(Config) if getattr(run, f.name) != f.default}
    return {**others, **given, "preset": run.preset}


def make_config(**given: Any) -> Config:
    """The config of these options; `preset` may also name a run, whose options the others override.

    Raises ValueError for options that do not fit, and for sources without weights in a run that trains none.
    """
    config = Config(**with_run_defaults(given))
    config.check_weights()
    return config
