"""Characterizing Mechanisms for Factual Recall in Language Models. Yu et al., 2023. arXiv:2310.15910

Row s058 of the mission.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headwise.direct import direct_attribution, predicts, toward_answer
from headwise.method import HeadMethod
from headwise.score import Score
from headwise.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.task import Batch


@dataclass(frozen=True)
class MemoryOrContext(HeadMethod):
    """What a head adds to the logit of the answer given in the prompt, minus what it adds to the memorised one.

    In-context heads are above 0, memory heads below. It is the head's own direct contribution, in logits.
    """

    row: ClassVar[str] = "s058"
    evidence: ClassVar[str] = "read"
    needs: ClassVar[str] = "capitals_conflict"

    def score(self, model: "PreTrainedModel", batch: "Batch") -> Score:
        """One number per head. Raises ValueError without a memorised answer (foil), or for a model without logits."""
        weights = Weights(model)
        predicts(model, "heads.memory_or_context")
        if batch.foil is None:
            raise ValueError(f"{batch.about.get('task', 'This task')} has no foil to stand for the memorised answer.")
        return Score.of_heads(self, model, batch, direct_attribution(weights, batch, toward_answer(weights, batch)))
