"""Shared by all tests: the devices there are, and hypothesis without its clock."""
import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("default")

torch.set_num_threads(1)  # the networks here are too small to share; what threads change has tests of its own

SIDE, TRAIN, TEST = 28, 96, 40  # of the little data set
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A little data set of ten easy patterns in idx files."""
    path = tmp_path_factory.mktemp("patterns")
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (10, SIDE, SIDE))
    for part, n in (("train", TRAIN), ("t10k", TEST)):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = (patterns[labels] + rng.integers(0, 56, (n, SIDE, SIDE))).astype(np.uint8)
        for kind, array in (("images", images), ("labels", labels)):
            raw = bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes() + array.tobytes()
            (path / f"{part}-{kind}-idx{array.ndim}-ubyte").write_bytes(raw)
    return path
