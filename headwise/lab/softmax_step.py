"""The Closeness of In-Context Learning and Weight Shifting for Softmax Regression. Li et al., 2023. arXiv:2304.13276

Row s081 of the mission. One layer of attention, trained, beside one step of gradient descent on the same rows.
"""

from dataclasses import dataclass
from typing import ClassVar

from headwise.comparison import Condition
from headwise.data import SoftmaxRegression
from headwise.experiment import Experiment
from headwise.tiny import TinyConfig
from headwise.training import Training


@dataclass(frozen=True)
class SoftmaxStep(Experiment):
    """Trains one layer of attention on softmax regression, with two heads and with one.

    Fields:
        dim, length: channels and rows of a prompt. spread: standard deviation of the entries of A x.
    """

    row: ClassVar[str] = "s081"
    goal: ClassVar[tuple[str, str, float]] = ("loss", "below", 0.03)

    dim: int = 10
    length: int = 40
    spread: float = 0.25

    def conditions(self) -> dict[str, Condition]:
        """Two heads can take the mean of the rows away, as gradient descent on a softmax does; one cannot."""
        lesson = SoftmaxRegression(dim=self.dim, length=self.length, spread=self.spread)
        training = Training(
            steps=50_000 if self.full else 10_000,
            batch=256,
            lr=1e-3 if self.full else 1e-2,
            decay="cosine",
            measure_every=200,
            rows=512,
        )
        return {
            name: Condition(TinyConfig(**lesson.config(heads=heads)), lesson, training)
            for name, heads in (("2 heads", 2), ("1 head", 1))
        }
