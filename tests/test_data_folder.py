"""Image files in folders: what is listed, decoded, left out and refused; streams of them, and of sets in memory."""
import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import write_pictures

from ensadv_fast import data
from ensadv_fast.data.decode import decode, try_decode
from ensadv_fast.data.folder import FolderSplit, _list_images
from ensadv_fast.evaluate import example_images
from ensadv_fast.system import files

Image = pytest.importorskip("PIL.Image")
TRAIN, VAL, CLASSES, PX = 46, 11, 4, 40


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), TRAIN, VAL, PX, CLASSES)


@pytest.fixture(scope="module")
def sets(root):
    return data.load(f"imagefolder:{root}", size=24)


@pytest.fixture
def own(root, tmp_path):
    """A copy that may be damaged."""
    return Path(shutil.copytree(root, tmp_path / "own"))


def stream(split, batch=10, *, seed=0, rank=0, world=1, augment=None, **options):
    sampler = data.Sampler(len(split), batch, seed, rank=rank, world=world)
    return data.Stream(split, sampler, device="cpu", seed=7, augment=augment, **options)


def taken(batches, n):
    """n batches, over the ends of epochs."""
    out = []
    while len(out) < n:
        for batch in batches:
            out.append(batch)
            if len(out) == n:
                break
    return out


def same(a, b):
    return len(a) == len(b) and all(torch.equal(s, t) for x, y in zip(a, b) for s, t in zip(x, y, strict=True))


# ------------------------------------------------------------------------------------------------ listing


def test_the_layout(root, sets):
    assert (sets.name, sets.classes, sets.in_shape) == ("imagefolder", CLASSES, (3, 24, 24))
    assert (len(sets.train), len(sets.test)) == (TRAIN, VAL) and sets.train.resize == round(24 * 256 / 224)
    paths = [sets.train.path(i) for i in range(TRAIN)]
    assert paths == sorted(str(p) for p in (root / "train").rglob("*.jpeg"))
    assert sets.train.labels.tolist() == [int(Path(p).parent.name.removeprefix("class")) for p in paths]
    assert data.load(f"imagefolder:{root}").in_shape == (3, 224, 224)


def test_names_endings_and_what_is_passed_over(own):
    first = next((own / "train" / "class001").iterdir())
    for name in ("ü ñ.JPG", "below/deep/x.jpeg", "notes.txt", ".hidden.jpeg", "y.jpeg~"):
        (first.parent / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(first, first.parent / name)
    (own / "train" / ".cache").mkdir()
    os.rename(own / "val", own / "test")
    sets = data.load(f"imagefolder:{own}", size=8)
    assert len(sets.train) == TRAIN + 2 and sets.classes == CLASSES and len(sets.test) == VAL
    names = [os.path.relpath(sets.train.path(i), first.parent) for i in range(TRAIN + 2)]
    assert "ü ñ.JPG" in names and os.path.join("below", "deep", "x.jpeg") in names
    sets.train.batch(torch.arange(TRAIN + 2))


def test_imagenet_has_a_thousand_classes(tmp_path):
    for part in ("train", "val"):
        for c in range(1000):
            (tmp_path / part / f"n{c:08d}").mkdir(parents=True)
            (tmp_path / part / f"n{c:08d}" / "x.JPEG").touch()  # files are opened when they are asked for
    sets = data.load(f"imagenet:{tmp_path}", size=160)
    assert (sets.name, sets.classes, sets.train.resize) == ("imagenet", 1000, 183)
    assert sets.test.labels.tolist() == list(range(1000))


def test_what_is_missing_or_does_not_fit_is_named(own, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.train"):
        data.load(f"imagefolder:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="must have ImageNet's 1000 class folders, got 4: .*imagefolder:"):
        data.load(f"imagenet:{own}")
    with pytest.raises(ValueError, match="1 <= size <= resize"):
        data.load(f"imagefolder:{own}", size=24, resize=20)
    (own / "train" / "class0015").mkdir()
    with pytest.raises(ValueError, match="no images of 1 classes: class0015"):
        data.load(f"imagefolder:{own}")
    (own / "train" / "class0015").rmdir()
    (own / "val" / "other").mkdir()
    with pytest.raises(ValueError, match="class folders that .* has not: other"):
        data.load(f"imagefolder:{own}")
    shutil.rmtree(own / "val")
    with pytest.raises(FileNotFoundError, match="own.val"):
        data.load(f"imagefolder:{own}")
    shutil.copytree(own / "train" / "class000", own / "val")
    with pytest.raises(ValueError, match="no class folders: move them"):
        data.load(f"imagefolder:{own}")
    for spec in ("imagefolder", "imagefolder:"):
        with pytest.raises(ValueError, match="spec must be digits, .*imagefolder:DIR or imagenet:DIR, got"):
            data.load(spec)
    with pytest.raises(ValueError, match=r"digits: size must be .* \(28, 28\), .*got size=32"):
        data.load("digits", size=32)


def test_without_pillow(root, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'ensadv-fast\[images\]'"):
        data.load(f"imagefolder:{root}")


# ----------------------------------------------------------------------------------------------- decoding


def test_a_file_becomes_the_square_in_its_middle(tmp_path):
    """Of red, green, blue stripes only the middle stays; whatever the mode, the result is RGB."""
    pixels = np.zeros((30, 90, 3), np.uint8)
    for i in range(3):
        pixels[:, 30 * i:30 * i + 30, i] = 255
    for turned in (pixels, pixels.transpose(1, 0, 2)):
        Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / "x.png")
        assert (decode(tmp_path / "x.png", 10)[1:-1, 1:-1] == (0, 255, 0)).all()  # at the edge neighbours count
    rng = np.random.default_rng(0)
    square = rng.integers(0, 256, (16, 16, 3), np.uint8)
    picture = Image.fromarray(square)
    picture.save(tmp_path / "x.png")
    assert np.array_equal(decode(tmp_path / "x.png", 16), square)
    for mode in ("L", "LA", "P", "RGBA", "1", "I;16"):
        picture.convert("L" if mode == "I;16" else mode).convert(mode).save(tmp_path / "x.png")
        assert decode(tmp_path / "x.png", 7).shape == (7, 7, 3)
    picture.convert("CMYK").save(tmp_path / "x.jpg")
    assert decode(tmp_path / "x.jpg", 7).shape == (7, 7, 3)


def test_large_jpegs_are_decoded_at_a_smaller_scale(tmp_path):
    """And look the same."""
    y, x = np.mgrid[:400, :500] / 100
    pixels = (127 + 120 * np.stack([np.sin(x + y), np.cos(2 * x), np.sin(3 * y)], -1)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.jpeg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    a, b = (decode(tmp_path / name, 48).astype(int) for name in ("x.jpeg", "x.png"))
    assert np.abs(a - b).mean() < 2


def png(width: int, height: int) -> bytes:
    """The beginning of a PNG file of that size."""
    def chunk(content: bytes) -> bytes:
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))

    header = chunk(b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT" + zlib.compress(bytes(99)))


DAMAGE = {
    "truncated": lambda raw: raw[:len(raw) // 2],
    "empty": lambda raw: b"",
    "no image": lambda raw: b"<html>not found</html>",
    "bomb": lambda raw: png(60000, 60000),
    "large": lambda raw: png(10000, 10000),  # Pillow only warns
    "header alone": lambda raw: png(30, 30),
}
HOSTILE = {
    "a line": lambda raw: png(1, 80_000_000),
    "program": lambda raw: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n",
}


def damage(split, how):
    """Damage files; their positions."""
    for i, kind in how.items():
        path = Path(split.path(i))
        path.unlink() if kind == "gone" else path.write_bytes((DAMAGE | HOSTILE)[kind](path.read_bytes()))
    return set(how)


def test_pipes_are_passed_over_and_never_opened(own):
    """What cannot be listed as a file is not; a link to it is damaged, and named."""
    split = data.load(f"imagefolder:{own}", size=8).train
    folder = Path(split.path(0)).parent
    os.mkfifo(folder / "pipe.jpeg")
    assert "pipe.jpeg" not in _list_images(str(folder))
    assert try_decode(str(folder / "pipe.jpeg"), 8) == "ValueError: it must be a regular file"
    (folder / "gone.jpeg").symlink_to(folder / "nowhere.jpeg")
    assert "gone.jpeg" in _list_images(str(folder))
    assert "FileNotFoundError" in try_decode(str(folder / "gone.jpeg"), 8)
    assert len(data.load(f"imagefolder:{own}", size=8).train) == len(split) + 1


def test_a_postscript_file_starts_no_program(own, monkeypatch):
    started, split = [], data.load(f"imagefolder:{own}", size=8).train
    monkeypatch.setattr("subprocess.check_call", lambda *args, **options: started.append(args))
    damage(split, {0: "program", 1: "a line"})
    assert "sides of at most 65535 pixels, got 1 x 80000000" in try_decode(split.path(1), 8)
    assert try_decode(split.path(0), 8) == (
        f"UnidentifiedImageError: cannot identify image file '{Path(split.path(0)).name}'")
    assert started == []


def test_the_digest_of_a_folder(own):
    """It changes with names, labels and contents."""
    split = data.load(f"imagefolder:{own}", size=8).train
    before = split.contents()
    assert files.digest(split.contents()) == files.digest(before)
    path = Path(split.path(3))
    path.write_bytes(path.read_bytes() + b" ")
    assert files.digest(split.contents()) != files.digest(before)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_files_are_left_out_counted_and_named(own, workers):
    split = data.load(f"imagefolder:{own}", size=24).train
    bad = damage(split, dict(zip((3, 7, 8, 20, 21, 30, 41), (*DAMAGE, "gone"))))
    with stream(split, workers=workers, augment=data.Augment(24, crop="resized")) as batches:
        for epoch in range(2):
            seen = [index for x, y, index in batches if len(x) == len(y) == len(index)]
            assert sorted(torch.cat(seen).tolist()) == [i for i in range(TRAIN) if i not in bad]
            assert batches.corrupt == len(bad) and batches.global_size == 6  # every epoch is counted for itself
    assert set(batches.skipped) == {split.path(i) for i in bad}
    assert "DecompressionBomb" in batches.skipped[split.path(20)]
    assert "must have at most 89478485 pixels, got" in batches.skipped[split.path(21)]
    assert "truncated" in batches.skipped[split.path(3)] and "FileNotFound" in batches.skipped[split.path(41)]
    with pytest.raises(ValueError, match=f"{split.path(7)} cannot be decoded"):
        split.batch(torch.tensor([6, 7]))


def test_a_batch_of_corrupt_files_alone_is_empty(own):
    split = data.load(f"imagefolder:{own}", size=24).train
    damage(split, {i: "empty" for i in data.Sampler(TRAIN, 4, 0).order(0)[4:8].tolist()})
    batches = list(stream(split, 4, augment=data.Augment(24, crop="pad"), train=True))
    assert [len(x) for x, _, _ in batches][:3] == [4, 0, 4] and batches[1][0].shape == (0, 3, 24, 24)


@pytest.mark.parametrize("limit, n", [(0, 1), (2, 3), (0.0, 11), (0.3, 14)])
def test_beyond_the_limit_the_run_stops(own, limit, n):
    split = data.load(f"imagefolder:{own}", size=24).train
    bad = sorted(damage(split, {i: "empty" for i in range(0, 3 * n, 3)}))
    batches = stream(split, max_corrupt=limit)
    with pytest.raises(data.CorruptImages, match=f"{n} images of epoch 0 .* at most {n - 1} are tolerated") as e:
        list(batches)
    assert any(split.path(i) in str(e.value) for i in bad)
    shutil.copy(split.path(1), split.path(0))
    assert sum(len(x) for x, _, _ in stream(split, max_corrupt=limit)) == TRAIN - n + 1


# ------------------------------------------------------------------------------------------------- streams


def test_batches_are_those_of_the_split(sets):
    """Without augmentation: the split's own images, of either kind, in order where nothing is trained."""
    for split in (sets.train, data.digits().test):
        n = len(split)
        got = list(stream(split, 11 if n == TRAIN else 300, train=False))
        x, y, index = (torch.cat(parts) for parts in zip(*got))
        assert index.tolist() == list(range(n)) and torch.equal(y, split.labels)
        assert x.dtype == torch.float32 and x.shape == (n, *split.in_shape)
        assert torch.equal(x, split.batch(index)[0])
    for x, y, index in stream(sets.train, channels_last=True):
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, sets.train.batch(index)[0]) and torch.equal(y, sets.train.labels[index])


def test_workers_prefetch_and_restarts_change_nothing(sets):
    """Over three epochs; stopped behind some batches by `break`, by a new stream, and by going back."""
    augment = data.Augment(24, crop="resized")
    expected = taken(stream(sets.train, augment=augment), 13)
    for workers, prefetch in ((1, 1), (2, 3)):
        with stream(sets.train, augment=augment, workers=workers, prefetch=prefetch) as batches:
            start = batches.state_dict()
            begun = taken(batches, 3)
            state = json.loads(json.dumps(batches.state_dict()))
            assert (state["epoch"], state["position"], batches.epoch) == (0, 30, 0)
            assert same(begun + taken(batches, 4), expected[:7])
            assert batches.state_dict()["position"] == 20 and batches.epoch == 1
            batches.load_state_dict(state)
            assert same(taken(batches, 10), expected[3:])
            batches.load_state_dict(start)
            assert same(taken(batches, 2), expected[:2])
        other = stream(sets.train, augment=augment)
        other.load_state_dict(state)
        assert same(taken(other, 4), expected[3:7])


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_ranks_together_see_what_one_sees(sets, kind):
    """Bit for bit, and a run goes on with another number of ranks."""
    split = sets.train if kind == "files" else data.Split(torch.arange(46 * 3 * 26 * 26).to(torch.uint8).view(
        46, 3, 26, 26), torch.arange(46) % CLASSES)
    augment = data.Augment(24)
    expected = taken(stream(split, 12, augment=augment), 8)
    state = None
    for world, begin, end in ((2, 0, 3), (4, 3, 5), (1, 5, 8)):
        streams = [stream(split, 12, augment=augment, rank=r, world=world) for r in range(world)]
        for s in streams:
            s.load_state_dict(state) if state else None
        shares = [taken(s, end - begin) for s in streams]
        for number, whole in enumerate(expected[begin:end]):
            for rank in range(world):
                assert all(torch.equal(a, b[rank::world]) for a, b in zip(shares[rank][number], whole))
        state = streams[0].state_dict()
        assert all(s.state_dict() == state for s in streams)


def test_evaluation_is_shared_out(sets):
    """Eleven images, four a batch, four ranks: the last batch has none for one of them."""
    with stream(sets.test, 4, workers=1, train=False) as alone:
        for _ in range(2):  # every pass is the whole set
            assert [i.tolist() for _, _, i in alone] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    sampler = [data.Sampler(VAL, 4, 0, rank=r, world=4, shuffle=False) for r in range(4)]
    parts = [[i.tolist() for _, _, i in data.Stream(sets.test, s, device="cpu", seed=0, train=False)] for s in sampler]
    assert [sum(p, []) for p in parts] == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7]]


def test_nothing_is_drawn_from_torch(sets):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with stream(sets.train, workers=1, augment=data.Augment(24)) as batches:
        taken(batches, 6)
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_refuse_what_does_not_fit(sets):
    sampler = data.Sampler(TRAIN, 10, 0)
    for options, message in ((dict(workers=-1), "workers"), (dict(prefetch=0), "prefetch"),
                             (dict(max_corrupt=1.5), "max_corrupt"), (dict(max_corrupt=TRAIN + 1), "max_corrupt"),
                             (dict(augment=data.Augment(30)), "a crop of 30 cannot be taken from images of 27 x 27"),
                             (dict(augment=data.Augment(24), train=False), "augment must be None with train=False")):
        with pytest.raises(ValueError, match=message):
            data.Stream(sets.train, sampler, device="cpu", seed=0, **options)
    with pytest.raises(TypeError, match="split must be a Split or a FolderSplit, got Dataset"):
        data.Stream(sets, sampler, device="cpu", seed=0)
    with pytest.raises(ValueError, match="must be over the split's 11 samples, got n=46"):
        data.Stream(sets.test, sampler, device="cpu", seed=0)
    state = data.Stream(sets.train, sampler, device="cpu", seed=0).state_dict()
    with pytest.raises(ValueError, match="is of seed=0, this stream has seed=1"):
        data.Stream(sets.train, sampler, device="cpu", seed=1).load_state_dict(state)


# ----------------------------------------------------------------------------------------------- processes


class Noting(FolderSplit):
    """Leaves a file for every image that was asked for; may hold a worker up."""

    notes: Path
    hold: int | None = None

    def pixels(self, index):
        for i in index:
            (self.notes / str(i)).touch()
            if i == self.hold:
                time.sleep(60)
        return super().pixels(index)


def noting(split, notes):
    split = data.load(f"imagefolder:{Path(split.root).parent}", size=24).train
    split.__class__, split.notes = Noting, notes
    return split


def settled(notes):
    """How many notes there are when none has come for a while."""
    counts = [-1, 0]
    while counts[-1] != counts[-2] or not counts[-1]:
        time.sleep(0.3)
        counts.append(len(list(notes.iterdir())))
    return counts[-1]


def test_no_more_is_decoded_ahead_than_said(sets, tmp_path):
    with stream(noting(sets.train, tmp_path), 4, workers=2, prefetch=1) as batches:
        taken(batches, 2)
        assert settled(tmp_path) == 4 * (2 + 2)  # the two batches taken, and one more of each worker


def test_processes_end_with_the_stream(sets):
    before = set(multiprocessing.active_children())
    batches = stream(sets.train, workers=2)
    taken(batches, 2)
    processes = set(multiprocessing.active_children()) - before
    assert len(processes) == 2
    subprocess.run(["kill", "-TERM", *(str(p.pid) for p in processes)], check=True)  # a scheduler's, not their parent's
    taken(batches, 8)
    assert set(multiprocessing.active_children()) - before == processes
    batches.close()
    assert set(multiprocessing.active_children()) == before
    taken(batches, 1)  # new ones
    del batches
    assert set(multiprocessing.active_children()) == before


def test_a_dead_worker_is_an_error_not_a_hang(sets, tmp_path):
    split = noting(sets.train, tmp_path)
    split.hold = int(data.Sampler(TRAIN, 10, 0).order(0)[15])
    before = set(multiprocessing.active_children())
    batches = stream(split, workers=2, prefetch=1)
    taken(batches, 1)
    while not (tmp_path / str(split.hold)).exists():
        time.sleep(0.1)
    for process in set(multiprocessing.active_children()) - before:
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="a process that decodes images died.*/dev/shm"):
        taken(batches, 3)
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize("end, code", [("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
                                       ("sys.exit(3)", 3), ("os.killpg(0, signal.SIGINT)", -signal.SIGINT)],
                         ids=["killed", "exit", "interrupted"])
def test_processes_end_with_their_parent(root, tmp_path, end, code):
    """However it ends: nobody closed the stream."""
    script = tmp_path / "ends.py"
    script.write_text(f"""if True:
        import multiprocessing, os, signal, sys
        from ensadv_fast import data
        if __name__ == "__main__":
            split = data.load("imagefolder:{root}", size=24).train
            stream = data.Stream(split, data.Sampler(len(split), 10, 0), device="cpu", seed=0, workers=2)
            batches = iter(stream)
            next(batches)
            print(*(p.pid for p in multiprocessing.active_children()), flush=True)
            {end}""")
    env = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])}
    run = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True, env=env, timeout=100,
                         start_new_session=True)
    pids = run.stdout.split()
    assert run.returncode == code and len(pids) == 2, run.stderr
    assert "Exception ignored" not in run.stderr and "Warning" not in run.stderr
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ------------------------------------------------------------------------------------------ in the package


def test_folders_fit_where_sets_in_memory_do(sets):
    """Examples for the report, and batches for an evaluation."""
    class Nothing(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    shown = example_images.craft(sets.test, {}, None, None, {"net": Nothing()}, torch.tensor([0, 0]))
    assert shown.labels.tolist() == [0, 1, 2, 3]
    got = list(sets.to("cpu").test.batches(4))
    assert torch.equal(torch.cat([y for _, y, _ in got]), sets.test.labels)
    assert torch.equal(got[1][0], sets.test.batch(torch.arange(4, 8))[0])


def test_the_made_up_classes_can_be_learned(sets):
    """They differ by their mean colour."""
    x, y = sets.test.batch(torch.arange(VAL))
    means = torch.stack([sets.train.batch((sets.train.labels == c).nonzero()[:5, 0])[0].mean((0, 2, 3))
                         for c in range(CLASSES)])
    assert torch.equal(torch.cdist(x.mean((2, 3)), means).argmin(1), y)


def test_the_benchmark_compares_before_it_times(root):
    spec = importlib.util.spec_from_file_location("input", Path(__file__).parent.parent / "bench" / "input.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    args = argparse.Namespace(size=24, batch=8, prefetch=2, workers=[0], device="cpu")
    result = bench.measure(root, args)
    assert result["rows"][0]["contender"] == "ours" and result["rows"][0]["images_per_second"] > 0
    assert result["images"] == TRAIN and result["device_part_images_per_second"] > 0

    class Other(data.Augment):
        def __call__(self, x, key, index):
            return super().__call__(x, key + torch.randint(9, (2,)), index)

    bench.data = argparse.Namespace(**{**vars(data), "Augment": Other})
    with pytest.raises(AssertionError, match="0 processes give another batch than none"):
        bench.measure(root, args)


@pytest.mark.gpu
def test_on_a_gpu_the_batches_are_the_cpus_and_nothing_waits(sets):
    for split, crop in ((sets.train, "resized"), (sets.train, "random"), (data.digits().test, "pad")):
        size = 24 if len(split) == TRAIN else 28
        augment = data.Augment(size, crop=crop)
        expected = taken(stream(split, augment=augment), 9)
        sampler = data.Sampler(len(split), 10, 0)
        with data.Stream(split, sampler, device="cuda", seed=7, augment=augment, workers=2) as batches:
            got = taken(batches, 2)
            torch.cuda.set_sync_debug_mode("error")
            try:
                got += taken(batches, 7)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert batches.state_dict()["epoch"] == (1 if len(split) == TRAIN else 0)
        assert same([[t.cpu() for t in batch] for batch in got], expected)
