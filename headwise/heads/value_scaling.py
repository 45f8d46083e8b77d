"""Characterizing Mechanisms for Factual Recall in Language Models. Yu et al., 2023. arXiv:2310.15910

Row s058 of the mission. The paper's test of its heads: turn one of them up or down while the model answers.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from headwise.anatomy import anatomy
from headwise.direct import direct_attribution, predicts, toward_answer
from headwise.do import Scale, do
from headwise.method import HeadMethod
from headwise.score import Score
from headwise.site import head
from headwise.task import Batch, answer_logits
from headwise.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ValueScaling(HeadMethod):
    """Change of the rate at which the answer is ranked first when one head's values are multiplied by `alpha`.

    Fields:
        alpha: 0 takes the head away, 3 makes it three times as loud.
        top: only so many heads are tried, those with the largest direct attribution, up or down; others have no value.
    """

    alpha: float = 3.0
    top: int = 12

    row: ClassVar[str] = "s058"
    evidence: ClassVar[str] = "needed"
    needs: ClassVar[str] = "capitals_conflict"

    def score(self, model: "PreTrainedModel", batch: Batch) -> Score:
        """One change of rate per tried head, -1 to 1; NaN for heads that were not tried.

        Raises:
            ValueError: `top` is below 1, or the model predicts no next token.
        """
        if self.top < 1:
            raise ValueError(f"top = {self.top} tries no head; allowed are 1 and more.")
        weights = Weights(model)
        predicts(model, "heads.value_scaling")
        direct = direct_attribution(weights, batch, toward_answer(weights, batch))
        size = {(n, h): abs(float(row)) for n, value in direct.items() for h, row in enumerate(value.mean(0))}
        tried = sorted(size, key=lambda place: -size[place])[: self.top]
        before = _first(model, batch)
        body = anatomy(model)
        values = {n: torch.full((len(batch), body.heads(n)), float("nan")) for n in body.layers}
        for layer, index in tried:
            with do(model, Scale(head(layer, index), self.alpha)):
                values[layer][:, index] = _first(model, batch) - before
        return Score.of_heads(self, model, batch, values, name=f"value_scaling_{f'{self.alpha:g}'.replace('.', '_')}")


def _first(model: "PreTrainedModel", batch: Batch) -> Tensor:
    """[B] 1 where every answer token is ranked first."""
    rows = []
    for part in batch.to(model.device).chunks(16):
        with torch.no_grad():
            rows.append((answer_logits(model, part).argmax(-1) == part.answer).all(-1).float().cpu())
    return torch.cat(rows)
