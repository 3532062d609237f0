"""What our classes put in place of the library's: the call, the choice between exact and fast, and the steps."""
from abc import ABCMeta
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...attacks import gradient
from ...ops.memory import broadcast
from ..precisions import check_precision
from ..steps import linf_step
from .call import Call, calling, wrap
from .models import View

HOOKS = ("value_and_grad", "normalize", "project", "get_random_start", "get_loss_fn", "get_optimizer", "distance")


class Kin(ABCMeta):
    """isinstance and issubclass of ours are true of the library's class too, and of its subclasses: while ours is
    installed, programs ask for it by the library's name."""

    theirs: type
    hooks: dict[str, Any]

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]):
        super().__init__(name, bases, namespace)
        if "theirs" in namespace:
            cls.hooks = {hook: getattr(namespace["theirs"], hook) for hook in HOOKS}

    def __subclasscheck__(cls, subclass: type) -> bool:
        if "theirs" not in vars(cls):
            return super().__subclasscheck__(subclass)
        return cls.theirs in getattr(subclass, "__mro__", ())  # ABCMeta's own check would come back here


class GradientDescent(metaclass=Kin):
    """The first base of our classes; the second, ``theirs``, is the library's class, whose arguments and hooks they
    have.

    hooks: the library's own methods that users may override. untargeted: is a target an error? plain: does it step
    along the gradients themselves, and not along what an optimizer makes of them?
    """

    untargeted: bool
    plain: bool
    rel_stepsize: float  # this and what follows is the library's
    abs_stepsize: float | None
    steps: int
    random_start: bool
    distance: Any
    get_loss_fn: Callable[..., Any]
    get_optimizer: Callable[..., Any]
    get_random_start: Callable[..., Any]
    normalize: Callable[..., Any]
    project: Callable[..., Any]

    @property
    def precision(self) -> str | None:
        """"exact", "fast", or None for what :func:`ensadv_fast.compat.precision` chose. Foolbox has none."""
        return vars(self).get("_precision")

    @precision.setter
    def precision(self, which: str | None) -> None:
        check_precision(type(self).__name__, which)
        vars(self).pop("_precision", None)
        if which is not None:  # repr shows all that is in vars
            self._precision = which

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any) -> Any:
        """Adversarial inputs for float tensors [N, ...] of torch, raw or eagerpy's, within the model's bounds.

        criterion: labels int64 [N], Misclassification or TargetedMisclassification. epsilon: in the units of the
        bounds. Raises what the library raises.
        """
        if kwargs or not self._is_ours(inputs):
            theirs: Any = super()  # the library's class follows
            return theirs.run(model, inputs, criterion, epsilon=epsilon, **kwargs)
        with calling(self, model, inputs, criterion) as call:
            return call.restore(self._perturb(call, float(epsilon)))

    def __call__(self, model: Any, inputs: Any, criterion: Any, *, epsilons: Any,
                 **kwargs: Any) -> tuple[Any, Any, Any]:
        """(raw, clipped, success): the images of :meth:`run`, the same clipped to epsilon, and whether the model itself
        is fooled by those, bool [N]. For K epsilons: two lists of K, and success [K, N].
        """
        if kwargs or type(self).run is not GradientDescent.run or "run" in vars(self) or not self._is_ours(inputs):
            theirs: Any = super()
            return theirs.__call__(model, inputs, criterion, epsilons=epsilons, **kwargs)
        several = isinstance(epsilons, Iterable)
        sizes = list(epsilons) if several else [epsilons]
        if None in sizes:
            raise NotImplementedError(f"{type(self).__name__}: epsilons must be numbers, got None")
        if not sizes:
            raise ValueError(f"{type(self).__name__}: epsilons must not be empty")
        sizes = [float(size) for size in sizes]
        raw, clipped, success = [], [], []
        with calling(self, model, inputs, criterion, several=len(sizes) > 1) as call:
            for size in sizes:
                perturbed = self._perturb(call, size)
                within = call.clip(perturbed, size)
                raw.append(call.restore(perturbed))
                clipped.append(call.restore(within))
                success.append(call.is_fooled_by(within))
        if several:
            return raw, clipped, call.restore(torch.stack(success))
        return raw[0], clipped[0], call.restore(success[0])

    def _is_ours(self, inputs: Any) -> bool:
        """Are the inputs float tensors of torch, and is none of the library's hooks overridden?"""
        raw = getattr(inputs, "raw", inputs)
        return (isinstance(raw, Tensor) and raw.is_floating_point() and not vars(self).keys() & type(self).hooks.keys()
                and all(getattr(type(self), hook) is own for hook, own in type(self).hooks.items()))

    @property
    def _norm(self) -> str:
        return "l2" if self.distance.p == 2 else "linf"

    def _perturb(self, call: Call, epsilon: float) -> Tensor:
        """Adversarial images in the dtype of the call's images."""
        step = self.rel_stepsize * epsilon if self.abs_stepsize is None else self.abs_stepsize
        if call.view is not None and self.plain:
            return self._run_engine(call, call.view, epsilon, step)
        clean = call.clean
        point = clean
        if self.random_start:
            point = self.get_random_start(wrap(clean), epsilon).raw.clamp(*call.bounds)
        steps = self._take_steps if self.plain else self._optimize
        return call.result(steps(call, point, epsilon, step), epsilon, self._norm)

    def why_exact(self) -> str | None:
        """Why our engine cannot take this attack's arguments, or None."""
        if self.steps < 1:
            return "it takes no step"
        step = self.rel_stepsize if self.abs_stepsize is None else self.abs_stepsize
        return "its steps are negative" if step < 0 else None

    def _run_engine(self, call: Call, view: View, epsilon: float, step: float) -> Tensor:
        """The same attack of :mod:`ensadv_fast.attacks`, on a source."""
        lo, hi = call.bounds
        single = self.steps == 1 and not self.random_start and step == epsilon
        if single and call.several:
            take = ops.l2_step if self._norm == "l2" else ops.sign_step
            return take(call.images, call.gradient(call.clean), call.sign * step, lo=lo, hi=hi)
        attack = gradient.Attack(type(self).__name__, epsilon, targeted=call.sign < 0, lo=lo, hi=hi, steps=self.steps,
                                 start="uniform" if self.random_start else None, step=None if single else step,
                                 direction="l2" if self._norm == "l2" else "sign")
        return view.turn(attack(view.source, view.turn(call.images), call.labels))

    def _take_steps(self, call: Call, point: Tensor, epsilon: float, step: float) -> Tensor:
        """The library's steps, rounded in its order. Two tensors serve all iterates."""
        take, clean, free = l2_step if self._norm == "l2" else linf_step, call.clean, None
        for _ in range(self.steps):
            grad = call.gradient(point)
            out = torch.empty_like(clean) if free is None else free
            take(out, point, grad, call.sign * step, clean, epsilon).clamp_(*call.bounds)
            free = None if point is clean else point
            point = out
        return point

    def _optimize(self, call: Call, point: Tensor, epsilon: float, step: float) -> Tensor:
        """The library's own optimizer and steps, on our gradients."""
        clean, x = wrap(call.clean), wrap(point)
        optimizer = self.get_optimizer(clean, step)
        for _ in range(self.steps):
            gradients = self.normalize(wrap(call.gradient(x.raw)), x=x, bounds=call.bounds)
            x = self.project(x + call.sign * optimizer(gradients), clean, epsilon).clip(*call.bounds)
        return x.raw


def l2_step(out: Tensor, point: Tensor, grad: Tensor, step: float, clean: Tensor, eps: float) -> Tensor:
    """clean + the projection of point + step grad / norm2(grad) - clean on the L2 ball, in the library's order, written
    into `out`."""
    torch.mul(grad, 1 / _norms(grad), out=out)
    out.mul_(step).add_(point).sub_(clean)
    return out.mul_((eps / _norms(out)).clamp_(max=1)).add_(clean)


def _norms(t: Tensor) -> Tensor:
    """L2 norm of each sample, at least 1e-12, shaped to broadcast; summed as the library does."""
    return broadcast(t.flatten(1).square().sum(1).sqrt_().clamp_(min=1e-12), t)
