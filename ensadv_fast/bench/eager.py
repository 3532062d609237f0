"""What users write without the ops: one eager expression per case of `ensadv_fast.ops.cases`, of the same arguments.

Each fused kernel is measured against them, eagerly and under torch.compile. So they are written as good user code is:
no needless copies, no host syncs, and a library's own sequence of operations where there is one.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _spread(value, x: Tensor):
    """A number as it is; one number per sample broadcast over x, in x's dtype so that x is not widened."""
    return value.view(-1, 1, 1, 1).to(x.dtype) if isinstance(value, Tensor) else value


def _clip_sign(x, grad, step, lo=0.0, hi=1.0):
    return torch.clamp(x + step * grad.sign(), lo, hi)


def _torchattacks_step(x, grad, step, *, center, eps, lo=0.0, hi=1.0):
    """The seven kernels of torchattacks' PGD."""
    eps = _spread(eps, x)
    x = x + _spread(step, x) * grad.sign()
    delta = torch.clamp(x - center, min=-eps, max=eps)
    return torch.clamp(center + delta, min=lo, max=hi)


def _torchattacks_momentum(x, grad, momentum, step, *, decay, center, eps):
    """torchattacks' MIFGSM: twelve kernels."""
    grad = grad / torch.mean(torch.abs(grad), dim=(1, 2, 3), keepdim=True)
    grad = grad + momentum.to(grad.dtype) * decay
    return _torchattacks_step(x, grad, step, center=center, eps=eps)


def _norms(t):
    return t.flatten(1).norm(dim=1)


def _l2_direction(x, grad, step):
    return torch.clamp(x + step * (grad / _spread(_norms(grad), x)), 0, 1)


def _l2_step(x, grad, step, *, center, eps):
    return _l2_projection(x + step * (grad / _spread(_norms(grad), x)), center, eps, 0, 1)


def _l2_projection(x, center, eps, lo, hi):
    delta = x - center
    length = _norms(delta)
    delta = delta * _spread(torch.minimum(torch.ones_like(length), eps / length), x)
    return torch.clamp(center + delta, lo, hi)


def _project_linf(x, center, eps, *, norm, lo):
    eps = _spread(eps, x)
    return torch.clamp(center + torch.clamp(x - center, -eps, eps), lo, 1)


def _uniform_per_sample(x, key, eps, *, kind, index):
    return torch.clamp(x + _spread(eps, x) * torch.empty_like(x).uniform_(-1, 1), 0, 1)


def _truncated_normal(x, key, eps, *, kind):
    noise = torch.nn.init.trunc_normal_(torch.empty_like(x, dtype=torch.float32), 0.0, eps / 2, -eps, eps)
    return torch.clamp(x + noise.to(x.dtype), 0, 1)


def _pick(scores: Tensor, labels: Tensor, rule: str) -> Tensor:
    if rule == "least_likely":
        return scores.argmin(1)
    if rule == "predicted":
        return scores.argmax(1)
    if rule == "random":
        other = torch.randint_like(labels, scores.shape[1] - 1)
        return other + (other >= labels)
    return labels


def _sample_loss(scores: Tensor, y: Tensor, loss: str, kappa: float) -> Tensor:
    if loss == "ce":
        return F.cross_entropy(scores, y, reduction="none")
    own = scores.gather(1, y[:, None]).squeeze(1)
    margin = own - scores.scatter(1, y[:, None], -torch.inf).amax(1)
    if loss == "cw":
        return -torch.clamp(margin + kappa, min=0)
    ranked = scores.sort(dim=1).values  # as AutoAttack's dlr_loss has it
    return -margin / (ranked[:, -1] - ranked[:, -3] + 1e-12)


def _probabilities(z: Tensor) -> Tensor:
    """The softmax, in float32 at least: a 16-bit one rounds to zeros, which have no logarithm."""
    return z.softmax(-1, dtype=torch.promote_types(z.dtype, torch.float32))


def _logit_grad(logits, labels, *, key, rule="true", loss="ce", kappa=0.0, fuse=None, weights=None):
    """The loss of the mixed logits (or probabilities, or losses) and autograd's gradient of its sum, with labels."""
    z = logits.detach().requires_grad_()
    scores = z
    if fuse is not None:
        scores = (weights.view(-1, 1, 1) * (z if fuse == "logits" else _probabilities(z))).sum(0)
    y = _pick(scores.detach(), labels, rule)
    if fuse == "loss":
        value = sum(w * _sample_loss(one, y, loss, kappa) for w, one in zip(weights, z, strict=True))
    elif fuse == "probs" and loss == "ce":
        value = -scores.gather(1, y[:, None]).log()
    else:
        value = _sample_loss(scores, y, loss, kappa)
    return torch.autograd.grad(value.sum(), z)[0], y


def _model_entry(x, mean, std, *, delta=None, dtype=None, channels_last=True):
    dtype = dtype or (torch.float32 if x.dtype == torch.uint8 else x.dtype)
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    if delta is not None:
        x = torch.clamp(x + delta, 0, 1)
    x = (x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    return x.to(dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _bias_act(x, bias, *, residual=None, act="relu", lo=None, hi=None):
    """As a folded network's modules have it. It gives no mask: autograd keeps the whole result instead."""
    v = x + bias.view(-1, 1, 1).to(x.dtype)
    v = v if residual is None else v.add_(residual)
    if act == "hardtanh":
        return F.hardtanh_(v, lo, hi)
    return torch.relu_(v) if act == "relu" else F.leaky_relu_(v)


def _ensemble_linear(x, weight, bias, *, act=None):
    y = torch.baddbmm(bias[:, None], x.expand(len(weight), -1, -1), weight.mT)
    return y if act is None else y.relu()


def _ensemble_linear_grad(grad, weight, mask, *, reduce=False):
    """What autograd does, and the unpacking of the mask's bits, which autograd need not do: it keeps whole numbers."""
    kept = (mask[..., None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1).flatten(-2)
    out = torch.bmm(grad * kept[..., :grad.shape[-1]], weight)
    return out.sum(0) if reduce else out


def _eps(n, key, *, dist, eps_max):
    out = torch.empty(n, device=key.device)
    if dist == "fixed":
        return out.fill_(eps_max)
    if dist == "uniform":
        return out.uniform_(0, eps_max)
    return torch.nn.init.trunc_normal_(out, 0.0, eps_max / 2, -eps_max, eps_max).abs()


EAGER: dict[str, Callable] = {
    "null-copy": lambda x: x.clone(),
    "sign_step-free": _clip_sign,
    "sign_step-ball": _torchattacks_step,
    "sign_step-per_sample": _torchattacks_step,
    "random_step-rademacher": lambda x, key, eps, kind: torch.clamp(x + eps * torch.randn_like(x).sign(), 0, 1),
    "random_step-uniform": lambda x, key, eps, kind, clip: x + torch.empty_like(x).uniform_(-eps, eps),
    "random_step-normal": lambda x, key, eps, kind: torch.clamp(x + eps * torch.randn_like(x), 0, 1),
    "random_step-truncated_normal": _truncated_normal,
    "random_step-per_sample": _uniform_per_sample,
    "momentum_step-ball": _torchattacks_momentum,
    "l2_step-free": _l2_direction,
    "l2_step-ball": _l2_step,
    "project-linf": _project_linf,
    "project-l2": lambda x, center, eps, norm, lo: _l2_projection(x, center, eps, lo, 1),
    **{f"ensemble_linear-{mode}": _ensemble_linear for mode in ("relu", "shared", "linear")},
    **{f"ensemble_linear-{mode}": _ensemble_linear_grad for mode in ("grad", "grad_reduced")},
    "model_entry-normalise": _model_entry,
    "model_entry-bfloat16": _model_entry,
    "model_entry-delta": _model_entry,
    "bias_act-relu": _bias_act,
    "bias_act-residual": _bias_act,
    "bias_act-hardtanh": _bias_act,
    "bias_act-leaky_relu": _bias_act,
    **{f"sample_eps-{dist}": _eps for dist in ("fixed", "uniform", "truncated_normal")},
    **{f"logit_grad-{mode}": _logit_grad for mode in (
        "true_ce", "predicted_cw", "least_likely_ce", "random_dlr", "fused_logits_ce", "fused_logits_cw",
        "fused_probs_ce", "fused_probs_cw", "fused_loss_ce", "fused_loss_cw")},
}
# Cases for which there is nothing that users would write, and why.
NO_EAGER = {
    **dict.fromkeys(("act_grad-bits", "act_grad-slope"),
                    "autograd keeps a ReLU's whole result for this, which is not among the arguments"),
    "split_key-split": "PyTorch's generators cannot be split: nobody derives keys from keys",
}
