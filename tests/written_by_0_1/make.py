# Run with ensadv_fast 0.1.0 of commit 706748d, the last one before the package was reorganised, and torch 2.13.0+cpu.
"""Write the files in this folder, as that version writes them. It must not be run with a later version.

    git worktree add /tmp/before 706748d && cd /tmp/before && python setup.py build_ext --inplace
    PYTHONPATH=/tmp/before python tests/written_by_0_1/make.py

All numbers are functions of seeds. Only seconds differ from one run of this script to the next.
"""
import gzip
import hashlib
import json
import os
import shutil
import sys

import numpy as np
import torch
import torch.nn.functional as F
import written_inputs as inputs
from ensadv_fast.versions import versions

from ensadv_fast import cli, models, training
from ensadv_fast.evaluate import load_set, transfer_matrix

KILLED_AFTER = 17  # steps of D_ens: its checkpoint is of step 10, amid an epoch, and metrics.jsonl is ahead of it
TRAIN = ["--preset", "tramer", "--data", inputs.DATA, "--model", "written_inputs:D", "--static",
         "written_inputs:B", "--held-out", "written_inputs:A", "--eps", "0.1", "--epochs", "8", "--source-epochs", "8",
         "--batch-size", "16", "--lr", "0.01", "--schedule", "cosine", "--ema", "0.9", "--seeds",
         "1", "--eval-steps", "3", "--eval-batch-size", "20", "--source-dtype", "float32", "--device", "cpu",
         "--workers", "1", "--threads", "1", "--save-every", "10", "--log-every", "8"]
MADE = ("data", "interrupted", "finished", "sets", "journal", "evaluated", "diagnosed")


def command(*args: str, status: int = 0) -> None:
    assert cli.main(args) == status, args


def write_data() -> None:
    """Ten easy patterns in idx files: 64 images to train on, 40 to test."""
    os.mkdir("data")
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (10, 6, 6))
    for part, n in (("train", 64), ("t10k", 40)):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = (patterns[labels] + rng.integers(0, 56, (n, 6, 6))).astype(np.uint8)
        for kind, array in (("images", images), ("labels", labels)):
            raw = bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes() + array.tobytes()
            with open(f"data/{part}-{kind}-idx{array.ndim}-ubyte", "wb") as f:
                f.write(raw)


def write_runs() -> None:
    """interrupted: a run that was killed. finished: the same after --resume."""
    advance = training.Training.advance

    def killed(self, *args):
        if self.job.name == "D_ens-seed0" and self.step == KILLED_AFTER:
            raise KeyboardInterrupt
        return advance(self, *args)

    training.Training.advance = killed
    command("train", "--out", "interrupted", *TRAIN, status=130)
    training.Training.advance = advance
    shutil.copytree("interrupted", "finished")
    command("train", "--resume", "finished")
    command("train", "--out", "unbroken", *TRAIN)
    one, two = (torch.load(f"{run}/models/D_ens-seed0.pt")["ema"]["model"] for run in ("finished", "unbroken"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    shutil.rmtree("unbroken")


def write_sets() -> dict[str, str]:
    """The sets; their images' SHA-256."""
    found = {}
    for dtype, options in inputs.set_options().items():
        matrix = transfer_matrix(save_sets=f"sets/{dtype}", **options)
        matrix.save(f"sets/{dtype}.json")
        saved = load_set(f"sets/{dtype}/B-{next(iter(options['attacks']))}")
        x_adv = saved.rows(0, len(saved)).x_adv
        found[dtype] = hashlib.sha256(x_adv.numpy().tobytes()).hexdigest()
        check_margins(x_adv)
    return found


def check_margins(x: torch.Tensor) -> None:
    """No prediction may depend on the last bits, which differ between processors."""
    for net in inputs.trained().values():
        best = net(x).topk(6)[0]
        assert (best[:, [0, 4]] - best[:, [1, 5]]).min() > 1e-5  # top-1 and top-5


def write_journal() -> dict[str, list]:
    """The journal and a saved matrix; the bits of the matrix of every attack."""
    matrices = {name: transfer_matrix(folder="journal", **options) for name, options in inputs.passes().items()}
    matrices["sources"].save("journal/matrix.json")
    return matrices["attacks"].to_dict(bits=True)["bits"]


def layers(spec: str) -> str:
    """SHA-256 of the names and shapes of a network's weights, which a checkpoint of it must match."""
    shapes = [[name, list(t.shape)] for name, t in models.build(spec).state_dict().items()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def main() -> None:
    os.chdir(inputs.FOLDER)
    for name in MADE:
        shutil.rmtree(name, ignore_errors=True)
    write_data()
    write_runs()
    check_margins(torch.cat([x for x, _, _ in inputs.batches(40)]))
    images = write_sets()
    bits = write_journal()
    nets = ["written_inputs:D=finished/models/D_ens-seed0.pt", "written_inputs:A=finished/models/source-A.pt"]
    common = ["--data", inputs.DATA, "--device", "cpu"]
    command("evaluate", "--model", *nets, *common, "--set", "sets/uint8", "--attack", "fgsm", "pgd", "--eps", "0.1",
            "--steps", "3", "--batch-size", "20", "--out", "evaluated")
    command("diagnose", "--model", nets[0], "--source", nets[1], *common, "--images", "4", "--points", "3", "--steps",
            "3", "--eps", "0.1", "--out", "diagnosed")
    command("bench", "--device", "cpu", "--sizes", "tiny", "--cases", "null", "--dtypes", "float32", "--seconds",
            "0.01", "--compile", "--out", "bench.json")
    for run in ("finished", "evaluated", "diagnosed"):  # pages are long
        page = inputs.without_images(inputs.FOLDER / run / "report.html")
        (inputs.FOLDER / run / "report.gz").write_bytes(gzip.compress(page.encode(), mtime=0))
        os.unlink(f"{run}/report.html")
    torch.manual_seed(0)
    expected = {"versions": {name: versions()[name] for name in ("ensadv_fast", "torch")}, "images": images,
                "bits": bits, "dropout": F.dropout(torch.ones(64)).tolist(),
                "layers": {spec: layers(spec) for spec in (*(f"mnist:{n}" for n in models.MNIST),
                                                           *(f"cifar:{n}" for n in models.CIFAR))}}
    with open("expected.json", "w") as f:
        f.write(json.dumps(expected) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
