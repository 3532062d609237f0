"""The base class of torchattacks' attacks: modes, normalisation, targets, and the call."""
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..model_mode import model_mode
from ..precisions import check_precision, is_fast
from .saving import Saving

_Method = TypeVar("_Method", bound=Callable[..., None])


def _also_on_held(method: _Method) -> _Method:
    """A setter that sets this attack, and then every attack that this one holds."""
    @functools.wraps(method)
    def on_all(self: "Attack", *args: Any, **kwargs: Any) -> None:
        method(self, *args, **kwargs)
        for attack in self._attacks.values():
            getattr(attack, method.__name__)(*args, **kwargs)
    return cast(_Method, on_all)


class Kin(type):
    """While ours are installed, isinstance of our base class is true of torchattacks' own attacks too: programs ask for
    it by the library's name."""

    theirs: tuple[type, ...] = ()

    def __instancecheck__(cls, instance: object) -> bool:
        return super().__instancecheck__(instance) or (cls is Attack and isinstance(instance, cls.theirs))


class Attack(Saving, metaclass=Kin):
    """Base class of all attacks, with the interface of torchattacks' own. Subclasses override :meth:`forward`.

    name: shown by repr. model: a module that gives logits [N, C] for images [N, C, H, W] in [0, 1], or normalised ones
    (:meth:`set_normalization_used`). During an attack it is in the mode of :meth:`set_model_training_mode`, afterwards
    in its own. Images and labels are moved to ``device``, that of the model's first parameter.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        self.attack = name
        self._attacks: OrderedDict[str, Attack] = OrderedDict()
        self.set_model(model)
        self.device: torch.device | str | None
        try:
            self.device = next(model.parameters()).device
        except (AttributeError, StopIteration):  # anything that can be called may be a model
            self.device = None
            print("Failed to set device automatically, please try set_device() manual.")
        self.attack_mode = "default"
        self.supported_mode = ["default"]
        self.targeted = False
        self._target_map_function: Callable[..., Tensor] | None = None
        self.normalization_used: dict[str, Tensor] | None = None
        self._normalization_applied: bool | None = None
        if type(model).__name__ == "RobModel":
            self._set_rmodel_normalization_used(model)
        self._model_training = self._batchnorm_training = self._dropout_training = False
        self._precision: str | None = None

    def forward(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """The attack itself, on images in [0, 1]."""
        raise NotImplementedError

    def __call__(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Adversarial images in the shape of `inputs`, on the attack's device, without autograd history. With
        normalisation, inputs and results are normalised images. It works where autograd is off, too."""
        mode = model_mode(self.model, self._model_training, self._batchnorm_training, self._dropout_training)
        with torch.inference_mode(False), torch.enable_grad(), mode:
            if self._normalization_applied is not True:
                return self.forward(inputs, labels, *args, **kwargs)
            self._set_normalization_applied(False)
            try:
                return self.normalize(self.forward(self.inverse_normalize(inputs), labels, *args, **kwargs))
            finally:
                self._set_normalization_applied(True)

    # Exact, or fast on our sources.

    @property
    def precision(self) -> str | None:
        """"exact", "fast", or None for what :func:`ensadv_fast.compat.precision` chose. torchattacks has none."""
        return self._precision

    @precision.setter
    def precision(self, which: str | None) -> None:
        self._precision = check_precision(self.attack, which)
        for attack in self._attacks.values():
            if isinstance(type(attack), Kin):  # not torchattacks' own
                attack.precision = which

    @property
    def _is_fast(self) -> bool:
        return is_fast(self._precision)

    def _change_model_mode(self, given_training: bool) -> None:
        """Do nothing. torchattacks' own attacks call this on attacks that they hold; ours set the mode in each call."""

    _recover_model_mode = _change_model_mode

    # The model, and what its images are.

    @_also_on_held
    def set_model(self, model: nn.Module) -> None:
        """Attack this model from now on. The device stays the same."""
        self.model = model
        self.model_name = type(model).__name__

    @_also_on_held
    def set_device(self, device: torch.device | str) -> None:
        """Bring images and labels to this device."""
        self.device = device

    @_also_on_held
    def set_model_training_mode(self, model_training: bool = False, batchnorm_training: bool = False,
                                dropout_training: bool = False) -> None:
        """Attack the model in training mode, its batch normalisations and dropouts only where these are set, too.

        Batch normalisations in training mode use the batch's statistics; the running ones do not move.
        """
        self._model_training = model_training
        self._batchnorm_training = batchnorm_training
        self._dropout_training = dropout_training

    def get_logits(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Logits [N, C] of images in [0, 1]. It may be overridden; the attack is then exact."""
        return self.model(self.normalize(inputs) if self._normalization_applied is False else inputs)

    @_also_on_held
    def set_normalization_used(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> None:
        """Take and return images that are normalised by these numbers per channel."""
        self.normalization_used = {
            name: torch.as_tensor(values).detach().clone().reshape(1, len(values), 1, 1)
            for name, values in (("mean", mean), ("std", std))}
        self._normalization_applied = True

    @_also_on_held
    def _set_normalization_applied(self, flag: bool) -> None:
        self._normalization_applied = flag

    def _set_rmodel_normalization_used(self, model: nn.Module) -> None:
        """Use the normalisation that a model of MAIR says it has."""
        mean, std = (getattr(model, name, None) for name in ("mean", "std"))
        if mean is None or std is None:
            return
        mean, std = torch.as_tensor(mean).detach().cpu().flatten(), torch.as_tensor(std).detach().cpu().flatten()
        if (mean != 0).all() or (std != 1).all():
            self.set_normalization_used(mean, std)

    def normalize(self, inputs: Tensor) -> Tensor:
        return (inputs - self._statistic("mean", inputs)) / self._statistic("std", inputs)

    def inverse_normalize(self, inputs: Tensor) -> Tensor:
        return inputs * self._statistic("std", inputs) + self._statistic("mean", inputs)

    def _statistic(self, name: str, inputs: Tensor) -> Tensor:
        if self.normalization_used is None:
            raise ValueError(f"{self.attack}: no normalization is used: call set_normalization_used first")
        return self.normalization_used[name].to(inputs.device, inputs.dtype)

    # Which labels are attacked.

    def get_mode(self) -> str:
        """"default", "targeted(custom)", "targeted(random)", "targeted(least-likely)" or "targeted(label)"."""
        return self.attack_mode

    @_also_on_held
    def set_mode_default(self) -> None:
        """Away from the labels given."""
        self.attack_mode = "default"
        self.targeted = False
        print("Attack mode is changed to 'default.'")

    @_also_on_held
    def set_mode_targeted_by_function(self, target_map_function: Callable[..., Tensor], quiet: bool = False) -> None:
        """Toward ``target_map_function(images, labels)``."""
        self._set_mode_targeted("targeted(custom)", quiet)
        self._target_map_function = target_map_function

    @_also_on_held
    def set_mode_targeted_random(self, quiet: bool = False) -> None:
        """Toward a class drawn uniformly from those other than the label."""
        self._set_mode_targeted("targeted(random)", quiet)
        self._target_map_function = self.get_random_target_label

    @_also_on_held
    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """Toward the class of the kth smallest logit among those other than the label."""
        if kth_min < 1:
            raise AssertionError(f"{self.attack}: kth_min must be >= 1, got {kth_min}")
        self._set_mode_targeted("targeted(least-likely)", quiet)
        self._kth_min = kth_min
        self._target_map_function = self.get_least_likely_label

    @_also_on_held
    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:
        """Toward the labels given."""
        self._set_mode_targeted("targeted(label)", quiet)
        self._target_map_function = _keep_labels

    def _set_mode_targeted(self, mode: str, quiet: bool) -> None:
        """Raises ValueError, nothing changed, where this attack or one that it holds cannot be targeted."""
        for attack in (self, *self._attacks.values()):
            if "targeted" not in attack.supported_mode:
                raise ValueError("Targeted mode is not supported.")
        self.targeted = True
        self.attack_mode = mode
        if not quiet:
            print(f"Attack mode is changed to '{mode}'.")

    def get_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """The labels to reach, as the mode says."""
        if self._target_map_function is None:
            raise ValueError("target_map_function is not initialized by set_mode_targeted.")
        return self._target_map_function(inputs, labels)

    @torch.no_grad()
    def get_output_with_eval_nograd(self, inputs: Tensor) -> Tensor:
        """Logits in eval mode, without autograd history."""
        with model_mode(self.model):
            return self.get_logits(inputs)

    @torch.no_grad()
    def get_least_likely_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Classes [N] of the kth smallest logits, without the labels given (or predicted). No host sync."""
        outputs = self.get_output_with_eval_nograd(inputs)
        labels = outputs.argmax(1) if labels is None else labels.to(outputs.device)
        if self._kth_min >= outputs.shape[1]:
            raise ValueError(f"{self.attack}: kth_min must be less than the {outputs.shape[1]} classes, "
                             f"got {self._kth_min}")
        others = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
        others = others.scatter(1, labels[:, None], torch.inf)
        return others.kthvalue(self._kth_min, dim=1).indices.to(self.device)

    @torch.no_grad()
    def get_random_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Labels [N] other than those given (or predicted), by torch's CPU generator: one draw per sample."""
        outputs = self.get_output_with_eval_nograd(inputs)
        labels = outputs.argmax(1) if labels is None else labels.to(outputs.device)
        drawn = ((outputs.shape[1] - 1) * torch.rand(len(labels))).long().to(outputs.device, non_blocking=True)
        return (drawn + (drawn >= labels)).to(self.device)

    # What repr shows, and which attacks this one holds.

    def __repr__(self) -> str:
        shown = {name: value for name, value in vars(self).items()
                 if not name.startswith("_") and name not in ("model", "attack", "supported_mode")}
        shown["attack_mode"] = self.attack_mode
        shown["normalization_used"] = self.normalization_used is not None
        return f"{self.attack}({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def __setattr__(self, name: str, value: object) -> None:
        """Note the attacks in the value, also in lists and dicts: these are held, and setters reach them."""
        object.__setattr__(self, name, value)
        held = self.__dict__.get("_attacks")
        if held is None or name == "_attacks":
            return
        for key in [key for key in held if key.startswith(f"{name}.")]:
            del held[key]
        for number, attack in enumerate(_attacks_in(value, set())):
            held[f"{name}.{number}"] = attack
            for key, inner in attack._attacks.items():
                held[f"{name}.{key}"] = inner


def _keep_labels(inputs: Tensor, labels: Tensor) -> Tensor:
    return labels


def _attacks_in(value: Any, seen: set[int]) -> Iterator[Any]:
    """The attacks, ours or torchattacks' own, in a value, in its lists and dicts. seen: ids of values looked at."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from _attacks_in(item, seen)
    elif isinstance(getattr(value, "__dict__", {}).get("_attacks"), dict):  # ours, or torchattacks' own
        yield value
