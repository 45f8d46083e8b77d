"""In-Context Learning through the Bayesian Prism. Panwar et al., 2023. arXiv:2306.04891

Row s062 of the mission. Scaled down: few channels, and x and the example before it share a position.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from headwise.comparison import Condition
from headwise.data import FourierSeries, MixedRegression
from headwise.experiment import Experiment
from headwise.tiny import TinyConfig
from headwise.training import Training


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

    dim: int = 5
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
        shape = {"layers": 12, "heads": 8, "width": 256, "mlp": 1024} if self.full else {}
        training = Training(
            steps=500_000 if self.full else 5000,
            batch=64 if self.full else 32,
            lr=1e-4 if self.full else 2e-3,
            warmup=100,
            decay="cosine",
            clip=1.0,
            measure_every=500,
            rows=256,
        )
        shorter = {} if self.full else {"two hills": 3000, "low frequencies": 1200, "high frequencies": 1800}
        return {
            name: Condition(
                TinyConfig(**lesson.config(**shape)),
                lesson,
                replace(training, steps=shorter.get(name, training.steps)),
            )
            for name, lesson in lessons.items()
        }
