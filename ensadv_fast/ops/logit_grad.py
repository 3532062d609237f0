"""logit_grad: label, loss and the start of the backward pass, from one forward pass's logits in one launch."""
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, fast_path, keys, memory
from .library import register_fake
from .losses import LOSSES, RULES, Objective, check_classes, choose_labels, power_of_two_scale, sample_losses

FUSES = ("logits", "probs", "loss")
call = torch.ops.ensadv_fast.logit_grad.default
_RULES, _LOSSES = ({name: i for i, name in enumerate(known)} for known in (RULES, LOSSES))
_FUSES: dict[str | None, int] = {None: 0, **{name: i for i, name in enumerate(FUSES)}}


class LogitGrad(NamedTuple):
    """What :func:`logit_grad` returns.

    grad: gradient of the loss by the logits, times scale; the logits' shape and dtype. labels: int64 [B], those chosen.
    loss: [B], float32 (float64 for float64 logits). scale: [B] of loss's dtype, a power of two per sample; grad / scale
    is the true gradient.
    """

    grad: Tensor
    labels: Tensor
    loss: Tensor
    scale: Tensor


def logit_grad(logits: Tensor, labels: Tensor | None = None, *, rule: str = "true", targeted: bool = False,
               loss: str = "ce", kappa: float = 0.0, fuse: str | None = None,
               weights: Sequence[float] | Tensor | None = None, index: Tensor | None = None,
               key: Tensor | None = None, rescale: bool = True) -> LogitGrad:
    """Chosen labels, per-sample loss, and its gradient by the logits times a power of two per sample.

    The loss is summed over the batch, not averaged. Untargeted attacks ascend it, targeted ones descend.

    Args:
        logits: [B, C], or the logits of K models, [K, B, C]; float32, float16, bfloat16 or float64.
        labels: int64 [B] on the logits' device, or None: then the prediction takes the place of the true label, so that
            no label leaks (Kurakin et al. 2017, section 4.3).
        rule: ``true``: labels; ``predicted``: argmax; ``least_likely``: argmin (Step-LL, Iter-LL); ``random``:
            uniform over the classes other than ``labels`` (or the prediction): w * (C - 1) >> 32, counted over the
            other classes in order, where w is word 0 of Philox block 0 of the sample (:func:`random_step` says how key
            and counter are laid out). Ties go to the lowest index.
        loss: ``ce``: cross-entropy. ``cw``: the margin Z_y - max_{i != y} Z_i as a hinge (Carlini and Wagner 2017;
            the PGD of Tramer et al. 2018): -max(0, Z_y - max Z_i + kappa), targeted max(0, max Z_i - Z_y + kappa);
            its gradient vanishes once the margin is reached. ``dlr``: difference of logits ratio (Croce and Hein
            2020): -(Z_y - max_{i != y} Z_i) / (Z_(1) - Z_(3)), Z_(k) the k-th largest; needs three classes.
        targeted, kappa: turn and shift the hinge of ``cw``; the other losses ignore both.
        fuse: what is mixed for [K, B, C]; None for [B, C]. ``logits``: one loss of sum_k w_k z_k (Dong et al. 2018, who
            found it the strongest). ``probs``: one loss of the mixed probabilities P = sum_k w_k p_k:
            ``ce`` is -log P_y, the margins are those of P. ``loss``: sum_k w_k loss(z_k). Labels come from the
            mixed logits for "logits", from P for the other two.
        weights: w, K numbers or a tensor [K] on the logits' device, >= 0 and used as given (default: 1/K each).
            Numbers are copied to the device at every call: a GPU loop passes a tensor.
        index: int64 [B], sample indices for the random rule, each in [0, 2^32). Default: 0..B-1.
        key: int64 [2] for the random rule. Default: the package's own stream.
        rescale: multiply each sample's gradient by the power of two that brings the largest off-label probability
            of the (mixed) distribution into [1, 2), so that no dtype underflows; at most 2^100, and 1 where all of
            these probabilities are 0. float16 holds the result up to 32,000 classes. The margins' gradients are of
            order 1 already: their scale is 1.

    Returns:
        :class:`LogitGrad`, without autograd history. It is computed in float32 (float64 for float64 logits) and
        rounded once. Where several scores beside the label's tie for the largest, they share the gradient evenly, as
        in torch.amax. An infinite or NaN maximum gives NaN, as in torch.softmax. A label outside [0, C) gives loss NaN
        and a zero gradient on CUDA, where labels are not looked at.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
    """
    op = "logit_grad"
    logits = checks.tensor(op, "logits", logits)
    used = key if rule == "random" else None
    if (rule in _RULES and loss in _LOSSES and fuse in _FUSES and type(kappa) is float and kappa == kappa
            and logits.dim() == (2 if fuse is None else 3) and (weights is None or fuse is not None)
            and (used is not None or rule != "random") and fast_path.fits(logits, labels, weights, index, used)):
        result = _empty(logits, labels)
        if fast_path.accepted(call, logits, labels, weights, used, index, _RULES[rule], _LOSSES[loss], _FUSES[fuse],
                              bool(targeted), kappa, bool(rescale), *result):
            return result
    checks.choice(op, "rule", rule, RULES)
    checks.choice(op, "loss", loss, LOSSES)
    members, n, classes = _check_shape(op, logits, fuse)
    if labels is not None:
        labels = checks.tensor(op, "labels", labels, (torch.int64,))
        if labels.shape != (n,):
            raise ValueError(f"{op}: labels must have shape [B] = [{n}], got {tuple(labels.shape)}")
        checks.labels(op, "labels", labels, n, logits.device, classes, of="logits'", whose="")
    if weights is not None and fuse is None:
        raise ValueError(f"{op}: weights must be None for logits [B, C], got {type(weights).__name__} for shape "
                         f"{tuple(logits.shape)}")
    weights = member_weights(op, weights, members, logits.device, memory.compute_dtype(logits.dtype))
    kappa = checks.number(op, "kappa", kappa)
    index = checks.index(op, index, n, logits.device)
    if rule == "random" and key is None:
        key = keys.next_key(logits.device)
    key = None if key is None else checks.key(op, key, logits.device)
    return unchecked(logits, labels, Objective(rule, targeted, loss, kappa), fuse=fuse, weights=weights, index=index,
                     key=key, rescale=rescale)


def _check_shape(op: str, logits: Tensor, fuse: str | None) -> tuple[int, int, int]:
    """(members, samples, classes) of logits [B, C] without `fuse`, or [K, B, C] with one."""
    if logits.dim() not in (2, 3):
        raise ValueError(f"{op}: logits must have shape [B, C] or [K, B, C], got {tuple(logits.shape)}")
    if (fuse is None) != (logits.dim() == 2):
        raise ValueError(f"{op}: fuse must be one of {', '.join(FUSES)} for logits [K, B, C] and None for [B, C], "
                         f"got {fuse!r} for shape {tuple(logits.shape)}")
    if fuse is not None:
        checks.choice(op, "fuse", fuse, FUSES)
    members, n, classes = (1, *logits.shape) if fuse is None else logits.shape
    if members < 1 or classes < 1:
        raise ValueError(f"{op}: logits must have at least one member and one class, got {tuple(logits.shape)}")
    return members, n, classes


def unchecked(logits: Tensor, labels: Tensor | None, objective: Objective, *, fuse: str | None = None,
              weights: Tensor | None = None, index: Tensor | None = None, key: Tensor | None = None,
              rescale: bool = True) -> LogitGrad:
    """:func:`logit_grad` for callers that have checked all arguments but the number of classes, which is checked here.

    weights: [K] in the dtype of the computation, or None. key: on the logits' device where the rule is random.
    """
    rule, loss = objective.rule, objective.loss
    assert isinstance(loss, str)
    check_classes("logit_grad", logits.size(-1), rule=rule, loss=loss)
    logits = logits.detach().contiguous()
    result = _empty(logits, labels)
    call(logits, None if labels is None else labels.contiguous(), weights, key if rule == "random" else None, index,
         _RULES[rule], _LOSSES[loss], _FUSES[fuse], bool(objective.targeted), objective.kappa, bool(rescale), *result)
    return result


def _empty(logits: Tensor, labels: Tensor | None) -> LogitGrad:
    """Memory for the results."""
    n, wide = logits.size(-2), memory.compute_dtype(logits.dtype)
    value = logits.new_empty(n) if logits.dtype == wide else logits.new_empty(n, dtype=wide)
    chosen = logits.new_empty(n, dtype=torch.int64) if labels is None else torch.empty_like(labels)
    return LogitGrad(torch.empty_like(logits), chosen, value, torch.empty_like(value))


def member_weights(op: str, weights: Sequence[float] | Tensor | None, members: int, device: torch.device,
                   dtype: torch.dtype) -> Tensor | None:
    """The members' weights as :func:`unchecked` takes them: `dtype` [K], or None."""
    if weights is None:
        return None
    given = isinstance(weights, Tensor)
    if not given:
        if not isinstance(weights, Sequence):
            raise TypeError(f"{op}: weights must be numbers or a tensor, got {type(weights).__name__}")
        weights = torch.tensor([checks.number(op, "weights", w) for w in weights], dtype=dtype, device="cpu")
    weights = checks.tensor(op, "weights", weights)
    if weights.shape != (members,):
        raise ValueError(f"{op}: weights must have shape [K] = [{members}], got {tuple(weights.shape)}")
    if given and weights.device != device:
        raise ValueError(f"{op}: weights must be on logits' device {device}, got {weights.device}")
    if checks.is_readable(weights) and not (bool((weights >= 0).all()) and 0 < float(weights.sum()) < torch.inf):
        raise ValueError(f"{op}: weights must be >= 0, finite and not all 0, got {weights.tolist()}")
    return weights.to(device, dtype).contiguous()


def reference(logits: Tensor, labels: Tensor | None = None, *, rule: str = "true", targeted: bool = False,
              loss: str = "ce", kappa: float = 0.0, fuse: str | None = None,
              weights: Sequence[float] | Tensor | None = None, index: Tensor | None = None,
              key: Tensor | None = None, rescale: bool = True) -> LogitGrad:
    """The same by plain PyTorch and its autograd, in float64, then rounded."""
    wide = memory.compute_dtype(logits.dtype)
    with torch.enable_grad():
        z = logits.detach().double().requires_grad_()
        members = z[None] if fuse is None else z
        w = z.new_full((len(members),), 1 / len(members)) if weights is None else weights
        w = torch.as_tensor(w, dtype=wide, device=z.device).double().view(-1, 1, 1)
        # log P takes the place of P: taken as logits, it has the same cross-entropy.
        scores = (w * members).sum(0) if fuse in (None, "logits") else (w * members.softmax(2)).sum(0).log()
        chosen = choose_labels(scores.detach(), labels, rule, key, index)
        if fuse == "loss":
            value = sum((w[k, 0] * sample_losses(m, chosen, loss, targeted=targeted, kappa=kappa)
                         for k, m in enumerate(members)), start=torch.zeros((), dtype=z.dtype, device=z.device))
        elif fuse == "probs" and loss == "ce":
            value = -scores.gather(1, chosen[:, None]).squeeze(1)
        else:
            value = sample_losses(scores.exp() if fuse == "probs" else scores, chosen, loss, targeted=targeted,
                                  kappa=kappa)
        scale = power_of_two_scale(scores.to(wide), chosen, loss) if rescale else torch.ones_like(value, dtype=wide)
        (grad,) = torch.autograd.grad(value, z, scale.double())
    return LogitGrad(grad.to(logits.dtype), chosen, value.detach().to(wide), scale)


register_fake("logit_grad")
