"""The gradient that a step follows, under whatever transforms do to the image."""
import itertools
from collections.abc import Callable, Sequence

from torch import Tensor

from ..ops.memory import broadcast
from ..sources.base import InputGrad
from .transforms import Transform


class ViewedGradient:
    """The gradient that a step follows: the mean over the views that transforms take of a point, each taken back."""

    def __init__(self, transforms: tuple[Transform, ...], x: Tensor, own: Sequence[Tensor | None],
                 index: Tensor | None, evaluations: int, averaged: bool) -> None:
        self.copies = list(itertools.product(*(range(t.copies) for t in transforms)))
        passes = evaluations * len(self.copies)
        self.views = [t.view(x, key, index, passes) for t, key in zip(transforms, own)]
        self.smoothers = [s for s in (t.smoother(x) for t in transforms) if s is not None]
        self.true = averaged or len(self.copies) > 1  # only what is averaged needs the gradient's true size

    def at(self, point: Tensor, number: int,
           forward_backward: Callable[[Tensor], InputGrad]) -> tuple[InputGrad, Tensor]:
        """What the first copy's pass gave, and the gradient by the point, in the point's dtype."""
        first: InputGrad | None = None
        total: Tensor | None = None
        for c, copy in enumerate(self.copies):
            image, backs = point, list[Callable[[Tensor], Tensor]]()
            for view, which in zip(self.views, copy):
                if view is not None:
                    image, back = view(image, number * len(self.copies) + c, which)
                    backs.append(back)
            passed = forward_backward(image)
            grad = passed.grad / broadcast(passed.scale, image) if self.true else passed.grad
            for back in reversed(backs):
                grad = back(grad)
            first = passed if first is None else first
            total = grad if total is None else total.add_(grad)
        assert first is not None and total is not None
        return first, total if len(self.copies) == 1 else total / len(self.copies)

    def smoothed(self, grad: Tensor) -> Tensor:
        for smooth in self.smoothers:
            grad = smooth(grad)
        return grad
