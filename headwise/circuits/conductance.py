"""How Important Is a Neuron? Dhamdhere, Sundararajan and Yan, 2018. arXiv:1805.12233

Taken over edges. Where attention turns within a small part of the way between two prompts, EAP-IG weighs what a source
changes in all by a slope that holds for that part only; here both are of the same step. Steps are short where the
metric turns, after Non-Uniform Interpolation in Integrated Gradients (Bhat and Raychowdhury, 2023, arXiv:2302.11107).
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from headwise.graph import CircuitMethod, Graph
from headwise.paths import prepare
from headwise.slopes import attributed, followed
from headwise.task import Batch, metric


@dataclass(frozen=True)
class Conductance(CircuitMethod):
    """What each edge passes on, step by step, while the embeddings go from the corrupt prompt to the clean one.

    The weights of the edges across any cut of the model add up to the difference of the metric.

    Fields:
        steps: steps of equal length to begin with; one that changes the metric by more than its share is halved.
        tokens: every column of the embedding is a source of its own.
    """

    steps: int = 5
    metric: str = "logit_diff"
    tokens: bool = False
    prompts: int = 8

    def find(self, model: PreTrainedModel, batch: Batch) -> Graph:
        """Every edge of the model. Raises ValueError without corrupt prompts, or for no steps."""
        parts = prepare(model, batch, metric(self.metric), self.prompts, self.tokens)
        return attributed(self, parts, batch, [followed(part, self.steps) for part in parts])
