"""Localizing Model Behavior with Path Patching. Goldowsky-Dill, MacLeod, Sato and Arora, 2023. arXiv:2304.05969

After Interpretability in the Wild (Wang et al., 2022, arXiv:2211.00593). Every place that writes is a node of its own,
MLPs too, so the path is one edge: what the source writes on the corrupt prompt enters the target, and all that follows
is computed again.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headwise.graph import CircuitMethod, Graph
from headwise.paths import prepare
from headwise.progress import hidden
from headwise.task import Batch, metric


@dataclass(frozen=True)
class PathPatching(CircuitMethod):
    """What the metric loses when one edge brings what its source writes on the corrupt prompt: exact, one run an edge.

    Fields:
        senders: only edges from these sources, such as "embed", "L5.H1" or "L5.mlp"; all by default.
        receivers: only edges into these targets, such as "L5.H1.q", "L5.G0.k", "L5.mlp" or "logits"; all by default.
        tokens: every column of the embedding is a source of its own.
        prompts: prompts in one part; rows: edges patched side by side.
    """

    senders: tuple[str, ...] = ()
    receivers: tuple[str, ...] = ()
    metric: str = "logit_diff"
    tokens: bool = False
    prompts: int = 8
    rows: int = 8

    evidence: ClassVar[str] = "needed"

    def find(self, model: PreTrainedModel, batch: Batch) -> Graph:
        """The edges with their exact worth. Raises ValueError for a place that the model does not have."""
        parts = prepare(model, batch, metric(self.metric), self.prompts, self.tokens)
        edges = parts[0].all(self.senders, self.receivers)
        values = []
        bar = tqdm(total=len(edges) * len(parts), desc="paths", disable=hidden(), leave=False)
        with bar:
            for part in parts:
                changed = part.single(edges, self.rows, bar.update)
                values.append(part.clean.cpu().float() - changed)
        return Graph.of_edges(self, model, batch, parts[0].edges.heads, edges, torch.cat(values, 1).numpy())
