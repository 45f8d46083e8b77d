"""Understanding the Effect of Noise in LLM Training Data with Algorithmic Chains of Thought. Havrilla and Iyer, 2024.
arXiv:2402.04004

Row s049 of the mission. Small decoders taught from nothing, where the paper fine-tunes pretrained ones.
"""

from dataclasses import dataclass
from typing import ClassVar

from headwise.comparison import Condition
from headwise.data import TracedIntegers
from headwise.experiment import Experiment
from headwise.tiny import TinyConfig
from headwise.training import Training


@dataclass(frozen=True)
class NoisyTraces(Experiment):
    """Teaches sums by their running totals, with mistakes that stay where they are or carry on.

    Fields:
        static: shares of the prompts with mistakes that stay where they are, one condition each.
        dynamic: shares of the prompts with mistakes that carry on.
    """

    row: ClassVar[str] = "s049"
    goal: ClassVar[tuple[str, str, float]] = ("accuracy", "above", 0.99)

    static: tuple[float, ...] = (0.5, 1.0)
    dynamic: tuple[float, ...] = (0.25, 0.5)

    def conditions(self) -> dict[str, Condition]:
        """Names: "clean", then "static 50%" and so on; with `full`, five shares of each and longer sums."""
        every = (0.1, 0.25, 0.5, 0.75, 1.0)
        asked = [("static", share) for share in (every if self.full else self.static)]
        asked += [("dynamic", share) for share in (every if self.full else self.dynamic)]
        length = 12 if self.full else 6
        lessons = {"clean": TracedIntegers(length=length)}
        for noise, share in asked:
            lessons[f"{noise} {share:.0%}"] = TracedIntegers(length=length, noise=noise, contaminated=share)
        training = Training(
            steps=20_000 if self.full else 1500,
            batch=64,
            lr=1e-3 if self.full else 3e-3,
            warmup=50,
            decay="linear",
            measure_every=250,
        )
        shape = {"layers": 2, "heads": 4, "width": 64, "mlp": 256, "pos": "learned", "embed_std": 0.5}
        return {
            name: Condition(TinyConfig(**lesson.config(**shape)), lesson, training) for name, lesson in lessons.items()
        }
