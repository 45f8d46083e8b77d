"""How Do Transformers Learn In-Context Beyond Simple Functions? A Case Study on Learning with Representations.
Guo et al., 2023. arXiv:2310.10616

Row s143 of the mission. Scaled down: few channels, and x and the example before it share a position.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

from headwise.comparison import Condition
from headwise.data import RepresentedRegression
from headwise.experiment import GPT2, Experiment, in_context
from headwise.tiny import Tiny, TinyConfig


def upper(model: Tiny, first: int, input_size: int, seed: int = 0) -> Tiny:
    """The layers from `first` on behind a fresh linear map from vectors of another size, which alone is trainable.

    Raises:
        ValueError: the model has no such layer.
    """
    if not 0 <= first < model.config.layers:
        raise ValueError(
            f"There is no layer {first} to paste from; the model has layers 0 to {model.config.layers - 1}."
        )
    config = copy.deepcopy(model.config)
    config.layers, config.input_size = model.config.layers - first, input_size
    pasted = config.build(seed)
    for value in pasted.parameters():
        value.requires_grad_(False)
    for mine, its in zip(pasted.blocks, model.blocks[first:], strict=True):
        mine.load_state_dict(its.state_dict())
    pasted.norm.load_state_dict(model.norm.state_dict())
    pasted.readout.load_state_dict(model.readout.state_dict())
    pasted.embed.requires_grad_(True)
    return pasted


@dataclass(frozen=True)
class RepresentedICL(Experiment):
    """Trains a network on functions that are linear in a fixed representation of x, and in one of two.

    Fields:
        dim: channels of x; width: of a representation.
        length: examples in a prompt.
    """

    row: ClassVar[str] = "s143"
    goal: ClassVar[tuple[str, str, float]] = ("loss", "below", 0.5)
    seeds: ClassVar[tuple[int, ...]] = (5,)

    dim: int = 3
    width: int = 4
    length: int = 20

    def conditions(self) -> dict[str, Condition]:
        """One representation, or two that prompts do not name."""
        size = {"dim": 20, "width": 20, "length": 41, "apart": True} if self.full else {}
        size = {"dim": self.dim, "width": self.width, "length": self.length} | size
        shape = GPT2 if self.full else {"layers": 4}
        training = in_context(300_000 if self.full else 10_000, self.full)
        lessons = {
            "one representation": RepresentedRegression(**size),
            "two representations": RepresentedRegression(maps=2, **size),
        }
        return {
            name: Condition(TinyConfig(**lesson.config(**shape)), lesson, training) for name, lesson in lessons.items()
        }
