"""Scaling Laws in Patchification: An Image Is Worth 50,176 Tokens And More. Wang et al., 2025. arXiv:2502.03738

Row s097 of the mission. Scaled down from ImageNet to scikit-learn's digits: patches of 4, 2 and 1 pixels are 4, 16 and
64 tokens. Images that are taught are moved by up to a pixel, in place of the paper's many ways to change an image:
without that single pixels are learned by heart.
"""

from dataclasses import dataclass
from typing import ClassVar

from headwise.comparison import Condition
from headwise.data import DigitPatches
from headwise.experiment import Experiment
from headwise.tiny import TinyConfig
from headwise.training import Training


@dataclass(frozen=True)
class PatchSize(Experiment):
    """Trains vision transformers of one width on patches of several sizes.

    Fields:
        patches: pixels in each direction, one condition each.
    """

    row: ClassVar[str] = "s097"
    goal: ClassVar[tuple[str, str, float]] = ("loss", "below", 0.5)
    seeds: ClassVar[tuple[int, ...]] = (5, 6, 7, 8, 9)

    patches: tuple[int, ...] = (4, 2, 1)

    def conditions(self) -> dict[str, Condition]:
        """One a size, all with as many updates."""
        training = Training(
            steps=10_000 if self.full else 3000,
            batch=64,
            lr=2e-3,
            decay="cosine",
            warmup=30,
            measure_every=50,
            rows=500,
        )
        found = {}
        for patch in self.patches:
            lesson = DigitPatches(patch=patch, moved=1)
            width = {"width": 96, "mlp": 384, "layers": 6} if self.full else {}
            found[f"{patch} x {patch}, {lesson.tokens} tokens"] = Condition(
                TinyConfig(**lesson.config(**width)), lesson, training
            )
        return found
