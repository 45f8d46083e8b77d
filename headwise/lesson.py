"""Lesson: an endless stream of prompts that a small model is taught from, with roles of positions and known answers.

A lesson is a task of the data room that needs no tokenizer. It says what shape of model can learn it, how prompts are
drawn from a generator, what the loss is, which cells of an attention pattern mean what, on which other splits the
model is tested, and which loss chance, Bayes or a simple algorithm would have.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from headwise.task import Batch, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Shape(NamedTuple):
    """What a model must have to learn a lesson: see the fields of `TinyConfig` of the same names."""

    length: int
    outputs: int
    input_size: int = 0
    vocab_size: int = 0


def generator(*numbers: int) -> torch.Generator:
    """A generator whose stream belongs to these numbers alone, such as a seed and a step."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        mixed = (mixed ^ (number + 0x632BE59BD9B4E019)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 29)) * 0x94D049BB133111EB % 2**64
    return torch.Generator().manual_seed((mixed ^ (mixed >> 32)) % 2**63)


@dataclass(frozen=True)
class Lesson(Task):
    """Base of the tasks that small models are trained on.

    Fields:
        split: which prompts are drawn: "train", or one of `tests`.
        world: seed of what stays the same in all prompts, such as the vectors of classes.

    Class attributes:
        tests: the other splits.
        looks: numbers that every head has: {name: {cell: weight}}, the attention that lands on a cell times its weight,
            summed. "induction": {"match": 1, "rival": -1}.
    """

    split: str = "train"
    world: int = 0

    tests: ClassVar[tuple[str, ...]] = ()
    looks: ClassVar[Mapping[str, Mapping[str, float]]] = {}

    def __post_init__(self) -> None:
        if self.split not in ("train", *self.tests):
            raise ValueError(
                f"{self.split!r} is no split of {type(self).__name__}; it has {', '.join(('train', *self.tests))}."
            )

    @property
    def shape(self) -> Shape:
        """What a model must have to learn this."""
        raise TypeError(f"{type(self).__name__} does not say what shape of model it is for.")

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """`n` prompts of this split from the generator, which alone decides them."""
        raise TypeError(f"{type(self).__name__} does not say how its prompts are drawn.")

    def make(self, tokenizer: "PreTrainedTokenizerBase | None" = None, n: int = 32, seed: int = 0) -> Batch:
        """`n` prompts; a lesson needs no tokenizer."""
        if n < 1:
            raise ValueError(f"{n} prompts were asked for; at least 1 is needed.")
        return replace(self.draw(n, generator(seed)), about=self.about(n, seed))

    def on(self, split: str) -> "Lesson":
        """The same lesson with prompts of another split."""
        return replace(self, split=split)

    def cells(self, batch: Batch) -> dict[str, Tensor]:
        """Cells of an attention pattern by what looking there means: booleans [B or 1, Tq, Tk]."""
        return {}

    def said(self, batch: Batch) -> Tensor:
        """[B, T] the class that each position says, -1 where it says none. For copying held perfect."""
        raise ValueError(f"{type(self).__name__} does not say which positions name which class.")

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """What is minimised, one number a prompt. logits [B, P, outputs] at the columns `batch.at` -> [B].

        By default cross-entropy in nats of the class `batch.answer`, mean over the answers of a prompt.
        """
        found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.answer.flatten(), reduction="none")
        found = found.view_as(batch.answer)
        return found.mean(-1) if batch.weight is None else (found * batch.weight).sum(-1) / batch.weight.sum(-1)

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """More numbers that are measured, [B] each. By default "accuracy": the answer has the largest logit."""
        return {"accuracy": (logits.argmax(-1) == batch.answer).float().mean(-1)}

    def lines(self) -> dict[str, float]:
        """Losses to compare with: {"chance": ..., "Bayes": ...}, in the unit of the loss."""
        return {}

    def config(self, **options: Any) -> dict[str, Any]:
        """Fields of a `TinyConfig` that fits: `TinyConfig(**lesson.config(layers=2, heads=8))`."""
        fit = {"outputs": self.shape.outputs, "max_positions": max(8, self.shape.length)}
        fit |= {"input_size": self.shape.input_size} if self.shape.input_size else {}
        fit |= {"vocab_size": self.shape.vocab_size} if self.shape.vocab_size else {}
        return fit | options
