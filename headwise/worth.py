"""What a graph is worth: whether it does what the model does, alone, wholly and without waste, and beyond chance.

Faithfulness, completeness and minimality after Wang et al., 2022 (arXiv:2211.00593); the test against random circuits
of equal size after Shi et al., 2024 (arXiv:2410.13032). All are shares of the gap between clean and corrupt prompts.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from headwise.graph import Edge, Graph
from headwise.method import Method
from headwise.paths import Paths, prepare
from headwise.score import provenance
from headwise.task import Batch, metric

# Numbers that the rows of one run may keep, half a gigabyte.
ROOM = 2**27
Circuit = Graph | Sequence[Edge]


def outcomes(parts: list[Paths], circuits: Iterable[Circuit], rows: int = 1) -> np.ndarray:
    """[circuits, B] the metric when every edge outside a circuit is patched; `rows` circuits run side by side."""
    circuits = list(circuits)
    found = [np.zeros((len(circuits), len(part))) for part in parts]
    for part, values in zip(parts, found, strict=True):
        # What every source writes is kept for every row; more rows than fit are no gain.
        size = part.own.end.numel() * len(part.sources)
        rows = max(1, min(rows, ROOM // size))
        for start in range(0, len(circuits), rows):
            group = circuits[start : start + rows]
            values[start : start + rows] = part.run_around(group).cpu().float().numpy()
    return np.concatenate(found, 1)


def gap(parts: list[Paths]) -> tuple[np.ndarray, np.ndarray]:
    """[B] the metric on clean and on corrupt prompts.

    Raises:
        ValueError: the metric is no larger on the clean ones, so there is nothing to explain.
    """
    clean, corrupt = (np.concatenate([value.cpu().float().numpy() for value in side]) for side in _sides(parts))
    if not clean.mean() - corrupt.mean() > 1e-4 * max(1.0, abs(clean.mean())):
        raise ValueError(
            f"The metric is {clean.mean():.3g} on clean prompts and {corrupt.mean():.3g} on corrupt ones: it must be "
            "larger on clean ones, or there is nothing that a circuit could explain."
        )
    return clean, corrupt


def _sides(parts: list[Paths]) -> tuple[list, list]:
    return [part.clean for part in parts], [part.corrupt for part in parts]


def share(values: np.ndarray, clean: np.ndarray, corrupt: np.ndarray) -> np.ndarray:
    """Of metrics [..., B], how much of the gap is left, as means over prompts: 1 as clean, 0 as corrupt."""
    return (values - corrupt).mean(-1) / (clean - corrupt).mean()


@dataclass(frozen=True)
class Worth:
    """What was measured of a graph. All but p-values, `clean` and `corrupt` are shares of the gap.

    Attributes:
        edges, of: edges of the graph, and of the model; nodes: its heads, MLPs and embedding.
        clean, corrupt: the metric of the two runs.
        faithfulness: what the graph does alone; low and high: 95 % bootstrap interval over prompts.
        left: what the model still does when the graph's edges are patched; 0 when the graph is complete.
        incompleteness: mean difference between graph and model, both without the same random half of its nodes.
        losses: what the graph loses with each tried node; idle: share of them that lose less than 1 %.
        nulls: faithfulness of random circuits of equal size, by kind: "paths", random paths from the logits back to the
            tokens; "shuffled", the same graph with the heads of each layer exchanged among each other.
        p: by kind, how often a random circuit is as near to 1 as the graph.
        target: faithfulness that the verdict asks for.
    """

    edges: int
    of: int
    nodes: int
    clean: float
    corrupt: float
    faithfulness: float
    low: float
    high: float
    left: float
    incompleteness: float
    losses: dict[str, float]
    nulls: dict[str, list[float]]
    p: dict[str, float]
    target: float
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def idle(self) -> float:
        """Share of the tried nodes without which the graph loses less than 1 % of the gap."""
        return float(np.mean([loss < 0.01 for loss in self.losses.values()])) if self.losses else float("nan")

    @property
    def reasons(self) -> list[str]:
        """Why the graph does not explain the behaviour; empty when it does."""
        found = []
        if not abs(1 - self.faithfulness) <= 1 - self.target + 1e-9:
            found.append(f"alone it does {self.faithfulness:.0%} of it, where {self.target:.0%} are asked for")
        for kind, what in (("paths", "random paths"), ("shuffled", "other heads of the same layers")):
            if kind in self.p and not self.p[kind] < 0.05:
                found.append(f"{what} do as well (p = {self.p[kind]:.2g})")
        return found

    @property
    def explains(self) -> bool:
        """Faithful enough, and beyond random circuits of equal size of both kinds."""
        return not self.reasons

    def sentence(self) -> str:
        """The verdict in one sentence."""
        size = f"{self.edges} of {self.of} edges ({self.nodes} nodes)"
        if self.explains:
            return f"{size} explain the behaviour: alone they do {self.faithfulness:.0%} of it, beyond random circuits."
        return f"{size} do not explain the behaviour: {'; '.join(self.reasons)}."


@dataclass(frozen=True)
class Appraisal(Method):
    """How the worth of a graph is measured; use other prompts than those it was found on.

    Fields:
        target: faithfulness that the verdict asks for.
        draws: random circuits of each kind; halves: random halves of nodes; nodes: nodes left out one at a time, at
            random, or with `largest` those with the largest edges.
        prompts: prompts in one part; rows: circuits side by side.
    """

    metric: str = "logit_diff"
    target: float = 0.8
    draws: int = 20
    halves: int = 6
    nodes: int = 24
    largest: bool = False
    prompts: int = 8
    rows: int = 1
    seed: int = 0

    def measure(self, model: PreTrainedModel, batch: Batch, graph: Graph) -> Worth:
        """Everything there is to know of a graph on these prompts.

        Raises:
            ValueError: an empty graph, one of another model, or prompts without a gap between clean and corrupt.
        """
        tokens = any(source.startswith("embed@") for source, _ in graph.edges)
        parts = prepare(model, batch, metric(self.metric), self.prompts, tokens)
        return self.of(parts, graph, provenance(self, model, batch))

    def of(self, parts: list[Paths], graph: Graph, about: dict[str, Any] | None = None) -> Worth:
        """As `measure`, on prompts that are prepared already."""
        if not len(graph):
            raise ValueError("A graph without edges has no worth to measure.")
        if 0 < self.draws < 20:
            raise ValueError(f"{self.draws} random circuits cannot show p < 0.05; draw at least 20, or 0 for no test.")
        clean, corrupt = gap(parts)
        draw = random.Random(f"worth {self.seed}")
        nodes = [node for node in graph.nodes if node != "logits"]
        everything = parts[0].all()
        outside = list(set(everything).difference(graph.edges))
        own, rest = outcomes(parts, [graph, outside], self.rows)
        faithfulness, left = (float(share(values, clean, corrupt)) for values in (own, rest))
        low, high = _interval(own, clean, corrupt, self.seed)
        losses = self._losses(parts, graph, nodes, draw, (own, clean, corrupt))
        nulls, p = {}, {}
        for kind, one in (("paths", random_paths), ("shuffled", shuffled)):
            drawn = _others(one, parts[0], graph, draw, self.draws)
            if drawn:
                nulls[kind] = share(outcomes(parts, drawn, self.rows), clean, corrupt).tolist()
                hits = sum(abs(1 - value) <= abs(1 - faithfulness) for value in nulls[kind])
                p[kind] = (1 + hits) / (1 + len(drawn))
        return Worth(
            edges=len(graph),
            of=len(everything),
            nodes=len(nodes),
            clean=float(clean.mean()),
            corrupt=float(corrupt.mean()),
            faithfulness=faithfulness,
            low=low,
            high=high,
            left=left,
            incompleteness=self._incompleteness(parts, graph, everything, nodes, draw, (clean, corrupt)),
            losses=losses,
            nulls=nulls,
            p=p,
            target=self.target,
            about=about or {},
        )

    def _losses(
        self, parts: list[Paths], graph: Graph, nodes: list[str], draw: random.Random, known: tuple
    ) -> dict[str, float]:
        own, clean, corrupt = known
        few = min(self.nodes, len(nodes))
        size: dict[str, float] = {}
        for source, target in graph.edges:
            for node in (source, *graph.nodes_of(target)):
                size[node] = max(size.get(node, 0.0), abs(graph[source, target]))
        chosen = sorted(nodes, key=lambda node: -size.get(node, 0.0))[:few] if self.largest else draw.sample(nodes, few)
        tried = sorted(chosen, key=nodes.index)
        if not tried:
            return {}
        without = outcomes(parts, [_without(graph.edges, {node}, graph) for node in tried], self.rows)
        lost = share(own, clean, corrupt) - share(without, clean, corrupt)
        return dict(zip(tried, lost.tolist(), strict=True))

    def _incompleteness(
        self,
        parts: list[Paths],
        graph: Graph,
        everything: list[Edge],
        nodes: list[str],
        draw: random.Random,
        known: tuple[np.ndarray, np.ndarray],
    ) -> float:
        clean, corrupt = known
        gone = [set(draw.sample(nodes, len(nodes) // 2)) for _ in range(self.halves if len(nodes) > 1 else 0)]
        if not gone:
            return float("nan")
        circuits = [_without(edges, half, graph) for half in gone for edges in (graph.edges, everything)]
        values = share(outcomes(parts, circuits, self.rows), clean, corrupt)
        return float(np.abs(values[::2] - values[1::2]).mean())


def _without(edges: Sequence[Edge], nodes: set[str], graph: Graph) -> list[Edge]:
    """Edges that neither begin nor end in the nodes; a KV head is gone when all heads that read it are."""
    ends: dict[str, bool] = {}
    for _, target in edges:
        if target not in ends:
            ends[target] = nodes.issuperset(graph.nodes_of(target))
    return [(source, target) for source, target in edges if source not in nodes and not ends[target]]


def _interval(own: np.ndarray, clean: np.ndarray, corrupt: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of a ratio of means over prompts."""
    if len(own) < 2:
        return float("nan"), float("nan")
    rows = np.random.default_rng(seed).integers(len(own), size=(1000, len(own)))
    below = (clean - corrupt)[rows].mean(1)
    ratios = (own - corrupt)[rows].mean(1) / np.where(np.abs(below) < 1e-9, np.nan, below)
    return float(np.nanquantile(ratios, 0.025)), float(np.nanquantile(ratios, 0.975))


def _others(make: Callable, paths: Paths, graph: Graph, draw: random.Random, count: int) -> list[list[Edge]]:
    """Random circuits other than the graph itself; none where the graph is the only one of its kind."""
    own, found = set(graph.edges), []
    for _ in range(2 * count + 10 if count else 0):
        one = make(paths, graph, draw)
        if set(one) != own:
            found.append(one)
        if len(found) == count:
            return found
    return []


def random_paths(paths: Paths, graph: Graph, draw: random.Random) -> list[Edge]:
    """As many edges as the graph has, on random paths from the logits back to the tokens."""
    readers: dict[str, list[str]] = {}
    for target in paths.targets:
        for node in graph.nodes_of(target):
            readers.setdefault(node, []).append(target)
    sources = [row.nonzero()[:, 0].tolist() for row in paths.exists]
    at = {target: i for i, target in enumerate(paths.targets)}
    found: dict[Edge, None] = {}
    walks = 0
    while len(found) < len(graph) and walks < len(graph):
        node, walks = "logits", walks + 1
        while node in readers and len(found) < len(graph):
            target = draw.choice(readers[node])
            node = paths.sources[draw.choice(sources[at[target]])]
            found[node, target] = None
    if len(found) < len(graph):
        # Walks would seldom meet the last edges of a graph that is most of the model.
        rest = [edge for edge in paths.all() if edge not in found]
        found |= dict.fromkeys(draw.sample(rest, len(graph) - len(found)))
    return list(found)


def shuffled(paths: Paths, graph: Graph, draw: random.Random) -> list[Edge]:
    """The same graph with the KV heads of each layer, and the query heads of each group, exchanged at random."""
    named: dict[str, str] = {}
    for layer, (heads, kv_heads) in paths.edges.heads.items():
        size, groups = heads // kv_heads, draw.sample(range(kv_heads), kv_heads)
        for old, new in enumerate(groups):
            named |= {f"L{layer}.G{old}.{side}": f"L{layer}.G{new}.{side}" for side in "kv"}
            for i, j in enumerate(draw.sample(range(size), size)):
                before, after = f"L{layer}.H{old * size + i}", f"L{layer}.H{new * size + j}"
                named |= {before: after, f"{before}.q": f"{after}.q"}
    return [(named.get(source, source), named.get(target, target)) for source, target in graph.edges]


def smallest(parts: list[Paths], ranked: Graph, target: float, spare: int = 0) -> tuple[Graph, float]:
    """The smallest circuit, grown along ranked edges, that keeps its share of the behaviour alone.

    Its size is doubled until it does, then bisected. After that, `spare` runs each leave out a part of what is there,
    the edges of smallest weight first and in growing detail; what can be spared stays out.

    Args:
        target: share of the gap; the circuit's is at most as far from 1 as this.

    Returns:
        the circuit without dangling edges, and its faithfulness.

    Raises:
        ValueError: a target outside 0 to 1, or prompts without a gap to explain.
    """
    if not 0 < target < 1:
        raise ValueError(f"A circuit can be asked for a share between 0 and 1 of the behaviour, not {target}.")
    clean, corrupt = gap(parts)

    def tried(graph: Graph) -> tuple[Graph, float]:
        pruned = graph.pruned()
        return pruned, float(share(outcomes(parts, [pruned]), clean, corrupt)[0])

    def enough(value: float) -> bool:
        return abs(1 - value) <= 1 - target

    low, high = 0, 16
    best = tried(ranked.grown(high))
    while not enough(best[1]) and high < len(ranked):
        low, high = high, min(2 * high, len(ranked))
        best = tried(ranked.grown(high))
    while high - low > max(1, low // 20):
        middle = (low + high) // 2
        one = tried(ranked.grown(middle))
        if enough(one[1]):
            high, best = middle, one
        else:
            low = middle
    return _spared(best, tried, enough, spare)


def _spared(
    best: tuple[Graph, float],
    tried: Callable[[Graph], tuple[Graph, float]],
    enough: Callable[[float], bool],
    spare: int,
) -> tuple[Graph, float]:
    size, start = len(best[0]) // 2, 0
    while spare > 0 and size > 0:
        graph = best[0]
        weak = sorted(graph.edges, key=lambda edge: abs(graph[edge]))[start : start + size]
        if not weak:
            size, start = size // 2, 0
            continue
        spare -= 1
        one = tried(graph - graph.only(weak))
        if len(one[0]) and enough(one[1]):
            best = one
        else:
            start += size
    return best
