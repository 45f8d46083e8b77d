"""How Does Attention Work in Vision Transformers? A Visual Analytics Attempt. Li et al., 2023. arXiv:2303.13731

Row s112 of the mission.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headwise.method import HeadMethod
from headwise.scan import effects
from headwise.score import Score
from headwise.task import logprob

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.task import Batch


@dataclass(frozen=True)
class ImportanceLoss(HeadMethod):
    """How much the loss on the right label rises, in nats, when a head is pruned."""

    row: ClassVar[str] = "s112"
    evidence: ClassVar[str] = "needed"
    needs: ClassVar[str] = "digits_images"

    def score(self, model: "PreTrainedModel", batch: "Batch") -> Score:
        """One number per head: exact, one head set to zero at a time."""
        found = effects(model, batch, how="zero", metric=logprob, prompts=64, label="importance by loss")
        return Score.of_units(self, model, batch, {unit: found.of(unit) for unit in found.changed})
