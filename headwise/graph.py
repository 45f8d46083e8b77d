"""Graph: places of a model and weighted edges between them, from the tokens through heads and MLPs to the logits.

An edge says that one place reads what another wrote. Places that write are "embed" (what enters the first block, or
"embed@3", its column 3), heads ("L5.H1") and MLPs ("L5.mlp"). Places that read are the inputs of a head, each apart
("L5.H1.q", "L5.G0.k", "L5.G0.v"; keys and values belong to a KV head, which all query heads of its group read), of an
MLP ("L5.mlp"), and "logits".
"""

import dataclasses
import heapq
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import polars as pl

from headwise.mask import Mask
from headwise.method import Method
from headwise.score import EVIDENCE, provenance
from headwise.writing import write_aside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.task import Batch

COLUMNS = {"source": pl.String, "target": pl.String, "weight": pl.Float64, "error": pl.Float64, "n": pl.Int64}
Edge = tuple[str, str]
_SOURCE = re.compile(r"^(?:embed(?:@\d+)?|L(?P<layer>\d+)\.(?:H\d+|(?P<mlp>mlp)))$")
_TARGET = re.compile(r"^(?:logits|L(?P<layer>\d+)\.(?:H\d+\.q|G\d+\.[kv]|(?P<mlp>mlp)))$")


@lru_cache(maxsize=65536)
def written_at(source: str) -> int:
    """When a place has written, as a number that grows along the model: -1 embed, 2L heads of layer L, 2L + 1 its MLP.

    Raises:
        ValueError: no such place writes.
    """
    match = _SOURCE.match(source)
    if match is None:
        raise ValueError(f"{source!r} writes to no edge. Write embed, embed@3, L5.H1 or L5.mlp.")
    return -1 if match["layer"] is None else 2 * int(match["layer"]) + (match["mlp"] is not None)


@lru_cache(maxsize=65536)
def read_at(target: str) -> int:
    """When a place reads: it can read what was written at a smaller number.

    Raises:
        ValueError: no such place reads.
    """
    match = _TARGET.match(target)
    if match is None:
        raise ValueError(f"{target!r} reads no edge. Write L5.H1.q, L5.G0.k, L5.G0.v, L5.mlp or logits.")
    return 2**31 if match["layer"] is None else 2 * int(match["layer"]) + (match["mlp"] is not None)


@dataclass(frozen=True)
class Graph:
    """A table with one row an edge.

    Attributes:
        name: what the weights are called, e.g. "path_patching".
        table: columns source, target, weight (what the metric loses without the edge), error (standard error over
            prompts, NaN for one prompt), n (prompts).
        heads: by layer, the number of query heads and of KV heads.
        evidence: the rung of the ladder on which the weights stand.
        about: provenance: method and fields, task, model, weight fingerprint, versions.

    Raises:
        ValueError: an edge that no model can have, an edge that stands twice, or another table.
    """

    name: str
    table: pl.DataFrame
    heads: Mapping[int, tuple[int, int]]
    evidence: str = "seen"
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.evidence not in EVIDENCE:
            raise ValueError(f"{self.evidence!r} is not a rung of evidence: {', '.join(EVIDENCE)}.")
        if list(self.table.columns) != list(COLUMNS):
            raise ValueError(
                f"A graph has the columns {', '.join(COLUMNS)}; this one has {', '.join(self.table.columns)}."
            )
        for source, target in self.edges:
            if written_at(source) >= read_at(target):
                raise ValueError(f"{target} cannot read {source}, which writes later.")
            if target != "logits":
                self.nodes_of(target)
        if len(self._weights) < len(self.table):
            raise ValueError(f"Of {len(self.table)} edges some stand twice; only {len(self._weights)} are different.")

    @classmethod
    def of_edges(
        cls,
        method: Method,
        model: "PreTrainedModel",
        batch: "Batch | None",
        heads: Mapping[int, tuple[int, int]],
        edges: list[Edge],
        values: np.ndarray,
        evidence: str = "",
        name: str = "",
    ) -> "Graph":
        """Make a graph from values by edge and prompt, [edges, B]."""
        rows = np.asarray(values, dtype=np.float64).reshape(len(edges), -1)
        n = rows.shape[1]
        error = rows.std(1, ddof=1) / n**0.5 if n > 1 else np.full(len(edges), np.nan)
        table = pl.DataFrame(
            {
                "source": [s for s, _ in edges],
                "target": [t for _, t in edges],
                "weight": rows.mean(1),
                "error": error,
                "n": [n] * len(edges),
            },
            schema=COLUMNS,
        )
        return cls(
            name=name or method.identity()["name"].split(".")[-1],
            table=table,
            heads=dict(heads),
            evidence=evidence or getattr(method, "evidence", "seen"),
            about=provenance(method, model, batch),
        )

    @cached_property
    def edges(self) -> list[Edge]:
        """Source and target of every edge, in the order of the table."""
        return list(zip(self.table["source"].to_list(), self.table["target"].to_list(), strict=True))

    @cached_property
    def _weights(self) -> dict[Edge, float]:
        return dict(zip(self.edges, self.table["weight"].to_list(), strict=True))

    def __len__(self) -> int:
        return len(self.table)

    def __contains__(self, edge: object) -> bool:
        return edge in self._weights

    def __getitem__(self, edge: Edge) -> float:
        if edge not in self._weights:
            raise ValueError(f"This graph has no edge from {edge[0]} to {edge[1]}; it has {len(self)} others.")
        return self._weights[edge]

    def nodes_of(self, target: str) -> list[str]:
        """The nodes that an input belongs to: one head, an MLP, the logits, or all heads that read a KV head.

        Raises:
            ValueError: this model has no such head.
        """
        if not target.endswith((".k", ".v", ".q")):
            return [target]
        layer, unit, _ = target.split(".")
        number, index = int(layer[1:]), int(unit[1:])
        heads, kv_heads = self.heads.get(number, (0, 0))
        if index >= (heads if unit[0] == "H" else kv_heads):
            raise ValueError(f"{target}: layer {number} has {heads} heads and {kv_heads} KV heads here.")
        if unit[0] == "H":
            return [f"{layer}.{unit}"]
        share = heads // kv_heads
        return [f"{layer}.H{i}" for i in range(index * share, (index + 1) * share)]

    @property
    def nodes(self) -> list[str]:
        """Every place at which an edge begins, and "logits" where one ends there, in the order of the model."""
        ends = {"logits"} if any(target == "logits" for _, target in self.edges) else set()
        return [*sorted({source for source, _ in self.edges}, key=_order), *ends]

    def only(self, keep: Callable[[Edge], bool] | Iterable[Edge]) -> "Graph":
        """The edges that satisfy a condition, or that stand in a collection."""
        chosen = keep if callable(keep) else set(keep).__contains__
        return self._taken([chosen(edge) for edge in self.edges])

    def _taken(self, rows: "list[bool] | pl.Series") -> "Graph":
        # Every row of a valid table is valid, so nothing needs to be looked at again.
        return _unchecked(self, self.table.filter(pl.Series(rows, dtype=pl.Boolean)))

    def top(self, n: int) -> "Graph":
        """The n edges with the largest weights, whatever their sign; edges without a weight never appear."""
        size = self.table["weight"].abs().fill_nan(None)
        order = size.arg_sort(descending=True, nulls_last=True)[: min(max(n, 0), len(size) - size.null_count())]
        return _unchecked(self, self.table[np.sort(order.to_numpy()).tolist()])

    def above(self, threshold: float) -> "Graph":
        """The edges whose weight is at least this large, whatever its sign."""
        return self._taken(self.table["weight"].abs().fill_nan(-1.0) >= threshold)

    def grown(self, n: int) -> "Graph":
        """Up to n edges, grown backwards from the logits: always the largest edge into what is already there.

        That is how Hanna et al. (2024) build a circuit: every edge in it leads on to the logits.
        """
        into: dict[str, list[tuple[float, Edge]]] = defaultdict(list)
        for edge, weight in self._weights.items():
            if weight == weight:
                for node in self.nodes_of(edge[1]):
                    into[node].append((-abs(weight), edge))
        heap, reached, kept = list(into["logits"]), {"logits"}, set()
        heapq.heapify(heap)
        while heap and len(kept) < n:
            _, edge = heapq.heappop(heap)
            kept.add(edge)
            if edge[0] not in reached:
                reached.add(edge[0])
                for entry in into[edge[0]]:
                    # An edge into a KV head is offered by every head of its group.
                    if entry[1] not in kept:
                        heapq.heappush(heap, entry)
        return self.only(kept)

    def pruned(self) -> "Graph":
        """Without dangling edges: each edge left lies on a path from the tokens to the logits.

        A run in which all other edges are patched gives the same with and without the edges that this removes.
        """
        fed, live = {s for s, _ in self.edges if written_at(s) == -1}, set()
        for source, target in sorted(self.edges, key=lambda edge: (written_at(edge[0]), read_at(edge[1]))):
            if source in fed:
                live.add((source, target))
                fed.update(self.nodes_of(target))
        useful, kept = {"logits"}, set()
        for source, target in sorted(live, key=lambda edge: read_at(edge[1]), reverse=True):
            if useful.intersection(self.nodes_of(target)):
                kept.add((source, target))
                useful.add(source)
        return self.only(kept)

    def __and__(self, other: "Graph") -> "Graph":
        """Edges of both, with the weights of this one."""
        return self.only(other._weights)

    def __sub__(self, other: "Graph") -> "Graph":
        """Edges of this one only."""
        return self.only(lambda edge: edge not in other)

    def __or__(self, other: "Graph") -> "Graph":
        """Edges of either; where both have one, with the weight of this one."""
        more = (other - self).table
        return replace(self, table=pl.concat([self.table, more]), heads={**other.heads, **self.heads})

    def overlap(self, other: "Graph") -> dict[str, float]:
        """How alike two graphs are.

        Returns:
            "edges" and "nodes": those in common as a share of those in either (1 where both are empty); "of_this":
            the share of this one's edges that the other has, NaN where this one has none.
        """
        mine, yours = set(self.edges), set(other.edges)
        of_this = len(mine & yours) / len(mine) if mine else float("nan")
        return {
            "edges": _jaccard(mine, yours),
            "nodes": _jaccard(set(self.nodes), set(other.nodes)),
            "of_this": of_this,
        }

    def mask(self, strength: float = 0.0) -> Mask:
        """Heads and MLPs from which an edge begins, each with the given strength (0: silences the graph's nodes)."""
        return Mask.of([node for node in self.nodes if node[0] == "L"], strength)

    def save(self, path: Path | str) -> None:
        """Write the table as parquet, with everything else as JSON in the file's metadata; aside, then renamed."""
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "table"}
        note = {"headwise_graph": json.dumps(rest, default=str)}
        write_aside(Path(path), lambda aside: self.table.write_parquet(aside, compression="snappy", metadata=note))

    @classmethod
    def load(cls, path: Path | str) -> "Graph":
        """Read a graph. Raises ValueError when the file is not one."""
        try:
            rest = json.loads(pl.read_parquet_metadata(path)["headwise_graph"])
            rest["heads"] = {int(layer): (int(heads), int(kv)) for layer, (heads, kv) in rest["heads"].items()}
            table = pl.read_parquet(path, hive_partitioning=False).select(list(COLUMNS))
        except (KeyError, ValueError, TypeError, AttributeError, pl.exceptions.PolarsError, OSError) as problem:
            raise ValueError(f"{path} is not a headwise graph: {problem}") from problem
        return cls(table=table, **rest)


def _unchecked(graph: Graph, table: pl.DataFrame) -> Graph:
    new = object.__new__(Graph)
    for one in dataclasses.fields(Graph):
        object.__setattr__(new, one.name, table if one.name == "table" else getattr(graph, one.name))
    return new


def _order(source: str) -> tuple[int, int]:
    number = re.search(r"[@H](\d+)$", source)
    return written_at(source), int(number[1]) if number else -1


def _jaccard(one: set, other: set) -> float:
    return len(one & other) / len(one | other) if one | other else 1.0


@dataclass(frozen=True)
class CircuitMethod(Method):
    """Base of the circuits room: a graph of what carries a behaviour.

    Class attributes: `evidence`, the rung of the ladder on which its weights stand; `needs`, the data task it wants.
    """

    evidence: ClassVar[str] = "seen"
    needs: ClassVar[str] = "ioi"

    def find(self, model: "PreTrainedModel", batch: "Batch") -> Graph:
        """The edges that this method weighs, on these prompts."""
        raise TypeError(f"{type(self).__name__} does not say how it finds a graph.")
