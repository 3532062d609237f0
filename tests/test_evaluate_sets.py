"""evaluate/sets.py: adversarial sets keep the budget and the numbers, and tell when they were damaged."""
import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ensadv_fast import Ensemble, ops
from ensadv_fast.attacks import fgsm, pgd, rand_fgsm
from ensadv_fast.evaluate import find_sets, load_set, save_set, transfer_matrix
from ensadv_fast.evaluate.sets import to_levels

N, EPS = 40, 8 / 255
KEY = ops.fresh_key("cpu", 3)


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.ReLU(), nn.Linear(12, 8))


def batches(size=16, levels=True, dtype=None):
    g = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (N, 3, 4, 4), generator=g, dtype=torch.uint8)
    x = x if dtype == torch.uint8 else x.to(dtype or torch.float32) / 255 if levels else torch.rand(
        x.shape, generator=g)
    y = torch.randint(0, 8, (N,), generator=g)
    return [(x[i], y[i], i + 100) for i in torch.arange(N).split(size)]


def saved(folder, attack=fgsm(EPS), loader=None, **kw):
    return save_set(folder, net(0), attack, loader or batches(), name="A", key=KEY, **kw)


@pytest.mark.parametrize("levels", [True, False], ids=["on levels", "between levels"])
@pytest.mark.parametrize("eps", [8 / 255, 0.3, 1.5 / 255])
def test_levels_keep_the_budget_in_float64(eps, levels):
    g = torch.Generator().manual_seed(2)
    x = torch.randint(0, 256, (10, 300), generator=g) / 255 if levels else torch.rand(10, 300, generator=g)
    x_adv = (x + eps * (2 * torch.rand(x.shape, generator=g) - 1)).clamp(0, 1)
    x_adv[:3] = (x[:3] + eps).clamp(0, 1)
    x_adv[3:6] = (x[3:6] - eps).clamp(0, 1)
    stored = to_levels(x_adv, x, eps)
    assert stored.dtype == torch.uint8
    moved = (stored.double() / 255 - x.double()).abs()
    assert moved.max() <= eps + 2**-24
    if levels:  # nothing of the budget is lost but the part of a level
        whole = torch.floor(torch.tensor(255 * eps + 1e-6)).item() / 255
        room = torch.where(torch.arange(10)[:, None] < 3, 1 - x.double(), x.double())
        assert torch.allclose(moved[:6], room.clamp(max=whole)[:6])
        towards = to_levels(x_adv, x, None)
        assert bool(((towards.double() / 255 - x.double()).abs() <= (x_adv - x).abs().double() + 2**-24).all())
    assert bool(((stored.double() / 255 - x_adv.double()).abs() <= 1 / 255).all())


def test_what_no_level_can_hold_is_said():
    x = torch.full((1, 2), 0.5)
    with pytest.raises(ValueError, match="save the set as float32"):
        to_levels(x + 1e-4, x, 1e-4)
    assert to_levels(x + 1e-4, x, 0.01).tolist() == [[128, 128]]


@pytest.mark.parametrize("attack", [fgsm(EPS), rand_fgsm(0.1), pgd(2.5 / 255, steps=3)], ids=lambda a: a.name)
@pytest.mark.parametrize("dtype", [None, torch.uint8, torch.float64], ids=str)
def test_a_saved_set_is_the_attack_within_its_budget(tmp_path, attack, dtype):
    loader = batches(dtype=dtype)
    model = net(0).to(dtype or torch.float32) if dtype == torch.float64 else net(0)
    x, y, index = (torch.cat(parts) for parts in zip(*loader))
    for kind in ("uint8", "float32"):
        found = save_set(tmp_path / kind, model, attack, loader, name="A", key=KEY, dtype=kind)
        rows = found.rows(0, N)
        assert (len(found), found.source, found.attack, found.eps) == (N, "A", attack.name, attack.eps)
        assert torch.equal(rows.labels, y) and torch.equal(rows.index, index) and rows.x_adv.dtype == torch.float32
        stored = torch.cat([load_file(p)["x_adv"] for p in sorted((tmp_path / kind).glob("*.safetensors"))])
        clean = x.double() / 255 if dtype == torch.uint8 else x.double()
        wide = stored.double() / 255 if kind == "uint8" else stored.double()
        assert stored.dtype == (torch.uint8 if kind == "uint8" else torch.float32)
        assert (wide - clean).abs().max() <= attack.eps + 2**-24
        assert wide.min() >= 0 and wide.max() <= 1 and (wide != clean).any()
        manifest = json.loads((tmp_path / kind / "manifest.json").read_text())
        assert manifest["attack"]["steps"] == attack.steps and manifest["dtype"] == kind and manifest["n"] == N
        assert [s["n"] for s in manifest["shards"]] == [16, 16, 8] and manifest["shape"] == [3, 4, 4]


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_new_target_needs_neither_the_source_nor_its_gradients(tmp_path, dtype):
    """The matrix that saved a set, and the one of a target that comes later, from the set alone."""
    attacks = {"f": fgsm(EPS), "p": pgd(EPS, steps=2)}
    old, new = net(1), net(2)
    first = transfer_matrix({"old": old, "new": new}, {"A": net(0)}, attacks, batches(), key=KEY, save_sets=tmp_path,
                            set_dtype=dtype, data="toy")
    if dtype == "float32":
        plain = transfer_matrix({"old": old}, {"A": net(0)}, attacks, batches(), key=KEY)
        assert all(np.array_equal(plain.wrong[k], first.wrong[k]) for k in plain.wrong)
    sets = find_sets(tmp_path)
    assert [(s.source, s.attack, s.manifest["data"]) for s in sets] == [("A", "f", "toy"), ("A", "p", "toy")]
    for size in (16, 7):
        later = transfer_matrix({"new": new}, {"A": sets}, {}, batches(size))
        alone = transfer_matrix({"new": new}, {"A": sets}, {}, None)
        for a in attacks:
            for top in (1, 5):
                for matrix in (later, alone):
                    assert matrix.error_rate(a, "A", "new", top=top) == first.error_rate(a, "A", "new", top=top)
                    assert matrix.transfer_rate(a, "A", "new", top=top) == first.transfer_rate(a, "A", "new", top=top)
        assert later.data == first.data == alone.data and not alone.clean
    both, again = (transfer_matrix({"new": new}, {"A": sets[0], "B": net(3)}, {"f": fgsm(EPS)}, batches(),
                                   folder=tmp_path / "j") for _ in range(2))
    assert set(both.wrong) == {("f", "A", "new"), ("f", "B", "new")}
    assert again.to_dict(bits=True) == both.to_dict(bits=True)


def test_a_set_is_crafted_once_and_serves_targets_that_come_later(tmp_path, monkeypatch):
    kind = type(fgsm())
    calls = []
    craft = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, *a, **kw: calls.append(self) or craft(self, *a, **kw))
    for targets, wanted in (([1], 3), ([1, 2], 0), ([3], 0)):
        transfer_matrix({f"t{i}": net(i) for i in targets}, {"A": net(0)}, {"f": fgsm(EPS)}, batches(), key=KEY,
                        save_sets=tmp_path)
        assert len(calls) == wanted
        calls.clear()


def test_sets_are_streamed(tmp_path, monkeypatch):
    found = saved(tmp_path)
    opened = []
    from ensadv_fast.evaluate import sets
    read = sets._read_shard
    monkeypatch.setattr(sets, "_read_shard", lambda path, rows=slice(None): opened.append((path.name, rows)) or
                        read(path, rows))
    whole = found.rows(0, N).x_adv
    opened.clear()
    assert torch.equal(found.rows(14, 18).x_adv, whole[14:18])
    assert opened == [("00000.safetensors", slice(14, 16)), ("00001.safetensors", slice(0, 2))]
    x, y, index = (torch.cat(parts) for parts in zip(*found.batches(11)))
    assert torch.equal(x, whole) and index.tolist() == list(range(100, 100 + N)) and len(y) == N
    with pytest.raises(ValueError, match="rows must be some of the 40 of .*, got 30..40"):
        found.rows(30, 41)


def test_the_loader_must_give_what_the_set_was_crafted_from(tmp_path):
    found = saved(tmp_path)
    target = {"t": net(1)}
    for change, message in (
        (lambda b: b[:2], "has 40 examples, the loader gave 32"),
        (lambda b: b + b[:1], "the loader gives more"),
        (lambda b: [b[0], b[2], b[1]], "first that differs is the loader's example 16"),
        (lambda b: [(x + (i[0] == 132) * 1e-3, y, i) for x, y, i in b], "example 32"),
        (lambda b: [(x, y.roll(1), i) for x, y, i in b], "other images, labels"),
        (lambda b: [(x, y, i - 100) for x, y, i in b], "example 0"),
    ):
        with pytest.raises(ValueError, match=message):
            transfer_matrix(target, {"A": found}, {}, change(batches()))
    one = transfer_matrix(target, {"A": found}, {}, [(x, y) for x, y, _ in batches()])  # without an index: counted
    assert ("fgsm", "A", "t") in one.wrong
    levels = transfer_matrix(target, {"A": found}, {}, batches(dtype=torch.uint8))
    assert np.array_equal(levels.wrong["fgsm", "A", "t"], one.wrong["fgsm", "A", "t"])
    with pytest.raises(ValueError, match="would come twice"):
        transfer_matrix(target, {"A": [found, found]}, {}, batches())


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [flip, lambda p: p.write_bytes(p.read_bytes()[:-7]), lambda p: p.write_bytes(b""),
                                    lambda p: p.unlink()], ids=["flipped", "cut off", "empty", "missing"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    saved(tmp_path)
    damage(tmp_path / "00001.safetensors")
    found = load_set(tmp_path)
    assert len(found.rows(0, 16).labels) == 16
    for use in (found.verify, lambda: found.rows(10, 20),
                lambda: transfer_matrix({"t": net(1)}, {"A": found}, {}, batches())):
        with pytest.raises(ValueError, match=r"00001\.safetensors is (corrupt|missing)"):
            use()


def test_a_damaged_manifest_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished adversarial set in .*nowhere"):
        load_set(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no finished adversarial set"):
        find_sets(tmp_path)
    saved(tmp_path)
    path = tmp_path / "manifest.json"
    text = path.read_text()
    for bad in (text[:-30], text.replace('"eps": 0.0', '"eps": 0.1', 1), "[]", "{}"):
        assert bad != text
        path.write_text(bad)
        with pytest.raises(ValueError, match=r"manifest\.json is corrupt"):
            load_set(tmp_path)


def test_a_folder_keeps_its_set(tmp_path):
    saved(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    saved(tmp_path)
    with pytest.raises(ValueError, match="another source, attack, key or dtype"):
        saved(tmp_path, replace(fgsm(EPS), eps=0.2))
    with pytest.raises(ValueError, match="other images or batches"):
        saved(tmp_path, loader=batches(levels=False))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="would share"):
        transfer_matrix({"t": net(1)}, {"a/b": net(0), "a:b": net(0)}, {"f": fgsm(EPS)}, batches(),
                        save_sets=tmp_path / "more")


def test_an_unfinished_set_is_gone_on_with_shard_by_shard(tmp_path):
    whole = saved(tmp_path / "whole").rows(0, N).x_adv

    def breaks():
        yield from batches()[:2]
        raise RuntimeError("the loader broke")

    with pytest.raises(RuntimeError, match="the loader broke"):
        saved(tmp_path / "part", loader=breaks())
    with pytest.raises(FileNotFoundError, match="no finished"):
        load_set(tmp_path / "part")
    first = tmp_path / "part" / "00000.safetensors"
    shutil.copy(first, tmp_path / "kept")
    parts = {name: t.clone() for name, t in load_file(first).items()}
    parts["x_adv"][0] += 1
    save_file(parts, first, metadata={"cell": "another"})  # of something else: written again
    assert torch.equal(saved(tmp_path / "part").rows(0, N).x_adv, whole)
    assert first.read_bytes() == (tmp_path / "kept").read_bytes()


def test_sets_of_ensembles_and_of_attacks_that_are_no_dataclass(tmp_path):
    source = Ensemble([net(0), net(1)])
    found = save_set(tmp_path / "e", source, fgsm(EPS), batches(), name="AB", key=KEY)
    assert found.manifest["source"]["description"]["class"] == "Ensemble"

    def brighter(model, x, y, *, key, index):
        return (x + 3.7 / 255).clamp(0, 1)

    found = save_set(tmp_path / "b", net(0), brighter, batches(), attack_name="brighter")
    clean = torch.cat([x for x, _, _ in batches()])
    assert found.eps is None and torch.allclose(found.rows(0, N).x_adv, (clean + 3 / 255).clamp(max=1), atol=1e-6)


@dataclass(frozen=True)
class Outward:
    """Every pixel by the same amount, to the L2 size eps."""

    name: str = "outward"
    eps: float = 1.0
    direction: str = "l2"

    def __call__(self, model, x, y, *, key, index):
        return (x + self.eps / 48**0.5 * (0.5 - x).sign()).clamp(0, 1)


def test_an_l2_budget_is_kept_too(tmp_path):
    found = save_set(tmp_path, net(0), Outward(), batches())
    clean = torch.cat([x for x, _, _ in batches()]).double()
    stored = torch.cat([load_file(p)["x_adv"] for p in sorted(tmp_path.glob("*.safetensors"))]).double() / 255
    norms = (stored - clean).flatten(1).norm(dim=1)
    assert found.manifest["norm"] == "l2" and norms.max() <= 1 + 1e-6 and norms.min() > 0.95
