"""How does representation impact in-context learning: A exploration on a synthetic task. Fu et al., 2023.
arXiv:2309.06054

Row s147 of the mission.
"""

from dataclasses import dataclass
from math import lgamma, log
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from headwise.lesson import Lesson, Shape
from headwise.task import Batch


@dataclass(frozen=True)
class HiddenFactors(Lesson):
    """Items with labels that name one of their factors, such as colour or shape: which factor, and under which names?

    An item has a value of each factor, but is shown as a mark of its own: what it is made of must be learned by heart
    (the in-weights component). A prompt names the values of one hidden factor by labels drawn anew (the in-context
    component). Every item comes twice, first alone, when its label is asked for, and then with its label. In the split
    "named" an item comes with the number of a factor and its value is asked for: nothing needs to be read.

    Fields:
        factors: that an item has.
        values: of each factor; as many labels.
        length: items in a prompt.
    """

    row: ClassVar[str] = "s147"
    tests: ClassVar[tuple[str, ...]] = ("named",)

    factors: int = 3
    values: int = 3
    length: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factors < 1 or self.values < 2 or self.length < 2:
            raise ValueError(
                f"{self.length} items of {self.factors} factors with {self.values} values are no prompt; at least 2 "
                "items of 1 factor with 2 values are needed."
            )

    @property
    def items(self) -> int:
        """How many there are."""
        return self.values**self.factors

    @property
    def shape(self) -> Shape:
        """Channels of items, of the number of a factor, and of labels; one class a label."""
        return Shape(2 * self.length, self.values, input_size=self.items + self.factors + self.values)

    def made_of(self, items: Tensor) -> Tensor:
        """[..., factors] the value of each factor of items [...]."""
        return items[..., None] // self.values ** torch.arange(self.factors) % self.values

    def examples(self, n: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Items [n, length], answers [n, length], and the factor that each answer is about, [n, length]."""
        items = torch.randint(self.items, (n, self.length), generator=draw)
        hidden = torch.randint(self.factors, (n, self.length), generator=draw)
        names = torch.rand(n, self.values, generator=draw).argsort(-1)
        if self.split != "named":
            hidden = hidden[:, :1].expand(-1, self.length)
        value = self.made_of(items).gather(2, hidden[..., None])[..., 0]
        return items, value if self.split == "named" else names.gather(1, value), hidden

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """An answer for every item."""
        items, answer, hidden = self.examples(n, draw)
        marks = torch.zeros(n, self.length, self.shape.input_size)
        marks[..., : self.items] = one_hot(items, self.items)
        if self.split == "named":
            marks[..., self.items : self.items + self.factors] = one_hot(hidden, self.factors)
        whole = marks.repeat_interleave(2, 1)
        whole[:, 1::2, self.items + self.factors :] = one_hot(answer, self.values).float()
        at = torch.arange(0, 2 * self.length, 2).expand(n, -1)
        return Batch({"inputs_embeds": whole}, at=at, answer=answer)

    def cells(self, batch: Batch) -> dict[str, Tensor]:
        """From every item that is asked about to the items with labels before it: "examples"."""
        columns = torch.arange(2 * self.length)
        asks, tells = columns % 2 == 0, columns % 2 == 1
        return {"examples": ((columns[:, None] > columns) & asks[:, None] & tells)[None]}

    def bayes(self, batch: Batch) -> Tensor:
        """[B, length, values] the probability of each label, given the items with labels before it."""
        items = batch.inputs["inputs_embeds"][:, 0::2, : self.items].argmax(-1)
        value = one_hot(self.made_of(items), self.values).double()
        label = one_hot(batch.answer, self.values).double()
        # How often each value of each factor came with each label before an item: [B, length, factors, value, label].
        pairs = torch.einsum("btfv,btl->btfvl", value, label)
        met = (pairs.cumsum(1) - pairs > 0).double()
        known, used = met.sum(-1), met.sum(-2)
        fits = (known <= 1).all(-1) & (used <= 1).all(-1)
        chance = torch.tensor([lgamma(self.values - k + 1) for k in range(self.values + 1)], dtype=torch.float64)
        weight = chance[known.sum(-1).long().clamp(max=self.values)].masked_fill(~fits, -torch.inf).softmax(-1)
        said = torch.einsum("btfv,btfvl->btfl", value, met)
        free = (used == 0).double()
        free = free / free.sum(-1, keepdim=True).clamp_min(1)
        seen = said.sum(-1, keepdim=True) > 0
        return (weight[..., None] * torch.where(seen, said, free)).sum(2)

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Also "last": the accuracy of the last answer."""
        right = (logits.argmax(-1) == batch.answer).float()
        return {"accuracy": right.mean(-1), "last": right[:, -1]}

    def lines(self) -> dict[str, float]:
        """Cross-entropy in nats, of guessing and of Bayes over 2,000 prompts."""
        batch = self.on("train").make(None, 2000, seed=0x147)
        said = self.bayes(batch).gather(2, batch.answer[..., None])
        return {"chance": log(self.values), "Bayes": float(-said.log().mean())}

    def config(self, **options: object) -> dict[str, object]:
        """Small blocks with MLPs and no positions, of which the task needs none."""
        return super().config(**({"layers": 2, "heads": 2, "width": 32, "mlp": 64, "pos": "none"} | options))
