"""Mechanistic Interpretation through Contextual Decomposition in Transformers. Hsu et al., 2024. arXiv:2407.00886

As in the paper, one pass a node tells what it is worth, and only those that are worth something are looked into. The
paper measures a pair of nodes along all paths between them; here an edge is what one node reads straight from another,
so that a graph can be tested by patching all else.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headwise.decompose import Decomposition
from headwise.edges import Part
from headwise.graph import CircuitMethod, Edge, Graph
from headwise.paths import SIDES, prepare
from headwise.progress import hidden
from headwise.task import Batch, metric


@dataclass(frozen=True)
class CDT(CircuitMethod):
    """What the metric loses of a node's contribution with the part that one edge brings, by contextual decomposition.

    An edge into a node weighs what the node is worth, column by column, times the share of the node's change that the
    edge makes alone; an edge into the logits is exact but for the norm. `about["relevance"]` has every node's worth.

    Fields:
        nodes: how many nodes, those worth most, are looked into; the edges into all others are left out.
        held: attention patterns stay those of the clean prompt, as in the paper. Then no edge into a query or a key
            weighs anything; by default the relevant part of a pattern is what it loses, too.
        tokens: every column of the embedding is a source of its own.
        prompts: prompts in one part; rows: sources side by side.
    """

    nodes: int = 24
    held: bool = False
    metric: str = "logit_diff"
    tokens: bool = False
    prompts: int = 8
    rows: int = 8

    row: ClassVar[str] = "s100"

    def find(self, model: PreTrainedModel, batch: Batch) -> Graph:
        """The edges into the logits and into the nodes worth most. Raises ValueError without corrupt prompts."""
        if self.nodes < 1:
            raise ValueError(f"nodes = {self.nodes} looks into no node; allowed are 1 and more.")
        parts = prepare(model, batch, metric(self.metric), self.prompts, self.tokens)
        found = [Decomposition(part, self.held) for part in parts]
        sources = parts[0].sources
        bar = tqdm(total=len(sources) * len(parts), desc="decomposition", disable=hidden(), leave=False)
        with bar:
            whole = [(name, None) for name in sources]
            worth = [one.lost(whole, self.rows, bar.update) for one in found]
        relevance = dict(zip(sources, torch.cat(worth, 1).mean(1).tolist(), strict=True))
        inner = [name for name in sources if not name.startswith("embed") and abs(relevance[name]) > 0]
        chosen = sorted(inner, key=lambda name: -abs(relevance[name]))[: self.nodes]
        values = [
            self._weights(one, {name: mine[sources.index(name)] for name in chosen})
            for one, mine in zip(found, worth, strict=True)
        ]
        edges = list(values[0])
        rows = torch.stack([torch.cat([part[edge] for part in values]) for edge in edges])
        graph = Graph.of_edges(self, model, batch, parts[0].edges.heads, edges, rows.numpy())
        return replace(graph, about=graph.about | {"relevance": relevance})

    def _weights(self, one: Decomposition, chosen: dict[str, Tensor]) -> dict[Edge, Tensor]:
        """[B] by edge, from what the chosen nodes are worth, [B] each."""
        paths = one.paths
        straight = one.lost_at_the_end([(name, None) for name in paths.sources])
        found = {(name, "logits"): value for name, value in zip(paths.sources, straight, strict=True)}
        for part in paths.edges.parts:
            heads = [i for i in range(len(part.heads)) if f"L{part.number}.H{i}" in chosen]
            if heads:
                names = [f"L{part.number}.H{i}" for i in heads]
                worth = torch.stack([self._columns(one, name, chosen[name]) for name in names], -1)
                for side in ("v",) if self.held else SIDES:
                    self._into_heads(one, part, side, heads, worth, found)
            mlp = f"L{part.number}.mlp"
            if mlp in chosen:
                (target,) = part.readers["mlp"]
                names = self._below(one, target)
                share = one.shares(part, "mlp", names, self.rows)
                worth = self._columns(one, mlp, chosen[mlp])
                for name, value in zip(names, (share * worth).sum(-1), strict=True):
                    found[name, paths.targets[target]] = value
        return found

    def _below(self, one: Decomposition, target: int) -> list[str]:
        return [one.paths.sources[u] for u in one.paths.exists[target].nonzero()[:, 0].tolist()]

    def _columns(self, one: Decomposition, name: str, whole: Tensor) -> Tensor:
        """[B, T] what the node is worth, [B], divided among its columns.

        A column counts as the mean of what is lost without it and what it does alone: of several that do the same, each
        could be spared. The columns of a node that come to nothing in sum count by the size of its change there.
        """
        size = one.change((name, None)).square().sum(-1).cpu()
        columns = (size.amax(0) > 1e-12 * size.max()).nonzero()[:, 0].tolist()
        if not columns:
            return torch.zeros_like(size)
        without = one.lost([(name, (t,)) for t in columns], self.rows)
        others = [(name, tuple(t for t in columns if t != column)) for column in columns]
        alone = whole - one.lost(others, self.rows) if len(columns) > 1 else without
        found = torch.zeros_like(size)
        found[:, columns] = (without + alone).T / 2
        total = found.sum(1)
        by_size = size / size.sum(1).clamp_min(1e-30)[:, None]
        counted = total * whole > 0.1 * whole.square()
        share = torch.where(counted[:, None], found / torch.where(counted, total, 1.0)[:, None], by_size)
        return share * whole[:, None]

    def _into_heads(
        self, one: Decomposition, part: Part, side: str, heads: list[int], worth: Tensor, found: dict[Edge, Tensor]
    ) -> None:
        """Edges into one side of a block's chosen heads; of a KV head, the sum over those that read it."""
        paths, readers = one.paths, part.readers[side]
        names = self._below(one, readers.start)
        share = one.shares(part, side, names, self.rows)[..., heads]
        values = (share * worth).sum(2)
        group = len(part.heads) // len(readers)
        for j, head in enumerate(heads):
            target = paths.targets[readers.start + (head // group)]
            for name, value in zip(names, values[..., j], strict=True):
                found[name, target] = found[name, target] + value if (name, target) in found else value
