"""Augmentation: what each crop shows, and that it depends on nothing but key and index."""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ensadv_fast import ops
from ensadv_fast.data import Augment

ANY = [Augment(9), Augment(9, crop="pad", padding=3), Augment(9, crop="resized"), Augment(9, crop="center"),
       Augment(14, crop="resized", scale=(0.3, 0.9), flip=False)]


def images(n, height=12, width=11, channels=3, seed=0):
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def draws(key, index):
    """The five numbers of each sample in (0, 1): row, column, flip, area, shape."""
    unit = ops.random_step(torch.zeros(len(index), 5), key, 1.0, kind="uniform", index=index, clip=False)
    return ((unit.double() + 1) / 2).numpy()


@pytest.mark.parametrize("augment", ANY, ids=str)
@given(seed=st.integers(0, 2**40), cut=st.integers(0, 9),
       index=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9))
def test_a_sample_does_not_depend_on_its_batch(augment, seed, cut, index):
    """Nor on its place in it, nor on the memory format: bit for bit."""
    key, index, x = ops.fresh_key(seed=seed), torch.tensor(index), images(len(index))
    whole = augment(x, key, index)
    assert whole.dtype == torch.uint8 and whole.shape == (len(index), 3, augment.size, augment.size)
    parts = [augment(x[part], key, index[part]) for part in (slice(0, cut), slice(cut, None))]
    assert torch.equal(torch.cat(parts), whole)
    turned = augment(x.flip(0).contiguous(memory_format=torch.channels_last), key, index.flip(0))
    assert torch.equal(turned.flip(0), whole)


@pytest.mark.parametrize("augment", ANY, ids=str)
def test_parts_that_fit_a_cpus_cache_are_the_whole(augment, monkeypatch):
    key, index, x = ops.fresh_key(seed=4), torch.arange(50, 61), images(11)
    whole = augment(x, key, index)
    monkeypatch.setattr("ensadv_fast.data.augment._CACHED", 3 * augment.size**2)
    got = augment(x, key, index)
    assert torch.equal(got, whole) and got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("padding, channels", [(0, 3), (4, 1)])
def test_random_and_padded_crops_in_plain_numpy(padding, channels):
    n, size, key = 200, 10, ops.fresh_key(seed=5)
    x, index = images(n, 13, 11, channels), torch.randperm(1000)[:n]
    got = Augment(size, crop="pad" if padding else "random", padding=padding)(x, key, index).numpy()
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    tops, lefts = set(), set()
    for i, (row, column, flip, *_) in enumerate(draws(key, index)):
        top, left = int(row * (padded.shape[2] - size + 1)), int(column * (padded.shape[3] - size + 1))
        part = padded[i, :, top:top + size, left:left + size]
        assert np.array_equal(got[i], part[..., ::-1] if flip < 0.5 else part)
        tops.add(top), lefts.add(left)
    assert tops == set(range(13 + 2 * padding - size + 1)) and lefts == set(range(11 + 2 * padding - size + 1))


@pytest.mark.parametrize("size", [7, 12, 20])
def test_resized_crops_are_pytorchs_bilinear_of_the_same_part(size):
    n, key = 100, ops.fresh_key(seed=6)
    x, index = images(n, 16, 12), torch.arange(n)
    augment = Augment(size, crop="resized", scale=(0.1, 0.8), ratio=(0.5, 2.0))
    got = augment(x, key, index)
    mirrored = torch.from_numpy(draws(key, index)[:, 2] < 0.5)[:, None, None, None]
    assert torch.equal(replace(augment, flip=False)(x, key, index), torch.where(mirrored, got.flip(3), got))
    for i, (row, column, flip, area, shape) in enumerate(draws(key, index)):
        pixels, ratio = (0.1 + area * 0.7) * 16 * 12, np.exp(np.log(0.5) + shape * np.log(4))
        width, height = (int(np.clip(round(np.sqrt(v)), 1, most)) for v, most in ((pixels * ratio, 12),
                                                                                  (pixels / ratio, 16)))
        assert abs(width * height / pixels - 1) < 0.5 or width == 12 or height == 16
        top, left = int(row * (16 - height + 1)), int(column * (12 - width + 1))
        part = x[i:i + 1, :, top:top + height, left:left + width].double()
        expected = F.interpolate(part, (size, size), mode="bilinear", align_corners=False)[0].numpy()
        if flip < 0.5:
            expected = expected[..., ::-1]
        assert np.abs(got[i].numpy() - expected).max() <= 0.5 + 1e-4  # the nearest level


def test_the_whole_image_resized_to_its_own_size_is_itself():
    x, index = images(5, 12, 12), torch.arange(5)
    same = Augment(12, crop="resized", scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False)
    assert torch.equal(same(x, ops.fresh_key(seed=0), index), x)


def test_the_middle():
    x, index = images(4, 13, 10), torch.arange(4)
    assert torch.equal(Augment(8, crop="center", flip=False)(x, ops.fresh_key(seed=0), index), x[:, :, 2:10, 1:9])


def test_draws_differ_by_key_and_index_and_leave_torchs_generator():
    x, index = images(1, 32, 32).expand(200, 3, 32, 32), torch.arange(200)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    augment = Augment(24)
    key = ops.fresh_key(seed=1)
    a, b, c = augment(x, key, index), augment(x, key, index + 200), augment(x, key + torch.tensor([0, 1]), index)
    assert torch.equal(torch.get_rng_state(), before)
    for other in (b, c, a.roll(1, 0)):  # of 9 * 9 * 2 views
        assert (a == other).flatten(1).all(1).sum() < 12
    flips = torch.from_numpy(draws(key, torch.arange(2000))[:, 2] < 0.5).float()
    assert abs(flips.mean() - 0.5) < 0.05


def test_other_options_do_not_move_a_draw():
    """The same place is cropped with and without mirror images."""
    x, index, key = images(50), torch.arange(50), ops.fresh_key(seed=2)
    plain, mirrored = Augment(9, flip=False)(x, key, index), Augment(9)(x, key, index)
    turned = (mirrored != plain).flatten(1).any(1)
    assert 10 < turned.sum() < 40 and torch.equal(mirrored[turned], plain[turned].flip(3))


@pytest.mark.parametrize("options, message", [
    (dict(crop="middle"), "crop must be one of random, resized, pad, center, got 'middle'"),
    (dict(size=0), "size must be >= 1, got 0"), (dict(padding=-1), "padding must be >= 0, got -1"),
    (dict(scale=(0.0, 1.0)), r"scale must be .*, got \(0.0, 1.0\)"), (dict(scale=(0.5, 1.5)), "scale must be"),
    (dict(ratio=(2, 1)), "ratio must be"),
])
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=f"Augment: {message}"):
        Augment(**{"size": 8, **options})


@pytest.mark.parametrize("options", [dict(size=2.5), dict(size=True), dict(padding=1.5)])
def test_sizes_are_ints(options):
    (name,) = options
    with pytest.raises(TypeError, match=f"Augment: {name} must be an int, got (float|bool)"):
        Augment(**{"size": 8, **options})


def test_images_that_are_none():
    key, index = ops.fresh_key(seed=0), torch.arange(2)
    with pytest.raises(ValueError, match=r"x must be uint8 \[B, C, H, W\], got torch.float32"):
        Augment(8)(torch.rand(2, 3, 9, 9), key, index)
    with pytest.raises(ValueError, match="a crop of 13 cannot be taken from images of 12 x 11"):
        Augment(13)(images(2), key, index)
    with pytest.raises(ValueError, match="images of 12 x 11 with 1 zeros around"):
        Augment(14, crop="pad", padding=1)(images(2), key, index)
    assert Augment(8)(images(0), key, index[:0]).shape == (0, 3, 8, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("augment", ANY, ids=str)
def test_on_a_gpu_the_same_without_waiting(augment):
    key, index, x = ops.fresh_key(seed=3), torch.arange(64), images(64)
    expected = augment(x, key, index)
    key, index, x = (t.cuda() for t in (key, index, x))
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = augment(x, key, index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.cpu(), expected)
