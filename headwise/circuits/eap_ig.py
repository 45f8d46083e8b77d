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
class EapIg(CircuitMethod):
    """Attribution of edges, its gradient a mean over prompts between the corrupt and the clean one (EAP-IG, inputs).

    Fields:
        steps: points between the two embeddings at which the gradient is taken, the clean one the last of them.
        tokens: every column of the embedding is a source of its own.
    """

    steps: int = 5
    metric: str = "logit_diff"
    tokens: bool = False
    prompts: int = 8

    def find(self, model: PreTrainedModel, batch: Batch) -> Graph:
        """Every edge of the model. Raises ValueError without corrupt prompts, or for no steps."""
        parts = prepare(model, batch, metric(self.metric), self.prompts, self.tokens)
        return attributed(self, parts, batch, [self._mean(part) for part in parts])

    def _mean(self, part: Paths) -> Tensor:
        first = part.edges.parts[0].number
        return mean_slopes(part, ("embed", 0), part.own.resid[first], part.other.resid[first], self.steps)
