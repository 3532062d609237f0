"""CleverHans 4.0.0's torch interface: fast_gradient_method and projected_gradient_descent, with its arguments, errors
and results. In place of ``from cleverhans.torch.attacks.fast_gradient_method import fast_gradient_method``:
``from ensadv_fast.compat.cleverhans import fast_gradient_method``.

Both take one keyword more, ``precision``. The model is any callable, and is attacked in the mode that it is in.

Exact: the library's loss and its mean over the batch, its order of steps, projections and clipping, and its draws from
torch's generator. The results are the same bits, except where sums are taken in another order.

Fast: for a torch.nn.Module in eval mode, the attacks of :mod:`ensadv_fast.attacks` on a :class:`ensadv_fast.Source`,
with noise from :func:`ensadv_fast.manual_seed`. The source is made once per model (:func:`ensadv_fast.compat.forget`).
What it cannot do runs exactly, with a warning that says why. The L1 step is the library's own (an ImportError where it
is not installed).

Where ours differ on purpose:

| CleverHans 4.0.0 | here |
| --- | --- |
| results are attached to an autograd graph | they are not |
| gradients of the model's parameters are computed, and added to .grad | they are not |
| images become float32, which models of other dtypes do not take | but for images of the module's own dtype |
| 16-bit images | iterates of float32, rounded within eps |
| attacking in training mode moves batch normalisations' running statistics | they stay |
| under no_grad it fails | it works, under inference_mode too |
| sanity checks: two reductions of the images a step, whether they are asked for or not | one, where asked for |
| sanity checks of images on a GPU are a TypeError | they work |
| images that fail them are attacked first | they are refused at once |
| one-sided clipping is refused after a forward and backward pass | at once |
| each L2 step waits for the device, to check itself | it does not |
| a gradient of NaN makes the pixel NaN for good | it counts as 0 |
"""
import importlib
from types import ModuleType

from .attacks import fast_gradient_method, projected_gradient_descent

__version__ = "4.0.0"
__all__ = ["fast_gradient_method", "projected_gradient_descent"]


def replacements(_: ModuleType) -> list[tuple[object, object]]:
    """(their function, ours) for :func:`ensadv_fast.compat.install`."""
    return [(getattr(importlib.import_module(f"cleverhans.torch.attacks.{name}"), name), globals()[name])
            for name in __all__]
