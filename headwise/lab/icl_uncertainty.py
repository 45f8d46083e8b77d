"""Towards Better Understanding of In-Context Learning Ability from In-Context Uncertainty Quantification. Liu et al.,
2024. arXiv:2405.15115

Row s047 of the mission. Scaled down: three channels, and x and the example before it share a position.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from headwise.comparison import Condition
from headwise.data import UncertainRegression
from headwise.experiment import GPT2, Experiment, in_context
from headwise.tiny import TinyConfig


@dataclass(frozen=True)
class ICLUncertainty(Experiment):
    """Trains a network to say a mean and a variance, on endless tasks and on a pool of few.

    Fields:
        dim: channels of x.
        pool: tasks of the second condition.
        length: examples in a prompt.
    """

    row: ClassVar[str] = "s047"
    goal: ClassVar[tuple[str, str, float]] = ("loss", "below", 1.3)
    seeds: ClassVar[tuple[int, ...]] = (5,)

    dim: int = 3
    pool: int = 8
    length: int = 20

    def conditions(self) -> dict[str, Condition]:
        """New weights in every prompt, or weights from a pool."""
        size = {"dim": 8, "length": 100, "apart": True} if self.full else {"dim": self.dim, "length": self.length}
        shape = GPT2 | {"act": "gelu"} if self.full else {}
        training = in_context(200_000 if self.full else 20_000, self.full)
        lessons = {
            "endless tasks": UncertainRegression(**size),
            f"{self.pool} tasks": UncertainRegression(tasks=self.pool, **size),
        }
        # A pool is learned sooner.
        shorter = training if self.full else replace(training, steps=10_000)
        return {
            name: Condition(TinyConfig(**lesson.config(**shape)), lesson, shorter if lesson.tasks else training)
            for name, lesson in lessons.items()
        }
