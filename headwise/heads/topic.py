"""Interpreting Key Mechanisms of Factual Recall in Transformer-Based Language Models. Lv et al., 2024.
arXiv:2403.19521

Row s092 of the mission.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from headwise.direct import direct_attribution, predicts, toward_answer
from headwise.method import HeadMethod
from headwise.score import Score
from headwise.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.task import Batch


@dataclass(frozen=True)
class Topic(HeadMethod):
    """What a head adds to the answer's logit with what it fetched from the topic's own tokens.

    It is the head's attention to the topic times what the values there say about the answer, summed: a head that does
    not look at the topic has 0, and so has one that looks but brings nothing.

    Fields:
        span: the name of the topic's columns in the batch.
    """

    span: str = "country"

    row: ClassVar[str] = "s092"
    evidence: ClassVar[str] = "read"
    needs: ClassVar[str] = "capitals"

    def score(self, model: "PreTrainedModel", batch: "Batch") -> Score:
        """One number per head, in logits of the answer minus the foil.

        Raises:
            ValueError: the batch has no such span, or the model predicts no next token.
        """
        if self.span not in batch.spans:
            have = ", ".join(batch.spans) or "none"
            raise ValueError(f"{batch.about.get('task', 'This batch')} has no span {self.span!r}; it has {have}.")
        weights = Weights(model)
        predicts(model, "heads.topic")
        column = torch.arange(batch.ids.shape[1])
        start, stop = batch.spans[self.span].T[..., None]
        topic = (column >= start) & (column < stop)
        return Score.of_heads(
            self, model, batch, direct_attribution(weights, batch, toward_answer(weights, batch), topic)
        )
