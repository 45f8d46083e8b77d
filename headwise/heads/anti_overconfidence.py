"""Interpreting Key Mechanisms of Factual Recall in Transformer-Based Language Models. Lv et al., 2024.
arXiv:2403.19521

Row s092 of the mission.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headwise.direct import direct_attribution, predicts
from headwise.method import HeadMethod
from headwise.score import Score
from headwise.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.task import Batch


@dataclass(frozen=True)
class AntiOverconfidence(HeadMethod):
    """How far a head of the last layers itself lowers the logit of the right answer, against the mean over all tokens.

    Above 0 the head works against the answer. A model without such heads has no value above 0 here.

    Fields:
        last: how many attention layers, from the end, are read.
    """

    last: int = 1

    row: ClassVar[str] = "s092"
    evidence: ClassVar[str] = "read"
    needs: ClassVar[str] = "capitals"

    def score(self, model: "PreTrainedModel", batch: "Batch") -> Score:
        """One number per head of the last layers, in logits. Raises ValueError where no next token is predicted."""
        weights = Weights(model)
        if not 1 <= self.last <= len(weights.layers):
            raise ValueError(
                f"last = {self.last}, but this model has 1 to {len(weights.layers)} attention layers to read."
            )
        predicts(model, "heads.anti_overconfidence")
        readout = weights.readout
        given = direct_attribution(weights, batch, readout[batch.answer.to(readout.device)] - readout.mean(0))
        return Score.of_heads(self, model, batch, {n: -given[n] for n in weights.layers[-self.last :]})
