"""How does representation impact in-context learning: A exploration on a synthetic task. Fu et al., 2023.
arXiv:2309.06054

Row s147 of the mission. Scaled down: factors of three values in place of drawn shapes, and networks of 12 or 32
channels that are trained for some hundred steps, so that they differ in what they have learned.
"""

from dataclasses import dataclass
from typing import ClassVar

from headwise.comparison import Condition
from headwise.data import HiddenFactors
from headwise.experiment import Experiment
from headwise.resets import Switch
from headwise.schedule import steps
from headwise.tiny import TinyConfig
from headwise.training import Training

FIRST = ("from scratch", "in weights first")


@dataclass(frozen=True)
class FactorProbes(Experiment):
    """Trains networks of several sizes on prompts of several lengths, and one with its items learned by heart first.

    Fields:
        layers, widths, lengths: of the networks and prompts, one condition for each choice.
        named: steps of the last condition in which only the factors of items are learned.
    """

    row: ClassVar[str] = "s147"
    goal: ClassVar[tuple[str, str, float]] = ("last", "above", 0.7)
    seeds: ClassVar[tuple[int, ...]] = (5, 6)

    layers: tuple[int, ...] = (1, 2, 3)
    widths: tuple[int, ...] = (12, 32)
    lengths: tuple[int, ...] = (6, 12)
    named: int = 300

    @property
    def head_start(self) -> int:
        """Steps of the condition "in weights first" in which nothing needs to be read."""
        return self.named * (10 if self.full else 1)

    def conditions(self) -> dict[str, Condition]:
        """First the two that are compared for how soon they learn, then the networks that are probed."""
        longer = 10 if self.full else 1
        lesson = HiddenFactors(factors=4, values=4) if self.full else HiddenFactors()
        many, few = (
            Training(steps=longer * count, batch=64, lr=3e-3, warmup=50, clip=1.0, measure_every=longer * 25, rows=512)
            for count in (1000, 400)
        )
        model = TinyConfig(**lesson.config())
        switch = Switch(lesson.on("named"), steps(0, self.head_start))
        found = {FIRST[0]: Condition(model, lesson, many), FIRST[1]: Condition(model, lesson, many, [switch])}
        for layers in self.layers:
            for width in self.widths:
                for length in self.lengths:
                    one = HiddenFactors(factors=lesson.factors, values=lesson.values, length=length)
                    shape = TinyConfig(**one.config(layers=layers, width=width, mlp=2 * width))
                    found[f"{layers} layers, {width} wide, {length} items"] = Condition(shape, one, few)
        return found
