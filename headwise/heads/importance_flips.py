"""How Does Attention Work in Vision Transformers? A Visual Analytics Attempt. Li et al., 2023. arXiv:2303.13731

Row s112 of the mission.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from headwise.method import HeadMethod
from headwise.scan import effects
from headwise.score import Score
from headwise.task import answer_logits, correct

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.task import Batch


@dataclass(frozen=True)
class ImportanceFlips(HeadMethod):
    """Share of inputs whose predicted label changes when a head is pruned."""

    row: ClassVar[str] = "s112"
    evidence: ClassVar[str] = "needed"
    needs: ClassVar[str] = "digits_images"

    def score(self, model: "PreTrainedModel", batch: "Batch") -> Score:
        """One share per head, 0 to 1: exact, one head set to zero at a time."""
        said = []
        for part in batch.to(model.device).chunks(64):
            with torch.no_grad():
                said.append(answer_logits(model, part).argmax(-1).cpu())
        # Measured against what the model itself says, right or wrong.
        own = replace(batch, answer=torch.cat(said), foil=None)
        found = effects(model, own, how="zero", metric=correct, prompts=64, label="importance by flips")
        return Score.of_units(self, model, batch, {unit: found.of(unit) for unit in found.changed})
