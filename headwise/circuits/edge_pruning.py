"""Have Faith in Faithfulness: Going Beyond Circuit Overlap When Finding Model Mechanisms. Hanna, Pezzelle and Belinkov,
2024. arXiv:2403.17806

How the paper makes a circuit of ranked edges, with the size found by bisection, and what the rest can spare taken away.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from transformers import PreTrainedModel

from headwise.graph import CircuitMethod, Graph
from headwise.method import load
from headwise.paths import prepare
from headwise.task import Batch, metric
from headwise.worth import smallest


@dataclass(frozen=True)
class EdgePruning(CircuitMethod):
    """A small circuit that does a given share of the behaviour alone: ranked edges, as few as will do.

    Fields:
        rank: the method of this room that ranks the edges.
        target: share of the gap between clean and corrupt prompts that the circuit must keep.
        spare: runs spent on leaving out edges of the circuit in growing detail, smallest weights first.
    """

    rank: str = "circuits.eap_ig"
    target: float = 0.85
    spare: int = 16
    metric: str = "logit_diff"
    tokens: bool = False
    prompts: int = 8

    evidence: ClassVar[str] = "enough"

    def find(self, model: PreTrainedModel, batch: Batch) -> Graph:
        """The circuit; `about["reached"]` has its faithfulness on these prompts.

        Raises:
            ValueError: no method of this room, a target outside 0 to 1, or prompts without a gap to explain.
        """
        method = load(self.rank)
        if not issubclass(method, CircuitMethod) or issubclass(method, EdgePruning):
            raise ValueError(f"{self.rank} does not rank edges; circuits.eap_ig and circuits.path_patching do.")
        ranked = method(metric=self.metric, tokens=self.tokens, prompts=self.prompts).find(model, batch)
        parts = prepare(model, batch, metric(self.metric), self.prompts, self.tokens)
        graph, reached = smallest(parts, ranked, self.target, self.spare)
        about = {**ranked.about, "method": self.identity(), "reached": reached, "ranked": len(ranked)}
        return replace(graph, name="edge_pruning", evidence=self.evidence, about=about)
