"""A Mathematical Framework for Transformer Circuits. Elhage et al., 2021. https://transformer-circuits.pub/2021/framework"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from headwise.method import HeadMethod
from headwise.score import Score
from headwise.weights import Weights, strongest_composition

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.task import Batch


@dataclass(frozen=True)
class QComposition(HeadMethod):
    """How much of a head's queries is made from what one earlier head wrote: the largest composition, above chance."""

    evidence: ClassVar[str] = "read"
    needs: ClassVar[str] = ""

    @torch.no_grad()
    def score(self, model: "PreTrainedModel", batch: "Batch | None" = None) -> Score:
        """One number per head behind the first attention layer, from weights only; NaN in the first layer.

        Raises:
            ValueError: the model does not offer its weights.
        """
        return Score.of_heads(self, model, batch, strongest_composition(Weights(model), "q"))
