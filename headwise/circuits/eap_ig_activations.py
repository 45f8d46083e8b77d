"""Have Faith in Faithfulness: Going Beyond Circuit Overlap When Finding Model Mechanisms. Hanna, Pezzelle and Belinkov,
2024. arXiv:2403.17806
"""

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from headwise.graph import CircuitMethod, Graph
from headwise.paths import Paths, prepare
from headwise.slopes import attributed, mean_slopes
from headwise.task import Batch, metric


@dataclass(frozen=True)
class EapIgActivations(CircuitMethod):
    """Attribution of edges, its gradient a mean over values between what the source writes on the two prompts.

    The heads of a layer move together, and so does each MLP; everything before them is as on the clean prompt.

    Fields:
        steps: points between the two values at which the gradient is taken, the clean one the last of them.
        tokens: every column of the embedding is a source of its own.
    """

    steps: int = 5
    metric: str = "logit_diff"
    tokens: bool = False
    prompts: int = 8

    def find(self, model: PreTrainedModel, batch: Batch) -> Graph:
        """Every edge of the model. Raises ValueError without corrupt prompts, or for no steps."""
        parts = prepare(model, batch, metric(self.metric), self.prompts, self.tokens)
        return attributed(self, parts, batch, [self._every_source(part) for part in parts])

    def _every_source(self, part: Paths) -> Tensor:
        first = part.edges.parts[0].number
        result = mean_slopes(part, ("embed", 0), part.own.resid[first], part.other.resid[first], self.steps)
        for one in part.edges.parts:
            n, heads = one.number, part.heads_of(one)
            mine = mean_slopes(part, ("z", n), part.own.z[n], part.other.z[n], self.steps)
            result[:, :, heads.start : heads.stop] = mine[:, :, heads.start : heads.stop]
            if one.mlp is not None:
                at = part.mlp_of(one)
                result[:, :, at] = mean_slopes(part, ("mlp", n), part.own.mlp[n], part.other.mlp[n], self.steps)[
                    :, :, at
                ]
        return result
