"""Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical Reasoning Learning of Language
Models. Chen et al., 2024. arXiv:2403.02178

Row s023 of the mission. Small decoders taught from nothing on 5,000 problems, where the paper fine-tunes Llama.
"""

from dataclasses import dataclass
from typing import ClassVar

from headwise.comparison import Condition
from headwise.data import MaskedThought
from headwise.experiment import Experiment
from headwise.tiny import TinyConfig
from headwise.training import Training


@dataclass(frozen=True)
class MaskedSteps(Experiment):
    """Teaches arithmetic step by step, with and without masks over the steps that are read.

    Fields:
        masked: shares of the steps, one condition each; the first is what the others are compared with.
    """

    row: ClassVar[str] = "s023"
    goal: ClassVar[tuple[str, str, float]] = ("loss", "below", 1.0)
    seeds: ClassVar[tuple[int, ...]] = (5, 6, 7, 8, 9)

    masked: tuple[float, ...] = (0.0, 0.2)

    def conditions(self) -> dict[str, Condition]:
        """Names: "masked 0%" and so on; with `full`, 0, 20 and 40%, longer problems and ten times the steps."""
        training = Training(
            steps=20_000 if self.full else 1500,
            batch=64 if self.full else 48,
            lr=1e-3 if self.full else 2e-3,
            warmup=100,
            decay="linear",
            measure_every=500,
        )
        shape = {"layers": 2, "heads": 4, "width": 64, "mlp": 256, "pos": "learned", "embed_std": 0.5}
        found = {}
        for share in (0.0, 0.2, 0.4) if self.full else self.masked:
            lesson = MaskedThought(masked=share, length=10 if self.full else 6)
            found[f"masked {share:.0%}"] = Condition(TinyConfig(**lesson.config(**shape)), lesson, training)
        return found
