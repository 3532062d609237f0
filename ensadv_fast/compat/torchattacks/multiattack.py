"""Several attacks in turn, each on the images that resisted those before."""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .attack import Attack


class MultiAttack(Attack):
    """Attack with each of `attacks` in turn the images that the model still classifies right.

    attacks: ours or torchattacks' own, all of one model. The result holds for each image the example that fooled the
    model, or the image itself.
    """

    def __init__(self, attacks: list[Any], verbose: bool = False) -> None:
        super().__init__("MultiAttack", attacks[0].model)
        self.attacks = attacks
        self.verbose = verbose
        self.supported_mode = ["default"]
        self.check_validity()
        self._accumulate_multi_atk_records = False
        self._multi_atk_records = [0.0]

    def check_validity(self) -> None:
        """Raises ValueError for fewer than two attacks, or attacks of several models."""
        if len(self.attacks) < 2:
            raise ValueError("More than two attacks should be given.")
        if any(attack.model is not self.attacks[0].model for attack in self.attacks):
            raise ValueError("At least one of attacks is referencing a different model.")

    @torch.no_grad()
    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]  # the library's signature
        final = images.detach().clone().to(self.device)
        labels = labels.detach().to(self.device)
        standing = torch.arange(len(final), device=final.device)
        records = [len(final)]
        for attack in self.attacks:
            adv = attack(final[standing], labels[standing])
            right = self.get_logits(adv).argmax(1) == labels[standing]
            final[standing[~right]] = adv[~right]
            standing = standing[right]
            records.append(len(standing))
            if not len(standing):
                break
        if self.verbose:
            print(self._return_sr_record(records))
        if self._accumulate_multi_atk_records:
            for i, count in enumerate(records):
                self._multi_atk_records[i] += count
        return final

    def save(  # type: ignore[override]  # the library's signature
            self, data_loader: DataLoader[Any], save_path: Any = None, verbose: bool = True,
            return_verbose: bool = False, save_predictions: bool = False, save_clean_images: bool = False) -> Any:
        """As ``Attack.save``, but return_verbose gives (robust accuracy, success rates in % after each attack, mean
        L2 norm, seconds of the last batch)."""
        before, self.verbose = self.verbose, False
        self._multi_atk_records = [0.0] * (1 + len(self.attacks))
        self._accumulate_multi_atk_records = True
        try:
            found = super().save(data_loader, save_path, verbose, return_verbose, save_predictions, save_clean_images)
            rates = self._covert_to_success_rates(self._multi_atk_records) if verbose or return_verbose else None
        finally:
            self._multi_atk_records = [0.0]
            self._accumulate_multi_atk_records = False
            self.verbose = before
        return (found[0], rates, *found[1:]) if return_verbose else None

    @staticmethod
    def _covert_to_success_rates(records: Sequence[float]) -> list[float]:
        return [(1 - left / records[0]) * 100 for left in records[1:]]

    def _return_sr_record(self, records: Sequence[float]) -> str:
        rates = " | ".join(f"{rate:2.2f} %" for rate in self._covert_to_success_rates(records))
        return f"Attack success rate: {rates}"

    def _save_print(  # type: ignore[override]  # static in the base, as in the library
            self, progress: float, rob_acc: float, l2: float, elapsed_time: float, end: str) -> None:
        print(f"- Save progress: {progress:2.2f} % / Robust accuracy: {rob_acc:2.2f} % / "
              f"{self._return_sr_record(self._multi_atk_records)} / L2: {l2:1.5f} ({elapsed_time:2.3f} it/s) \t",
              end=end)
