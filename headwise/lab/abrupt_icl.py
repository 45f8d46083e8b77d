"""The mechanistic basis of data dependence and abrupt learning in an in-context classification task. Reddy, 2023.
arXiv:2312.03002

Row s074 of the mission. Scaled down: 4 pairs of 31 channels in a window of 33 positions, Adam 1e-3.
"""

from dataclasses import dataclass
from typing import ClassVar

from headwise.comparison import Condition
from headwise.data import Exemplars
from headwise.experiment import Experiment
from headwise.tiny import TinyConfig
from headwise.training import Training


@dataclass(frozen=True)
class AbruptICL(Experiment):
    """Trains a two-layer network on classes with labels, and sees whether it learns to read or to know by heart.

    Fields:
        classes: of the conditions "32 classes" and so on, all with 16 labels; twice as many of both when `full`.
        few: labels of the condition "as many labels as pairs", which has `classes[1]` classes.
    """

    row: ClassVar[str] = "s074"
    goal: ClassVar[tuple[str, str, float]] = ("loss", "below", 0.5)
    seeds: ClassVar[tuple[int, ...]] = (5,)

    classes: tuple[int, ...] = (32, 512, 4096)
    few: int = 4

    def conditions(self) -> dict[str, Condition]:
        """One for each number of classes, and one in which every prompt holds every label."""
        shape = {"pairs": 8, "window": 65, "dim": 63} if self.full else {}
        labels = 32 if self.full else 16
        classes = [2 * k if self.full else k for k in self.classes]
        lessons = {f"{k} classes": Exemplars(classes=k, labels=labels, **shape) for k in classes}
        alike = 8 if self.full else self.few
        lessons["as many labels as pairs"] = Exemplars(classes=classes[1], labels=alike, **shape)
        steps = 20_000 if self.full else 3000
        found = {}
        for name, lesson in lessons.items():
            # Where labels are read, what rises first is told by a few updates.
            often = 25 if name == f"{classes[-1]} classes" else 200 if self.full else 100
            training = Training(steps=steps, batch=128, lr=1e-3, measure_every=often, rows=512)
            found[name] = Condition(TinyConfig(**lesson.config()), lesson, training)
        return found
