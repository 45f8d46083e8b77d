"""In-Context Learning through the Bayesian Prism. Panwar et al., 2023. arXiv:2306.04891

Row s062 of the mission. Scaled down: three channels, and x and the example before it share a position. With five, a
network of this size was 26, 16 and 12 % of y's square away from Bayes after 1,000, 2,500 and 5,000 steps.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from headwise.comparison import Condition
from headwise.data import FourierSeries, MixedRegression
from headwise.experiment import GPT2, Experiment, in_context
from headwise.tiny import TinyConfig


@dataclass(frozen=True)
class BayesianPrism(Experiment):
    """Trains networks on mixtures of linear functions, and on waves of mostly low or mostly high frequencies.

    Fields:
        dim: channels of the linear functions.
        frequencies: of the waves.
    """

    row: ClassVar[str] = "s062"
    goal: ClassVar[tuple[str, str, float]] = ("loss", "below", 1.0)
    seeds: ClassVar[tuple[int, ...]] = (5,)

    dim: int = 3
    frequencies: int = 4

    def conditions(self) -> dict[str, Condition]:
        """Dense and sparse functions, functions of two hills, and waves with power falling or rising by frequency."""
        size = {"dim": 20, "length": 41, "apart": True} if self.full else {"dim": self.dim}
        waves = {"frequencies": 10, "length": 41, "apart": True} if self.full else {"frequencies": self.frequencies}
        lessons = {
            "dense and sparse": MixedRegression(few=3 if self.full else 1, **size),
            "two hills": MixedRegression(kinds=("left", "right"), **size),
            "low frequencies": FourierSeries(**waves),
            "high frequencies": FourierSeries(rising=True, **waves),
        }
        shape = GPT2 if self.full else {}
        training = in_context(500_000 if self.full else 9000, self.full)
        shorter = {} if self.full else {"two hills": 5000, "low frequencies": 1200, "high frequencies": 1800}
        return {
            name: Condition(
                TinyConfig(**lesson.config(**shape)),
                lesson,
                replace(training, steps=shorter.get(name, training.steps)),
            )
            for name, lesson in lessons.items()
        }
