"""sample_eps: one perturbation size per sample."""
import math

import torch
from torch import Tensor

from . import checks
from . import reference as ref
from .library import register_fake

DISTRIBUTIONS = ("fixed", "uniform", "truncated_normal")


def sample_eps(n: int, key: Tensor, *, dist: str = "truncated_normal", eps_max: float, sigma: float | None = None,
               index: Tensor | None = None) -> Tensor:
    """One perturbation size per sample, a function of (key, sample index) alone.

    Kurakin et al. 2017 draw |T| for every training example, because training at one fixed size gives robustness at
    that size only; T is normal with standard deviation sigma = eps_max / 2, cut at two sigma. Here sizes are drawn by
    the inverse distribution function of u = (upper 24 bits of word 0 of Philox block 0 of the sample + 1/2) / 2^24
    (:func:`random_step` says how key and counter are laid out):

    - ``truncated_normal``: sigma * Phi^-1(1/2 + u/2 * P(|z| <= eps_max / sigma)), cut at eps_max;
    - ``uniform``: u * eps_max;
    - ``fixed``: eps_max.

    Args:
        n: how many.
        key: int64 [2]; the result is on its device. It should not be the key of the noise (:func:`split` makes more).
        eps_max: largest size in image units (16/255 for Kurakin's 16), >= 0.
        sigma: standard deviation of the normal, > 0; default eps_max / 2.
        index: int64 [n], the sample indices, each in [0, 2^32). Default: 0..n-1.

    Returns:
        float32 [n], each in [0, eps_max].

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
    """
    op = "sample_eps"
    n = checks.integer(op, "n", n, least=0)
    device = key.device if isinstance(key, Tensor) else torch.device("cpu")
    key = checks.key(op, key, device)
    dist_id = checks.choice(op, "dist", dist, DISTRIBUTIONS)
    eps_max, sigma = parameters(eps_max, sigma)
    index = checks.index(op, index, n, device)
    out = torch.empty(n, dtype=torch.float32, device=device)
    torch.ops.ensadv_fast.sample_eps.default(key, index, dist_id, eps_max, sigma, out)
    return out


def parameters(eps_max: float, sigma: float | None) -> tuple[float, float]:
    """eps_max and sigma, checked. sigma is 1 by default where eps_max is 0: all sizes are 0 then."""
    eps_max = checks.number("sample_eps", "eps_max", eps_max)
    if not 0 <= eps_max < math.inf:
        raise ValueError(f"sample_eps: eps_max must be finite and >= 0, got {eps_max}")
    sigma = (eps_max / 2 or 1.0) if sigma is None else checks.number("sample_eps", "sigma", sigma)
    if not 0 < sigma < math.inf:
        raise ValueError(f"sample_eps: sigma must be finite and > 0, got {sigma}")
    return eps_max, sigma


def reference(n: int, key: Tensor, *, dist: str = "truncated_normal", eps_max: float, sigma: float | None = None,
              index: Tensor | None = None) -> Tensor:
    """The same in plain PyTorch, in float64 and then rounded; it may differ in the last bit of float32."""
    eps_max, sigma = parameters(eps_max, sigma)
    ids = ref.sample_ids(n, index, key.device)
    u = ((ref.draw(key, torch.zeros_like(ids), ids)[:, 0] >> 8).double() + 0.5) * 2.0**-24
    if dist == "fixed":
        return torch.full_like(u, eps_max).float()
    if dist == "uniform":
        return (u * eps_max).float()
    mass = math.erf(eps_max / (sigma * math.sqrt(2)))
    return (sigma * torch.special.ndtri(0.5 + 0.5 * u * mass)).float().clamp(max=eps_max)


register_fake("sample_eps")
