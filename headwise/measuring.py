"""What a model does on the prompts of a lesson: loss, accuracy, and what every head looks at."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.anatomy import anatomy
from headwise.edits import Edit, Scene, holding
from headwise.lesson import Lesson
from headwise.method import Method
from headwise.pattern import landing
from headwise.site import head
from headwise.tap import tap
from headwise.task import Batch, answer_logits


@dataclass(frozen=True)
class Look(Method):
    """Attention of each head to the cells that a lesson names, weighed and summed.

    Fields:
        name: of the number, as in the lesson's `looks`.
    """

    name: str = "induction"


@dataclass(frozen=True)
class Measured:
    """Numbers of the whole model [B], and of every head [B], by name."""

    numbers: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def measured(
    model: PreTrainedModel, batch: Batch, lesson: Lesson, edits: Sequence[Edit] = (), scene: Scene | None = None
) -> Measured:
    """Loss, accuracy and the lesson's looks on these prompts under edits, in evaluation mode and without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), holding(model, edits, scene or Scene(lesson, batch)):
            heads, logits = _looking(model, batch, lesson)
    finally:
        model.train(training)
    numbers = {"loss": lesson.loss(logits, batch), **lesson.metrics(logits, batch)}
    return Measured(numbers, heads)


def look(model: PreTrainedModel, batch: Batch, lesson: Lesson) -> dict[str, dict[str, Tensor]]:
    """{name: {unit: [B]}} of the lesson's looks."""
    return _looking(model, batch, lesson)[0]


def _looking(model: PreTrainedModel, batch: Batch, lesson: Lesson) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    if not lesson.looks or not anatomy(model).offers("pattern"):
        return {}, answer_logits(model, batch)
    cells = lesson.cells(batch)

    def reduce(pattern: Tensor) -> Tensor:
        """[B, H, T, T] -> [B, H, looks]."""
        found = {
            name: landing(pattern, cells[name].expand(len(pattern), -1, -1).to(pattern.device)).nan_to_num()
            for name in {cell for weights in lesson.looks.values() for cell in weights}
        }
        sums = [sum(w * found[cell] for cell, w in weights.items()) for weights in lesson.looks.values()]
        return torch.stack([torch.as_tensor(one) for one in sums], -1)

    with tap(model, "pattern", reduce=reduce) as taken:
        logits = answer_logits(model, batch)
    values = taken.by_layer("pattern")
    heads = {
        name: {head(layer, i): value[:, i, at] for layer, value in values.items() for i in range(value.shape[1])}
        for at, name in enumerate(lesson.looks)
    }
    return heads, logits
