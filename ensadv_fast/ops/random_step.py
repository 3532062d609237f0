"""random_step: the random start of RAND+FGSM, of fast adversarial training and of PGD."""
import math

import torch
from torch import Tensor

from . import checks, fast_path, memory
from . import reference as ref
from .library import register_fake

KINDS = ("rademacher", "uniform", "truncated_normal", "normal")
_IDS = {kind: i for i, kind in enumerate(KINDS)}
call = torch.ops.ensadv_fast.random_step.default


def random_step(x: Tensor, key: Tensor, eps: float | Tensor, *, kind: str = "rademacher",
                index: Tensor | None = None, lo: float = 0.0, hi: float = 1.0, clip: bool = True,
                out: Tensor | None = None) -> Tensor:
    """x + noise, clipped to [lo, hi].

    The noise is a function of (key, sample index, element) alone: the same for any batch size, dtype, memory
    format, device, thread count or rank. Elements are counted in logical (contiguous) order. Random words come from
    Philox-4x32-10 with key words (seed low, seed high) and counter words (block, sample index, offset low, offset
    high):

    - ``rademacher``: eps * sign(N(0, 1)), the random step of RAND+FGSM (Tramer et al. 2018, equation 4). A random
      sign is one bit: element e takes bit e % 32 of word (e % 128) // 32 of block e // 128; 1 is +eps.
    - ``uniform``: U(-eps, eps), the start of PGD (Madry et al. 2018) and Fast-AT (Wong et al. 2020). Element e
      takes the upper 24 bits i of word e % 4 of block e // 4: eps * (2 i + 1 - 2^24) / 2^24.
    - ``truncated_normal``: normal of standard deviation eps / 2 cut at eps (the control of Kurakin et al. 2017,
      appendix A): eps / 2 * Phi^-1(1/2 + erf(sqrt 2) * (2 i + 1 - 2^24) / 2^25).
    - ``normal``: N(0, eps^2), bounded only by [lo, hi]: eps * Phi^-1(1/2 + (2 i + 1 - 2^24) / 2^25).

    Args:
        x: images [N, ...], float32, float16, bfloat16, float64, or uint8 (level / 255), contiguous or channels_last
            without a copy.
        key: int64 [2] = (seed, offset) on x's device, from :func:`fresh_key` or :func:`split`.
        eps: size of the noise in image units, >= 0: a number or a tensor [N].
        index: int64 [N] on x's device, the sample indices (for example positions in the data set), in [0, 2^32).
            Default: 0..N-1.
        lo, hi, clip: range of valid pixels; ``clip=False`` leaves the sum unclipped.
        out: written and returned where given; x's shape, dtype and device. It may be x.

    Returns:
        A tensor of x's dtype (float32 for uint8 x) and memory format, without autograd history. 16-bit results are
        at most float32(eps) from x, and rounded toward x where the nearest number would not be, except for ``normal``.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
    """
    e = fast_path.as_scalar_or_tensor(eps)
    if e and clip and kind in _IDS and fast_path.plain_bounds(lo, hi) and fast_path.fits(x, key, index, e[0], out):
        result = memory.fresh(x) if out is None else out
        if fast_path.accepted(call, x, key, index, *e, _IDS[kind], lo, hi, result):
            return result if out is None else memory.mark_written(out)
    op = "random_step"
    x = checks.images(op, x)
    key = checks.key(op, key, x.device)
    kind_id = checks.choice(op, "kind", kind, KINDS)
    eps_n, eps_1 = checks.per_sample(op, "eps", eps, x, is_size=True)
    index = checks.index(op, index, x.shape[0], x.device)
    lo, hi = checks.bounds(op, lo, hi, x.dtype if out is None else out.dtype) if clip else (-math.inf, math.inf)
    checks.output(op, out, x, checks.out_dtypes(x) if x.dtype == torch.uint8 else (x.dtype,))
    to = memory.Destination(x, out)
    x = to.input(x)
    call(x, key, index, eps_n, eps_1, kind_id, lo, hi, to.dense)
    return to.result()


def unit_noise(kind: str, key: Tensor, ids: Tensor, inner: int) -> Tensor:
    """float32 [N, inner]: the noise at eps = 1."""
    per_block = 128 if kind == "rademacher" else 4
    e = torch.arange(inner, device=key.device)
    blocks = torch.arange(-(-inner // per_block), device=key.device)
    words = ref.draw(key, blocks, ids[:, None]).flatten(1)
    if kind == "rademacher":
        return ((words[:, e // 32] >> e % 32 & 1) * 2 - 1).float()
    centered = ((words[:, e] >> 8) * 2 + 1 - 2**24).float()
    if kind == "uniform":
        return centered * 2.0**-24
    if kind == "normal":
        return ref.quantile(centered * 2.0**-25)
    return (0.5 * ref.quantile(centered * (torch.tensor(0.954499736, device="cpu") * 2.0**-25))).clamp(-1, 1)


def reference(x: Tensor, key: Tensor, eps: float | Tensor, *, kind: str = "rademacher", index: Tensor | None = None,
              lo: float = 0.0, hi: float = 1.0, clip: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    """The same in plain PyTorch; `dtype` is that of the result (default: x's)."""
    lo, hi = (lo, hi) if clip else (-math.inf, math.inf)
    ids = ref.sample_ids(x.shape[0], index, x.device)
    inner = x.numel() // max(1, x.shape[0])
    # The noise is float32 whatever x's dtype is, so that it is the same for every dtype.
    noise = ref.scalars(eps, x).float() * unit_noise(kind, key, ids, inner).reshape(x.shape)
    wide = memory.widen(x)
    reach = ref.scalars(eps if kind != "normal" else math.inf, x)
    return ref.finish(wide + noise, wide, reach, lo, hi, dtype or memory.result_dtype(x))


register_fake("random_step")
