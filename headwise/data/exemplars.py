"""The mechanistic basis of data dependence and abrupt learning in an in-context classification task. Reddy, 2023.
arXiv:2312.03002

Row s074 of the mission.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import log
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from headwise.lesson import Lesson, Shape, generator
from headwise.task import Batch


@dataclass(frozen=True)
class Exemplars(Lesson):
    """Noisy items of classes with labels, then one more item: its label can be read in the prompt or known by heart.

    A prompt is item, label, ..., item, of vectors, and starts anywhere in a window of positions. Class k has label
    k mod `labels` throughout training. Splits: "new classes" (only reading helps), "absent" (the class of the query is
    not in the prompt: only knowing helps), "swapped" (the labels in the prompt are not those that were learned).

    Fields:
        classes, labels: how many; a class is a point, a label a vector.
        pairs: items with labels in a prompt. They have different labels, unless `burst` repeats a class.
        burst: times that a class comes in a prompt; pairs is a multiple of it.
        bursty: share of the prompts that hold the class of the query; the others are drawn item by item.
        zipf: class k comes in proportion to (k + 1) ** -zipf.
        spread: of items around their class.
        dim: channels of an item or label. `window`: positions in which a prompt may lie.
    """

    row: ClassVar[str] = "s074"
    tests: ClassVar[tuple[str, ...]] = ("new classes", "absent", "swapped")
    looks: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "induction": {"match": 1.0},
        "previous_token": {"label to item": 1.0},
    }

    classes: int = 512
    labels: int = 16
    pairs: int = 4
    burst: int = 1
    bursty: float = 1.0
    zipf: float = 0.0
    spread: float = 0.1
    dim: int = 31
    window: int = 33

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs % self.burst or self.pairs // self.burst > self.labels:
            raise ValueError(
                f"{self.pairs} pairs in bursts of {self.burst} with {self.labels} labels are no prompt; pairs must be "
                "a multiple of the burst, with a label for each class."
            )
        if self.classes < 2 * self.labels or self.classes % self.labels:
            raise ValueError(
                f"{self.classes} classes cannot share {self.labels} labels evenly, two or more to a label; allowed are "
                f"{2 * self.labels}, {3 * self.labels} and so on."
            )
        if self.window < 2 * self.pairs + 1:
            raise ValueError(f"A window of {self.window} is too short for {2 * self.pairs + 1} positions.")

    @property
    def shape(self) -> Shape:
        """Vectors of `dim` channels, one class a label. Positions are given as `position_ids`."""
        return Shape(self.window, self.labels, input_size=self.dim)

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """Inputs have `position_ids` besides the vectors. Spans: "label_0" and so on hold the labels in the prompt."""
        means, names = _world(self.classes, self.labels, self.dim, self.world)
        known, query = self._classes(n, draw)
        slots = torch.arange(self.pairs) // self.burst
        slots = slots[torch.randperm(self.pairs, generator=draw)]
        shown = (known % self.labels)[:, slots]
        if self.split == "swapped":
            shown = (shown + 1) % self.labels
        centres = means[known]
        if self.split == "new classes":
            centres = torch.randn(centres.shape, generator=draw) * self.dim**-0.5
        centres = centres[:, slots]
        asked = torch.randint(self.pairs, (n, 1), generator=draw)
        target = centres.gather(1, asked[..., None].expand(-1, -1, self.dim))[:, 0]
        answer = shown.gather(1, asked)
        loose = {"train": torch.rand(n, 1, generator=draw) >= self.bursty, "absent": torch.ones(n, 1).bool()}
        if self.split in loose:
            target = torch.where(loose[self.split], means[query], target)
            answer = torch.where(loose[self.split], query[:, None] % self.labels, answer)
        whole = torch.zeros(n, 2 * self.pairs + 1, self.dim)
        whole[:, 0:-1:2] = self._near(centres, draw)
        whole[:, 1::2] = names[shown]
        whole[:, -1] = self._near(target, draw)
        start = torch.randint(self.window - 2 * self.pairs, (n, 1), generator=draw)
        return Batch(
            inputs={"inputs_embeds": whole, "position_ids": start + torch.arange(2 * self.pairs + 1)},
            at=torch.full((n, 1), 2 * self.pairs),
            answer=answer,
            spans={f"label_{i}": shown[:, i : i + 1].expand(-1, 2) for i in range(self.pairs)},
        )

    def _near(self, means: Tensor, draw: torch.Generator) -> Tensor:
        """Items around their class, of the same expected length as it."""
        noise = torch.randn(means.shape, generator=draw) * self.dim**-0.5
        return (means + self.spread * noise) / (1 + self.spread**2) ** 0.5

    def _classes(self, n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Classes of a prompt [B, pairs / burst], with different labels, and one [B] that is not in it."""
        kinds, levels = self.pairs // self.burst, self.classes // self.labels
        weight = ((1.0 + torch.arange(self.classes)) ** -self.zipf).view(levels, self.labels)
        # The smallest of exponential waiting times: labels in proportion to their weights, none twice.
        waits = -torch.rand(n, self.labels, generator=draw).log() / weight.sum(0)
        order = waits.argsort(-1)
        label, other = order[:, :kinds], order[:, -1]
        chosen, spare = self._levels(weight, label, draw), self._levels(weight, other, draw)
        if kinds == self.labels:  # every label is in the prompt: another class of the last
            spare = (chosen[:, -1] + torch.randint(1, levels, (n,), generator=draw)) % levels
        return chosen * self.labels + label, spare * self.labels + other

    def _levels(self, weight: Tensor, label: Tensor, draw: torch.Generator) -> Tensor:
        """Which of its classes a label stands for, in proportion to the weights [levels, labels]."""
        if self.zipf == 0:
            return torch.randint(len(weight), label.shape, generator=draw)
        return torch.multinomial(weight.T[label.flatten()], 1, generator=draw).view(label.shape)

    def shown(self, batch: Batch) -> Tensor:
        """[B, pairs] the labels in the prompt, in order."""
        return torch.stack([batch.spans[f"label_{i}"][:, 0] for i in range(self.pairs)], 1)

    def said(self, batch: Batch) -> Tensor:
        """[B, T] the label at label positions, else -1."""
        found = torch.full((len(batch), 2 * self.pairs + 1), -1, device=batch.at.device)
        found[:, 1::2] = self.shown(batch)
        return found

    def cells(self, batch: Batch) -> dict[str, Tensor]:
        """From the query: "match" to labels that are the answer, "rival" to others; "label to item" before it."""
        said = self.said(batch)
        columns = torch.arange(said.shape[1], device=said.device)
        last = (columns == said.shape[1] - 1)[:, None]
        match = (said == batch.answer)[:, None]
        pairs = (columns[:, None] - columns == 1) & (columns[:, None] % 2 == 1)
        other = ((said >= 0) & (said != batch.answer))[:, None]
        return {"match": last & match, "rival": last & other, "label to item": pairs[None]}

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Also "in context": the probability that the model gives to labels in the prompt."""
        there = one_hot(self.shown(batch), self.labels).amax(1)
        return super().metrics(logits, batch) | {"in_context": (logits[:, 0].softmax(-1) * there).sum(-1)}

    def lines(self) -> dict[str, float]:
        """Cross-entropy in nats of guessing among all labels, and among those of the prompt."""
        return {"any label": log(self.labels), "labels of the prompt": log(self.pairs // self.burst), "perfect": 0.0}

    def config(self, **options: object) -> dict[str, object]:
        """Reddy's network: one-hot positions beside the content, one head a layer, no norm, ReLU layers on top."""
        shape = {"width": self.window + self.dim, "pos": "onehot", "norm": "none", "read_in": False, "heads": 1}
        return super().config(**(shape | {"max_positions": self.window, "classifier": (128, 128)} | options))


@cache
def _world(classes: int, labels: int, dim: int, world: int) -> tuple[Tensor, Tensor]:
    """Means of the classes [classes, dim] and vectors of the labels [labels, dim], N(0, 1/dim) a channel."""
    draw = generator(world, 4)
    return torch.randn(classes, dim, generator=draw) * dim**-0.5, torch.randn(labels, dim, generator=draw) * dim**-0.5
