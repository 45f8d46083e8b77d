"""Attribution Patching Outperforms Automated Circuit Discovery. Syed, Rager and Conmy, 2023. arXiv:2310.10348"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from headwise.graph import CircuitMethod, Graph
from headwise.paths import prepare
from headwise.slopes import attributed, slopes
from headwise.task import Batch, metric


@dataclass(frozen=True)
class Eap(CircuitMethod):
    """First-order estimate of path patching for all edges at once: the gradient at the clean prompt times the change.

    Fields:
        tokens: every column of the embedding is a source of its own.
    """

    metric: str = "logit_diff"
    tokens: bool = False
    prompts: int = 8

    def find(self, model: PreTrainedModel, batch: Batch) -> Graph:
        """Every edge of the model. Raises ValueError without corrupt prompts."""
        parts = prepare(model, batch, metric(self.metric), self.prompts, self.tokens)
        return attributed(self, parts, batch, [slopes(part) for part in parts])
