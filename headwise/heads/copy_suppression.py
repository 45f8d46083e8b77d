"""Copy Suppression: Comprehensively Understanding an Attention Head. McDougall et al., 2023. arXiv:2310.04625"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from headwise.method import HeadMethod
from headwise.score import Score
from headwise.weights import Weights, effective_embedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.task import Batch


@dataclass(frozen=True)
class CopySuppression(HeadMethod):
    """Share of tokens whose own logit is among the most lowered ones when the head attends to them.

    Tokens are drawn at random with `seed`; the lowest `share` of them counts as most lowered, so chance is `share`.
    Tokens enter as embedding plus first MLP.
    """

    tokens: int = 512
    share: float = 0.02
    seed: int = 0

    evidence: ClassVar[str] = "read"
    needs: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.tokens < 2:
            raise ValueError(
                f"The share {self.share} of {self.tokens} tokens cannot be taken: above 0, below 1, of 2 or more."
            )

    @torch.no_grad()
    def score(self, model: "PreTrainedModel", batch: "Batch | None" = None) -> Score:
        """One share per head, from weights only. Raises ValueError when the model does not offer them."""
        weights = Weights(model)
        readout = weights.readout
        drawn = torch.randperm(len(readout), generator=torch.Generator().manual_seed(self.seed))[: self.tokens]
        embedded = effective_embedding(weights, drawn)
        readout = readout[drawn.to(readout.device)]
        readout = readout - readout.mean(0)
        lowest = max(1, round(self.share * len(drawn)))
        values = {}
        for layer in weights.layers:
            seen = weights.into_layer(layer, embedded)
            row = []
            for head in range(weights.heads(layer)):
                ov = weights.ov(layer, head)
                logits = (seen @ ov.A) @ (ov.B @ readout.T)
                rank = (logits < logits.diagonal()[:, None]).sum(-1)
                row.append(((rank < lowest) & (logits.diagonal() < 0)).float().mean())
            values[layer] = torch.stack(row)
        return Score.of_heads(self, model, batch, values)
