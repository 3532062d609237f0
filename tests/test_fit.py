"""The loop: what it asks of the device, what its log lines say."""
import json
from dataclasses import replace

import pytest
import torch

from ensadv_fast import data, models, train
from ensadv_fast.train import Config
from ensadv_fast.train.job import Job, Run
from ensadv_fast.train.loop import fit
from ensadv_fast.train.recipes import PRESETS
from ensadv_fast.train.trainer import Training


@pytest.fixture
def small(folder):
    return Config(data=f"mnist:{folder}", model="mnist:D", epochs=3, batch_size=16, log_every=4, monitor=0,
                  device="cpu", optimizer="sgd", lr=0.05)


def made(config, out, device="cpu"):
    """A job on one static source and the model itself, and its run."""
    (out / "models").mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(models.build("mnist:B").state_dict(), out / "static.pt")
    run = Run(config, out, data.load(config.data).to(device), torch.device(device), False)
    return run, Job("D", config.model, replace(PRESETS["tramer"], select="rotate", crafting="eval"), 3, config.epochs,
                    (f"mnist:B={out / 'static.pt'}",))


def lines_of(out):
    return [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]


def test_one_value_is_read_a_log_line_and_none_between(small, tmp_path, monkeypatch):
    """Counted on the CPU, where SGD keeps its steps to itself."""
    reads, seen = [], []
    for name in ("item", "tolist", "numpy", "cpu"):
        def counted(self, *more, name=name, method=getattr(torch.Tensor, name), **options):
            reads.append(name)
            return method(self, *more, **options)

        monkeypatch.setattr(torch.Tensor, name, counted)

    def watched(name):
        method = getattr(Training, name)

        def call(self, *given):
            before = len(reads)
            result = method(self, *given)
            seen.append((name, reads[before:]))
            return result

        monkeypatch.setattr(Training, name, call)

    watched("advance")
    watched("line")
    fit(*made(small, tmp_path / "run"))
    assert [r for name, r in seen if name == "line"] == [["tolist"]] * 5  # steps 4, 8, 12, 16, and the last
    # The first batch that each of the two sources crafts on is looked at, on the CPU alone.
    assert [r for name, r in seen if name == "advance"][2:] == [[]] * 16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_waits_for_the_device_between_log_lines(small, tmp_path, monkeypatch, dtype):
    advance = Training.advance

    def strict(self, *batch):
        if self.step < 6:  # what is made once: graphs, keys, states of the optimizer
            return advance(self, *batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return advance(self, *batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Training, "advance", strict)
    fit(*made(replace(small, dtype=dtype, device="cuda", optimizer="adam"), tmp_path / "run", "cuda"))
    assert [r["step"] for r in lines_of(tmp_path / "run")] == [4, 8, 12, 16, 18]


def test_a_log_line_is_of_all_steps_since_the_last(small, tmp_path, monkeypatch):
    kept, advance = [], Training.advance

    def watched(self, *batch):
        update = self.update

        def told(batches, *given, **options):
            loss, logits = type(update).__call__(update, batches, *given, **options)
            (b,) = batches
            kept.append((loss, logits, b.y, b.is_adv))
            return loss, logits

        self.update = type("Told", (), {"__call__": lambda _, *a, **k: told(*a, **k),
                                        "__getattr__": lambda _, name: getattr(update, name)})()
        result = advance(self, *batch)
        self.update = update
        return result

    monkeypatch.setattr(Training, "advance", watched)
    fit(*made(small, tmp_path / "run"))
    lines = lines_of(tmp_path / "run")
    assert [r["step"] for r in lines] == [4, 8, 12, 16, 18] and [r["epoch"] for r in lines] == [0, 1, 1, 2, 2]
    for before, line in zip([0, *(r["step"] for r in lines)], lines):
        steps = kept[before:line["step"]]
        assert line["loss"] == pytest.approx(sum(s[0].item() for s in steps) / len(steps))
        for part, wanted in (("clean", False), ("adv", True)):
            logits, y = (torch.cat([s[i][s[3] == wanted] for s in steps]) for i in (1, 2))
            assert line[f"{part}_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, y).item())
            assert line[f"{part}_accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
        assert line["images_per_second"] > 0 and line["finite"] and line["skipped"] == 0
        shares = [line[f"share_{name}"] for name in ("data", "attack", "train")]
        assert all(s > 0 for s in shares) and sum(shares) <= 1


def test_augmentation_averages_and_a_start_from_weights(small, tmp_path):
    config = replace(small, augment="pad", ema=0.9, channels_last=True, accumulate=2, tensorboard=True, epochs=1)
    run, job = made(config, tmp_path / "run")
    start = models.build("mnist:D")
    torch.save(start.state_dict(), tmp_path / "start.pt")
    fit(run, replace(job, init=str(tmp_path / "start.pt")))
    state = torch.load(job.path(run.folder), weights_only=True)
    average = models.build(f"mnist:D={job.path(run.folder)}").state_dict()
    far = {name: max((w[k] - start.state_dict()[k]).abs().max().item() for k in w)
           for name, w in (("weights", state["model"]), ("average", average))}
    assert 0 < far["average"] < far["weights"] < 0.5  # another start would be farther
    assert any((run.folder / "tensorboard" / "D").iterdir())


def test_a_checkpoint_of_another_version_is_named(small, tmp_path):
    run, job = made(small, tmp_path / "run")
    torch.save({}, tmp_path / "x.pt")
    from ensadv_fast.train import checkpoints
    checkpoints.save(job.path(run.folder), {"step": 3, "model": models.build("mnist:D").state_dict()})
    with pytest.raises(ValueError, match="checkpoint of D in .* is of another version: it has no 'optimizer'"):
        fit(run, job)
    checkpoints.save(job.path(run.folder), {"step": 18, "seconds": 5.0})  # but what is done is done
    assert fit(run, job) >= 5.0


def test_networks_can_be_trained_without_being_evaluated(small, tmp_path):
    config = replace(small, preset="plain", static=(), held_out=(), seeds=1, epochs=1, workers=1, threads=1,
                     evaluate=False)
    assert train.run(config, tmp_path / "run", progress=False) == {}
    assert (tmp_path / "run" / "models" / "D-seed0.pt").exists() and not (tmp_path / "run" / "results.json").exists()
    found = train.run(replace(config, evaluate=True), tmp_path / "run", resume=True, progress=False, say=len)
    assert list(found["models"]) == ["D"]
