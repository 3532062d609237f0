"""What make.py and tests/test_written_before.py share: networks, images and attacks. Only public names are used."""
import base64
import hashlib
import re
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

from ensadv_fast import Ensemble, Source, attacks, data, models, ops

FOLDER = Path(__file__).parent
DATA = "mnist:data"  # relative, so that a copy of the folder is complete
KEY = ops.fresh_key("cpu", 3)
EPS = 0.3


def A() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 10))


def B() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3, stride=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
                         nn.Linear(24, 10))


def D() -> nn.Module:
    """It has all that a checkpoint must keep: batch statistics, and dropout, which draws from torch's generator."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.Dropout(0.2), nn.Flatten(), nn.Linear(36, 10))


def trained() -> dict[str, nn.Module]:
    """The networks of the finished run, by name."""
    files = {"A": "source-A", "B": "source-B", "D": "D_ens-seed0"}
    return {name: models.build(f"written_inputs:{name}={FOLDER}/finished/models/{file}.pt").eval()
            for name, file in files.items()}


def batches(size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    return list(data.load(f"mnist:{FOLDER}/data").test.batches(size))


def every_attack() -> dict[str, attacks.BaseAttack]:
    """Each attack that has a name, in few steps."""
    one_step = ("fgsm", "rand_fgsm", "step_ll", "rand_step_ll", "step_rnd", "fast_grad_l2", "fast_grad_linf",
                "fast_entropy", "random_sign", "random_normal")
    some_steps = ("ifgsm", "iter_ll", "pgd", "pgd_l2", "mifgsm", "nifgsm", "difgsm", "tifgsm", "sinifgsm", "vmifgsm",
                  "vnifgsm")
    found = {name: getattr(attacks, name)(EPS) for name in one_step}
    found |= {name: getattr(attacks, name)(EPS, steps=2) for name in some_steps}
    return {**found, "cw_linf": attacks.cw_linf(EPS, max_iterations=2)}


def passes() -> dict[str, dict]:
    """The arguments of the two calls of `transfer_matrix` that are in the journal: every attack on one network, and two
    attacks on every kind of source. dtype: "auto" would depend on the processor, and so would the fingerprints."""
    nets = trained()
    a, b, d = (Source(nets[name], dtype=torch.float32) for name in "ABD")
    two = {"fgsm": attacks.fgsm(EPS), "pgd": attacks.pgd(EPS, steps=2)}
    return {"attacks": {"targets": {"A": nets["A"]}, "sources": {"D": nets["D"]},
                        "attacks": every_attack(), "loader": batches(40), "key": KEY},
            "sources": {"targets": {"A": nets["A"], "D": nets["D"]},
                        "sources": {"module": nets["D"], "source": d, "ensemble": Ensemble([a, b])},
                        "attacks": two, "loader": batches(16), "key": KEY, "white_box": True}}


def set_options() -> dict[str, dict]:
    """The arguments of the calls of `transfer_matrix` that save a set, by the set's dtype."""
    nets = trained()
    source = {"B": Source(nets["B"], dtype=torch.float32)}
    return {dtype: {"targets": {"A": nets["A"], "D": nets["D"]}, "sources": source, "attacks": {attack.name: attack},
                    "loader": batches(20), "key": KEY, "set_dtype": dtype, "data": DATA}
            for dtype, attack in (("uint8", attacks.fgsm(EPS)), ("float32", attacks.pgd_l2(1.5, steps=2)))}


def without_images(page: Path) -> str:
    """The text of a report page, each PNG image replaced by the SHA-256 of its pixels: zlib packs the same pixels into
    other bytes in some builds of Python."""
    def pixels(found: re.Match) -> str:
        png = base64.b64decode(found[1])
        size = int.from_bytes(png[33:37], "big")  # of the one IDAT chunk, after the signature and IHDR
        return "PNG " + hashlib.sha256(png[:33] + zlib.decompress(png[41:41 + size])).hexdigest()

    return re.sub(r"data:image/png;base64,([\w+/=]+)", pixels, page.read_text())
