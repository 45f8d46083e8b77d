"""Talking Heads: Understanding Inter-layer Communication in Transformer Language Models.
Merullo et al., 2024. arXiv:2406.09519

What a head writes is a sum of few directions, the singular vectors of its OV circuit. One of them may fit a later
head's QK or OV circuit far better than the sum does: a channel between the two, that can be edited alone.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.do import Intervention
from headwise.edges import Edges
from headwise.graph import CircuitMethod, Graph
from headwise.listen import Place
from headwise.site import Site, Unit, head
from headwise.task import Batch
from headwise.weights import Weights


@dataclass(frozen=True)
class TalkingHeads(CircuitMethod):
    """How well the best single direction that a head writes fits what a later head reads, above chance, from weights.

    The composition of one direction v with a reader's matrix M is |v M| / |M|, which is 1 / sqrt(D) for a random one.
    Rotations of queries and keys by position are left out.

    Fields:
        rank: how many directions of a head are looked at, those along which it writes most.
    """

    rank: int = 8

    row: ClassVar[str] = "s127"
    evidence: ClassVar[str] = "read"
    needs: ClassVar[str] = ""

    @torch.no_grad()
    def find(self, model: PreTrainedModel, batch: Batch | None = None) -> Graph:
        """All edges between heads. No prompts are needed; a KV head counts with the best of the heads that read it.

        Raises:
            ValueError: a rank below 1, or a model whose edges or weights are not known.
        """
        if self.rank < 1:
            raise ValueError(f"rank = {self.rank} looks at no direction; allowed are 1 and more.")
        edges = Edges(model)
        weights, found = edges.weights, {}
        written: list[Tensor] = []
        writers: list[str] = []
        for part in edges.parts:
            n, heads = part.number, range(len(part.heads))
            if writers:
                directions = torch.stack(written)
                for i in heads:
                    for side in "qkv":
                        readers = part.readers[side]
                        target = edges.targets[readers.start + i // (len(heads) // len(readers))]
                        best = composed(weights, directions, side, n, i).amax(-1)
                        for writer, value in zip(writers, best.tolist(), strict=True):
                            found[writer, target] = max(found.get((writer, target), -1.0), value)
            for i in heads:
                written.append(channels(weights, n, i)[: self.rank])
                writers.append(head(n, i))
        values = np.array(list(found.values())).reshape(-1, 1)
        return Graph.of_edges(self, model, batch, edges.heads, list(found), values)

    def channel(self, model: PreTrainedModel, writer: str, target: str) -> tuple[int, float]:
        """Number of the writer's direction that fits the target ("L5.H1.q", or its "L5.H1.k") best, and its weight."""
        weights, source = Weights(model), Unit.parse(writer)
        unit, side = target.rsplit(".", 1)
        reader = Unit.parse(unit)
        directions = channels(weights, source.layer, source.index)[None, : self.rank]
        values = composed(weights, directions, side, reader.layer, reader.index)[0]
        return int(values.argmax()), float(values.max())


@dataclass(frozen=True, eq=False)
class ScaleChannel(Intervention):
    """Multiply what a head writes along some directions by `alpha`, and leave the rest; source: [d, d], `in_z`."""

    alpha: float
    source: Tensor

    def new(self, value: Tensor, site: Site, place: Place) -> Tensor:
        """The head's z, changed."""
        return value + (self.alpha - 1) * (value @ self.source.to(value.device, value.dtype))


def channels(weights: Weights, layer: int, index: int) -> Tensor:
    """[d, D] directions along which a head writes, of length 1 (0 where it writes nothing), the strongest first."""
    _, size, directions = weights.ov(layer, index).svd()
    return directions.T * (size > 1e-6 * size[0].clamp_min(1e-20))[:, None]


def composed(weights: Weights, directions: Tensor, side: str, layer: int, index: int) -> Tensor:
    """[..., r] how well directions [..., r, D] fit what a head reads as "q", "k" or "v", above chance."""
    reader = weights.ov(layer, index) if side == "v" else weights.qk(layer, index)
    reader = reader.T if side == "k" else reader
    small = reader.A @ torch.linalg.qr(reader.B.T).R.T
    return (directions @ small).norm(dim=-1) / max(reader.norm(), 1e-30) - directions.shape[-1] ** -0.5


def in_z(weights: Weights, unit: str, numbers: list[int]) -> Tensor:
    """[d, d] what takes from a head's z the part that it writes along its directions of these numbers."""
    place = Unit.parse(unit)
    out = weights.o(place.layer, place.index)
    chosen = channels(weights, place.layer, place.index)[numbers]
    return (out @ chosen.T) @ (chosen @ torch.linalg.pinv(out))
