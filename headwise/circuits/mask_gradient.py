"""Transformer Circuit Faithfulness Metrics are not Robust. Miller, Chughtai and Saunders, 2024. arXiv:2407.08734

The integrated gradient of the authors' library AutoCircuit, which moves the masks of all edges together.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from headwise.graph import CircuitMethod, Graph
from headwise.paths import prepare
from headwise.slopes import attributed, masked
from headwise.task import Batch, metric


@dataclass(frozen=True)
class MaskGradient(CircuitMethod):
    """Attribution of edges, its gradient a mean over masks that patch all edges by the same share.

    With more steps the weights of all edges add up to the difference of the metric.

    Fields:
        steps: points from no edge patched towards all patched at which the gradient is taken, the clean run the first.
        tokens: every column of the embedding is a source of its own.
    """

    steps: int = 4
    metric: str = "logit_diff"
    tokens: bool = False
    prompts: int = 8

    def find(self, model: PreTrainedModel, batch: Batch) -> Graph:
        """Every edge of the model. Raises ValueError without corrupt prompts, or for no steps."""
        parts = prepare(model, batch, metric(self.metric), self.prompts, self.tokens)
        return attributed(self, parts, batch, [masked(part, self.steps) for part in parts])
