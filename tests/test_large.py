"""Tensors of more than 2^31 elements: what lies around and beyond that element is what the CPU computes of it alone."""
import pytest
import torch

from ensadv_fast import ops

LIMIT = 2**31
IMAGE = (3, 512, 512)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

every_format = pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
BATCHES = [pytest.param("cuda", LIMIT, marks=pytest.mark.gpu), ("cpu", 4 * 3 * 512 * 512)]


def room(device: str, gigabytes: int) -> None:
    if device == "cuda" and torch.cuda.mem_get_info()[0] < gigabytes * 10**9:
        pytest.skip(f"needs {gigabytes} GB of GPU memory")


def random(shape, dtype, device, memory_format=torch.contiguous_format):
    out = torch.empty(shape, dtype=dtype, device=device).to(memory_format=memory_format)
    return out.random_(0, 256) if dtype == torch.uint8 else out.uniform_(-1, 1)


def batch(device, limit, dtype, memory_format):
    """Images whose elements run beyond `limit`, and which of them to look at."""
    inner = IMAGE[0] * IMAGE[1] * IMAGE[2]
    n = limit // inner + 3
    at = torch.tensor([0, 1, n - 4, n - 3, n - 2, n - 1])  # element `limit` is the third last image's
    return random((n, *IMAGE), dtype, device, memory_format), at


@every_format
@pytest.mark.parametrize("device, limit", BATCHES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16], ids=str)
def test_sign_step(device, limit, dtype, memory_format):
    room(device, 20)
    x, at = batch(device, limit, dtype, memory_format)
    grad = random(x.shape, torch.bfloat16, device, memory_format)
    eps = torch.rand(len(x), device=device)
    got = ops.sign_step(x, grad, eps, center=x, eps=0.1, out=torch.empty_like(x))
    wanted = ops.sign_step(x[at].cpu(), grad[at].cpu(), eps[at].cpu(), center=x[at].cpu(), eps=0.1,
                           out=torch.empty_like(x[at].cpu()))
    assert x.numel() > limit and torch.equal(got[at].cpu(), wanted)


@every_format
@pytest.mark.parametrize("device, limit", BATCHES)
@pytest.mark.parametrize("kind", ["rademacher", "uniform"])
def test_random_step(device, limit, kind, memory_format):
    room(device, 12)
    x, at = batch(device, limit, torch.uint8, memory_format)
    key = torch.tensor([3, 4])
    got = ops.random_step(x, key.to(device), 0.1, kind=kind, out=torch.empty_like(x))
    few = x[at].cpu()
    wanted = ops.random_step(few, key, 0.1, kind=kind, index=at, out=torch.empty_like(few))
    assert x.numel() > limit and torch.equal(got[at].cpu(), wanted)


@every_format
@pytest.mark.parametrize("device, limit", BATCHES)
def test_model_entry(device, limit, memory_format):
    room(device, 20)
    x, at = batch(device, limit, torch.uint8, memory_format)
    got = ops.model_entry(x, [0.4] * 3, [0.2] * 3, dtype=torch.bfloat16)
    assert x.numel() > limit and torch.equal(got[at].cpu(), ops.model_entry(x[at].cpu(), [0.4] * 3, [0.2] * 3,
                                                                            dtype=torch.bfloat16))


@pytest.mark.parametrize("device, limit", BATCHES)
def test_one_sample_alone(device, limit):
    """Positions within a sample pass 2^31 too; its noise has to be drawn whole."""
    room(device, 12)
    x, key = random((1, limit + 1003), torch.uint8, device), torch.tensor([3, 4])
    got = ops.random_step(x, key.to(device), 0.1, out=torch.empty_like(x)).cpu()
    few = x.cpu()
    assert torch.equal(got, ops.random_step(few, key, 0.1, out=torch.empty_like(few)))
