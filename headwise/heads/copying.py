"""A Mathematical Framework for Transformer Circuits. Elhage et al., 2021. https://transformer-circuits.pub/2021/framework"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from headwise.method import HeadMethod
from headwise.score import Score
from headwise.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.task import Batch


@dataclass(frozen=True)
class Copying(HeadMethod):
    """How positive the eigenvalues of token -> OV -> logits are: sum over sum of sizes, from -1 to 1.

    A head that raises the logit of what it attends to has 1, one that lowers it has -1. All tokens count, none is
    sampled: the matrix over the whole vocabulary has the eigenvalues of a small one.
    """

    evidence: ClassVar[str] = "read"
    needs: ClassVar[str] = ""

    def score(self, model: "PreTrainedModel", batch: "Batch | None" = None) -> Score:
        """One number per head, from weights only. Raises ValueError when the model does not offer them."""
        weights = Weights(model)
        between = weights.readout.T @ weights.tokens
        values = {}
        for layer in weights.layers:
            row = []
            for head in range(weights.heads(layer)):
                eigenvalues = (between @ weights.ov(layer, head)).eigenvalues()
                row.append(eigenvalues.real.sum() / eigenvalues.abs().sum().clamp_min(1e-30))
            values[layer] = torch.stack(row)
        return Score.of_heads(self, model, batch, values)
