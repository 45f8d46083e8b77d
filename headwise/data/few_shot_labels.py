"""What needs to go right for an induction head? A mechanistic study of in-context learning circuits and their
formation. Singh et al., 2024. arXiv:2404.07129

Row s001 of the mission.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from headwise.lesson import Lesson, Shape, generator
from headwise.task import Batch


@dataclass(frozen=True)
class FewShotLabels(Lesson):
    """Items with labels, then one of the items again: which label had it? Labels are drawn anew in every prompt.

    A prompt is item, label, item, label, ..., item. Items are fixed random vectors of classes, labels are one-hot in
    channels of their own, so that a model learns by looking and not by heart. Corrupt prompts have the labels of the
    queried item and another exchanged.

    Fields:
        classes: items to learn from (as many others for the split "new classes").
        labels: how many there are; sets of them that are held out make the split "new labels".
        pairs: items with labels in a prompt.
        dim: channels of an item.
        held: share of the label sets that is held out.
    """

    row: ClassVar[str] = "s001"
    tests: ClassVar[tuple[str, ...]] = ("new classes", "new labels")
    looks: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "induction": {"match": 1.0, "rival": -1.0},
        "previous_token": {"label to item": 1.0},
    }

    classes: int = 100
    labels: int = 5
    pairs: int = 2
    dim: int = 64
    held: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.pairs <= min(self.classes, self.labels):
            raise ValueError(
                f"{self.pairs} pairs do not fit {self.classes} classes and {self.labels} labels; "
                f"allowed are 2 to {min(self.classes, self.labels)}."
            )

    @property
    def shape(self) -> Shape:
        """Vectors of item and label channels, one class a label."""
        return Shape(2 * self.pairs + 1, self.labels, input_size=self.dim + self.labels)

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """Spans: "match" the label that is the answer, "rival" the label of the corrupt prompt, "query"."""
        seen, fresh = _items(self.classes, self.dim, self.world)
        items = fresh if self.split == "new classes" else seen
        train, held = _label_sets(self.labels, self.pairs, self.held, self.world)
        sets = held if self.split == "new labels" else train
        chosen = torch.rand(n, self.classes, generator=draw).topk(self.pairs, -1).indices
        labels = sets[torch.randint(len(sets), (n,), generator=draw)]
        labels = labels.gather(1, torch.rand(n, self.pairs, generator=draw).argsort(-1))
        asked = torch.randint(self.pairs, (n, 1), generator=draw)
        other = (asked + torch.randint(1, self.pairs, (n, 1), generator=draw)) % self.pairs
        swapped = labels.scatter(1, asked, labels.gather(1, other)).scatter(1, other, labels.gather(1, asked))
        at = torch.full((n, 1), 2 * self.pairs)
        return Batch(
            inputs={"inputs_embeds": self._vectors(items, chosen, labels, asked)},
            corrupt={"inputs_embeds": self._vectors(items, chosen, swapped, asked)},
            at=at,
            answer=labels.gather(1, asked),
            foil=labels.gather(1, other),
            spans={
                "match": torch.cat([2 * asked + 1, 2 * asked + 2], 1),
                "rival": torch.cat([2 * other + 1, 2 * other + 2], 1),
                "query": torch.cat([at, at + 1], 1),
            },
        )

    def _vectors(self, items: Tensor, chosen: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
        """[B, T, dim + labels]."""
        n = len(chosen)
        whole = torch.zeros(n, 2 * self.pairs + 1, self.dim + self.labels)
        whole[:, 0:-1:2, : self.dim] = items[chosen]
        whole[:, 1::2, self.dim :] = torch.nn.functional.one_hot(labels, self.labels).float()
        whole[:, -1, : self.dim] = items[chosen.gather(1, asked)[:, 0]]
        return whole

    def said(self, batch: Batch) -> Tensor:
        """[B, T] the label at label positions, else -1."""
        marks = batch.inputs["inputs_embeds"][..., self.dim :]
        return torch.where(marks.sum(-1) > 0, marks.argmax(-1), -1)

    def cells(self, batch: Batch) -> dict[str, Tensor]:
        """From the query: "match" to its label, "rival" to the other, "item" to the same item; and "label to item"."""
        length = 2 * self.pairs + 1
        columns = torch.arange(length, device=batch.at.device)
        last = (columns == length - 1)[:, None]
        match, rival = (columns == batch.spans[name][:, :1] for name in ("match", "rival"))
        item = columns == batch.spans["match"][:, :1] - 1
        pairs = (columns[:, None] - columns == 1) & (columns[:, None] % 2 == 1)
        named = {"match": match, "rival": rival, "item": item}
        return {name: last & cell[:, None] for name, cell in named.items()} | {"label to item": pairs[None]}

    def lines(self) -> dict[str, float]:
        """Cross-entropy in nats of guessing among all labels, and among those of the prompt."""
        return {"any label": log(self.labels), "labels of the prompt": log(self.pairs), "perfect": 0.0}


@cache
def _items(classes: int, dim: int, world: int) -> tuple[Tensor, Tensor]:
    """Vectors of the classes that are learned and of others, [classes, dim] each, unit variance a channel."""
    both = torch.randn(2 * classes, dim, generator=generator(world, 1))
    return both[:classes], both[classes:]


@cache
def _label_sets(labels: int, pairs: int, held: float, world: int) -> tuple[Tensor, Tensor]:
    """Sets of labels to learn from and held out, [sets, pairs] each; without held-out sets both are all."""
    sets = torch.tensor(list(combinations(range(labels), pairs)))
    sets = sets[torch.randperm(len(sets), generator=generator(world, 2))]
    cut = round(held * len(sets))
    return (sets, sets) if cut in (0, len(sets)) else (sets[cut:], sets[:cut])
