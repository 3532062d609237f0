"""Adversarial images to files and back."""
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class Saving:
    """What attacks do with whole loaders. Files are in torchattacks' own form: it reads ours, and we read its."""

    if TYPE_CHECKING:  # members of the attack, which is a subclass
        device: torch.device | str | None
        normalization_used: dict[str, Tensor] | None

        def __call__(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor: ...

        def get_output_with_eval_nograd(self, inputs: Tensor) -> Tensor: ...

        def inverse_normalize(self, inputs: Tensor) -> Tensor: ...

    def save(self, data_loader: DataLoader[Any], save_path: Any = None, verbose: bool = True,
             return_verbose: bool = False, save_predictions: bool = False, save_clean_inputs: bool = False,
             save_type: str = "float") -> Any:
        """Attack every batch of the loader. Write the images [N, C, H, W] in [0, 1], labels [N] and what else is asked
        for to `save_path`, where it is given.

        save_type: "float", or "int": uint8, rounded. verbose prints, and return_verbose returns, the robust accuracy in
        %, the mean L2 norm of the perturbations that fooled the model (of what the attack takes and returns), and the
        seconds of the last batch. The file is written anew whenever the number of batches reaches a power of two,
        and at the end.
        """
        kept: dict[str, list[Tensor]] = {}
        tally, batches, is_watched = _Tally(), len(data_loader), verbose or return_verbose
        rates: tuple[float, float, float] | None = None
        for step, (inputs, labels) in enumerate(data_loader, 1):
            start = time.time()
            adv_inputs = self(inputs, labels)
            predicted = None
            if is_watched or (save_path is not None and save_predictions):
                predicted = self.get_output_with_eval_nograd(adv_inputs).argmax(1)
            if is_watched and predicted is not None:
                delta = adv_inputs - inputs.to(self.device)
                rates = *tally.add(predicted == labels.to(self.device), delta), time.time() - start
                if verbose:
                    self._save_print(100 * step / batches, *rates, end="\r")
            if save_path is not None:
                asked = {"adv_inputs": adv_inputs, "labels": labels, "preds": predicted if save_predictions else None,
                         "clean_inputs": inputs if save_clean_inputs else None}
                for name, value in asked.items():
                    if value is not None:
                        kept.setdefault(name, []).append(self._convert_for_file(name, value.detach().cpu(), save_type))
                if step == batches or not step & (step - 1):
                    torch.save({**{k: torch.cat(v) for k, v in kept.items()}, "save_type": save_type}, save_path)
        if verbose and rates is not None:  # the last line stays
            self._save_print(100.0, *rates, end="\n")
        return rates if return_verbose else None

    def _convert_for_file(self, name: str, value: Tensor, save_type: str) -> Tensor:
        """Images without their normalisation, in the dtype of the file; other values as they are."""
        if not name.endswith("inputs"):
            return value
        value = value if self.normalization_used is None else self.inverse_normalize(value)
        return self.to_type(value, "int") if save_type == "int" else value

    @staticmethod
    def to_type(inputs: Tensor, type: str) -> Tensor:
        """"int": floats in [0, 1] as uint8, the nearest level; "float": uint8 as float32. Others stay as they are."""
        if type not in ("int", "float"):
            raise ValueError(f"{type} is not a valid type. [Options: float, int]")
        if type == "int" and inputs.is_floating_point():
            return (inputs * 255).round().clamp(0, 255).to(torch.uint8)
        if type == "float" and inputs.dtype == torch.uint8:
            return inputs.float() / 255
        return inputs

    @staticmethod
    def _save_print(progress: float, rob_acc: float, l2: float, elapsed_time: float, end: str) -> None:
        print(f"- Save progress: {progress:2.2f} % / Robust accuracy: {rob_acc:2.2f} % / L2: {l2:1.5f} "
              f"({elapsed_time:2.3f} it/s) \t", end=end)

    @staticmethod
    def load(load_path: Any, batch_size: int = 128, shuffle: bool = False,
             normalize: dict[str, Sequence[float]] | None = None, load_predictions: bool = False,
             load_clean_inputs: bool = False) -> DataLoader[Any]:
        """A loader of (images, labels[, predictions][, clean images]) from a saved file. Images are float32 in [0, 1],
        or normalised by ``{"mean": [...], "std": [...]}``."""
        saved = torch.load(load_path)
        names = ["adv_inputs", "labels"] + ["preds"] * load_predictions + ["clean_inputs"] * load_clean_inputs
        for name in {"adv_inputs", "clean_inputs"}.intersection(names):
            images = saved[name].float() / 255 if saved["save_type"] == "int" else saved[name]
            if normalize is not None:
                mean, std = (torch.tensor(normalize[k]).reshape(1, -1, 1, 1) for k in ("mean", "std"))
                images = (images - mean) / std
            saved[name] = images
        loader = DataLoader(TensorDataset(*(saved[name] for name in names)), batch_size=batch_size, shuffle=shuffle)
        print(f"Data is loaded in the following order: [{', '.join(names)}]")
        return loader


class _Tally:
    """The robust accuracy and the mean perturbation over the batches so far."""

    def __init__(self) -> None:
        self.correct = self.total = 0
        self.distances: list[Tensor] = []

    def add(self, is_right: Tensor, delta: Tensor) -> tuple[float, float]:
        """Take in a batch: which images are still classified right (bool [N]), and their perturbations [N, ...].

        Returns the robust accuracy in % and the mean L2 norm of the perturbations that fooled the model.
        """
        self.total += len(is_right)
        self.correct += int(is_right.sum())
        self.distances.append(torch.linalg.vector_norm(delta.flatten(1)[~is_right], dim=1))
        return 100 * self.correct / self.total, torch.cat(self.distances).mean().item()
