"""Whatever ends a run, going on gives the same weights, bit for bit: killed processes, signals, damaged files, NaN."""
import contextlib
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ensadv_fast import cli, train
from ensadv_fast.system import files, ranks, signals
from ensadv_fast.train import Config, checkpoints, logs
from ensadv_fast.train.trainer import NONFINITE, Training

ENS = "D_ens-seed0"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["ensadv_fast.cli", "ensadv_fast.train"])  # processes start in no time


@pytest.fixture(scope="module")
def small(folder):
    """A source of 6 steps and a target of 18, dropout and all."""
    return Config(data=f"mnist:{folder}", preset="tramer", static=("mnist:D",), held_out=(), epochs=3, source_epochs=1,
                  batch_size=16, seeds=1, eval_steps=2, eval_batch_size=40, workers=1, threads=1, log_every=4,
                  save_every=2, device="cpu")


def options(config, out):
    found = ["train", "--out", str(out), "--resume"]
    for k in ("data", "preset", "epochs", "source_epochs", "batch_size", "seeds", "eval_steps", "eval_batch_size",
              "workers", "threads", "log_every", "save_every", "device", "nan"):
        found += ["--" + k.replace("_", "-"), str(getattr(config, k))]
    return [*found, "--static", *config.static, "--held-out", *config.held_out]


# ---------------------------------------------------------------------------------------------------- faults


def after_step(name, step, rank, happen):
    """Let something happen on one rank once a job has done that many steps."""
    advance = Training.advance

    def watched(self, *batch):
        result = advance(self, *batch)
        if (self.job.name, self.step, self.setup.ranks.rank) == (name, step, rank):
            happen()
        return result

    Training.advance = watched


def kill(name, step, rank):
    after_step(name, step, rank, lambda: os.kill(os.getpid(), signal.SIGKILL))


def terminate(name, step, rank):
    after_step(name, step, rank, lambda: os.kill(os.getpid(), signal.SIGTERM))


def kill_while_writing(name, step, rank):
    """Half of the checkpoint of that step is on the disk."""
    whole = checkpoints.atomic_write

    def half(path, write):
        if path.name == f"{name}-{step:09d}.pt":
            write(body := io.BytesIO())
            path.with_name(path.name + ".1.tmp").write_bytes(body.getvalue()[:len(body.getvalue()) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        whole(path, write)

    checkpoints.atomic_write = half


def kill_before_it_is_published(name, step, rank):
    publish = checkpoints.Checkpoints.publish

    def late(self, at, path):
        if (self.name, at) == (name, step):
            os.kill(os.getpid(), signal.SIGKILL)
        publish(self, at, path)

    checkpoints.Checkpoints.publish = late


def poison(name, step, rank):
    """NaN in the images of one rank's part of a batch."""
    advance = Training.advance

    def poisoned(self, x, y, index):
        hit = (self.job.name, self.step + 1, self.setup.ranks.rank) == (name, step, rank)
        return advance(self, x * torch.nan if hit else x, y, index)

    Training.advance = poisoned


# ------------------------------------------------------------------------------------------------- processes


def process(rank, world, port, argv, fault, out):
    os.environ.update(GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if world > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    with open(out, "w") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        torch.set_num_threads(1)
        if fault is not None:
            globals()[fault[0]](*fault[1:])
        try:
            status = cli.main(argv)
        except BaseException as e:
            print(f"{type(e).__name__}: {e}", flush=True)
            status = 70
        f.flush()
        os._exit(status)


def launch(config, run, world=1, fault=None, timeout=60):
    """Go on with the run in processes of their own; (exit statuses, what they wrote)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    run.parent.mkdir(exist_ok=True)
    texts = [run.parent / f"{run.name}-{r}.txt" for r in range(world)]
    started = [SERVER.Process(target=process, args=(r, world, port, options(config, run), fault, str(texts[r])))
               for r in range(world)]
    for p in started:
        p.start()
    for p in started:
        p.join(timeout)
        assert p.exitcode is not None or p.kill(), "it hangs"
    return [p.exitcode for p in started], [t.read_text() for t in texts]


def assert_same_weights(a, b):
    names = sorted(p.stem for p in (a / "models").glob("*.pt"))
    assert names == sorted(p.stem for p in (b / "models").glob("*.pt")) and ENS in names
    for name in names:
        one, two = (torch.load(d / "models" / f"{name}.pt", weights_only=True) for d in (a, b))
        assert one["step"] == two["step"] in (6, 18)
        assert files.digest([one["model"], one["rng"], one["sampler"], one["adversary"]]) == files.digest(
            [two["model"], two["rng"], two["sampler"], two["adversary"]]), name
    assert not list(b.rglob("*.tmp")) and not list((b / "checkpoints").glob("*"))
    one, two = (json.loads((d / "results.json").read_text())["models"] for d in (a, b))
    assert one == two
    one, two = (sorted((r["job"], r["step"], r["lr"], r["source"]) for r in map(
        json.loads, (d / "metrics.jsonl").read_text().splitlines())) for d in (a, b))
    assert one == two  # no line lost, none twice


@pytest.fixture(scope="module")
def unbroken(small, tmp_path_factory):
    """By the number of ranks."""
    out = tmp_path_factory.mktemp("unbroken")
    train.run(small, out / "1", progress=False, say=lambda text: None)
    statuses, texts = launch(small, out / "2", 2)
    assert statuses == [0, 0], texts
    return {1: out / "1", 2: out / "2"}


def test_one_process_killed_again_and_again(small, unbroken, tmp_path):
    run = tmp_path / "run"
    for fault in (("kill", "source-D", 3, 0), ("kill_while_writing", ENS, 4, 0), ("kill", ENS, 7, 0),
                  ("kill_before_it_is_published", ENS, 10, 0), ("kill_while_writing", ENS, 18, 0)):
        statuses, texts = launch(small, run, fault=fault)
        assert statuses == [-signal.SIGKILL], texts
    train.run(small, run, resume=True, progress=False, say=lambda text: None)
    assert_same_weights(unbroken[1], run)


def test_two_ranks_of_which_one_or_both_are_killed(small, unbroken, tmp_path):
    run = tmp_path / "run"
    for fault, killed in ((("kill", "source-D", 4, 1), 1), (("kill", ENS, 7, 0), 0),
                          (("kill_while_writing", ENS, 10, 0), 0)):
        statuses, texts = launch(small, run, 2, fault)
        assert statuses[killed] == -signal.SIGKILL and statuses[1 - killed] not in (0, None), texts
    statuses, texts = launch(small, run, 2)
    assert statuses == [0, 0], texts
    assert_same_weights(unbroken[2], run)
    assert texts[1] == "" and "D_ens" in texts[0]  # only rank 0 prints


def test_sigterm_saves_and_ends_with_status_0(small, unbroken, tmp_path):
    run = tmp_path / "run"
    statuses, (text,) = launch(small, run, fault=("terminate", ENS, 5, 0))
    assert statuses == [0] and f"stopped by SIGTERM; step 5 of 18 of {ENS} is saved; " in text
    assert f"--resume {run}" in text
    assert checkpoints.load(run / "models" / f"{ENS}.pt")["step"] == 5
    train.run(small, run, resume=True, progress=False, say=lambda text: None)
    assert_same_weights(unbroken[1], run)


def test_sigterm_of_one_rank_stops_all_at_one_step(small, unbroken, tmp_path):
    run = tmp_path / "run"
    statuses, texts = launch(small, run, 2, ("terminate", ENS, 5, 1))
    assert statuses == [0, 0], texts
    step = int(re.search(r"stopped by SIGTERM; step (\d+)", texts[0])[1])
    assert 5 < step <= 5 + 2 * ranks.EVERY and checkpoints.load(run / "models" / f"{ENS}.pt")["step"] == step
    statuses, texts = launch(small, run, 2)
    assert statuses == [0, 0], texts
    assert_same_weights(unbroken[2], run)


def test_sigterm_reaches_the_workers_of_a_pool(small, unbroken, tmp_path):
    run, path = tmp_path / "run", tmp_path / "run" / "models" / f"{ENS}.pt"
    config = replace(small, workers=2, save_every=1)
    started = subprocess.Popen([sys.executable, "-m", "ensadv_fast", *options(config, run)], stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True)
    while not path.exists():
        assert started.poll() is None
    started.send_signal(signal.SIGTERM)
    _, text = started.communicate(timeout=60)
    assert started.returncode == 0, text
    assert f"of {ENS} is saved" in text or "all networks are trained" in text
    train.run(small, run, resume=True, progress=False, say=lambda text: None)
    assert_same_weights(unbroken[1], run)


def test_the_second_ctrl_c_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), signals.handled():
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked.value == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before and not signals.asked.value
    with pytest.raises(signals.Stopped), signals.handled(), signals.at_once():
        os.kill(os.getpid(), signal.SIGTERM)


# ---------------------------------------------------------------------------------- damaged files, full disks, NaN


def stopped_at(step, monkeypatch, small, run):
    save = checkpoints.Checkpoints.save

    def save_and_stop(self, state):
        save(self, state)
        if (self.name, state["step"]) == (ENS, step):
            raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(checkpoints.Checkpoints, "save", save_and_stop)
        train.run(small, run, progress=False, say=lambda text: None)


def test_a_truncated_checkpoint_gives_way_to_the_one_before(small, unbroken, tmp_path, monkeypatch):
    run = tmp_path / "run"
    stopped_at(8, monkeypatch, small, run)
    kept = sorted((run / "checkpoints").glob(f"{ENS}-*.pt"))
    assert [p.name for p in kept] == [f"{ENS}-00000000{s}.pt" for s in (6, 8)]
    kept[1].write_bytes(kept[1].read_bytes()[:5000])
    with pytest.warns(UserWarning, match=f"{ENS}-000000008.pt is corrupt"):
        train.run(small, run, resume=True, progress=False, say=lambda text: None)
    assert_same_weights(unbroken[1], run)


def test_a_run_of_damaged_checkpoints_alone_does_not_start_anew(small, tmp_path, monkeypatch):
    run = tmp_path / "run"
    stopped_at(8, monkeypatch, small, run)
    for path in [*(run / "checkpoints").glob(f"{ENS}-*.pt"), run / "models" / f"{ENS}.pt"]:
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="is corrupt"), pytest.raises(ValueError, match=f"{ENS}.pt is corrupt"):
        train.run(small, run, resume=True, progress=False)


def test_a_full_disk_leaves_the_checkpoint_before(small, unbroken, tmp_path, monkeypatch):
    run = tmp_path / "run"
    real = open

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 4000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    def crowded(path, mode="r", **more):
        full = mode == "wb" and f"{ENS}-000000008.pt" in str(path)
        return Full(path, "w") if full else real(path, mode, **more)

    with monkeypatch.context() as m, pytest.raises(OSError, match=f"disk is full.*{ENS}-000000008.pt.*--resume"):
        m.setattr(files, "open", crowded, raising=False)
        train.run(small, run, progress=False, say=lambda text: None)
    assert checkpoints.load(run / "models" / f"{ENS}.pt")["step"] == 6
    train.run(small, run, resume=True, progress=False, say=lambda text: None)
    assert_same_weights(unbroken[1], run)


def nonfinite(run):
    return [json.loads(line) for line in (run / NONFINITE).read_text().splitlines()]


def test_nan_stops_the_run_and_names_the_images(small, unbroken, tmp_path):
    run = tmp_path / "run"
    statuses, texts = launch(small, run, 2, ("poison", ENS, 7, 1))
    assert statuses == [1, 1], texts
    assert "the gradients of step 7 are not finite (1 such steps up to step 8)" in texts[0]
    assert str(run / NONFINITE) in texts[0]
    (line,) = nonfinite(run)
    assert (line["job"], line["step"], line["count"], line["skipped"]) == (ENS, 7, 1, False)
    state = checkpoints.load(run / "models" / f"{ENS}.pt")
    assert state["step"] == 6  # nothing later is saved
    from ensadv_fast.data import Sampler
    order = Sampler(96, 16, state["sampler"]["seed"]).order(1)[:16]  # the first batch of the second epoch
    assert line["index"] == [order[r::2].tolist() for r in range(2)]
    statuses, texts = launch(small, run, 2)
    assert statuses == [0, 0], texts
    assert_same_weights(unbroken[2], run)


def test_nan_is_skipped_by_choice(small, tmp_path, monkeypatch):
    run, advance = tmp_path / "run", Training.advance
    weights = {}

    def poisoned(self, x, y, index):
        if self.job.name == ENS and self.step in (7, 8):
            weights.setdefault("before", files.digest(self.model.state_dict()))
        result = advance(self, x * torch.nan if self.job.name == ENS and self.step in (7, 8) else x, y, index)
        if self.job.name == ENS and self.step == 9:
            weights["after"] = files.digest(self.model.state_dict())
        return result

    monkeypatch.setattr(Training, "advance", poisoned)
    with pytest.warns(UserWarning, match="are not finite.*left out"):
        train.run(replace(small, nan="skip"), run, progress=False, say=lambda text: None)
    assert weights["before"] == weights["after"]
    assert [(r["step"], r["count"], r["skipped"]) for r in nonfinite(run)] == [(8, 1, True), (9, 1, True)]
    lines = [json.loads(t) for t in (run / logs.METRICS).read_text().splitlines()]
    assert [r["step"] for r in lines if not r["finite"]] == [8, 12]


# ------------------------------------------------------------------------------------------------- torchrun


def torchrun(run, small, *more, wait=None):
    """The command that README.md gives; wait: a file at whose sight one rank is killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "ensadv_fast", *options(small, run), *more]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={
        **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    if wait is not None:
        while not wait.exists():
            assert started.poll() is None, started.communicate()
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
    out, err = started.communicate(timeout=120)
    return started.returncode, out, err


def test_torchrun_killed_and_resumed(small, unbroken, tmp_path):
    run = tmp_path / "run"
    status, _, err = torchrun(run, small, wait=run / "checkpoints" / f"{ENS}-000000002.pt")
    assert status not in (0, None), err
    assert not (run / "results.json").exists()
    status, out, err = torchrun(run, small)
    assert status == 0, err
    assert out.count("Errors in %") == 1
    assert_same_weights(unbroken[2], run)
