"""Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical Reasoning Learning of Language
Models. Chen et al., 2024. arXiv:2403.02178

Row s023 of the mission. Small decoders taught from nothing on as few problems as leave something to gain, where the
paper fine-tunes Llama. As in the paper the share of masks rises from 0 in the course of training.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from headwise.comparison import Condition
from headwise.data import MaskedThought
from headwise.experiment import Experiment
from headwise.resets import Switch
from headwise.schedule import steps
from headwise.tiny import TinyConfig
from headwise.training import Training

# The share of masks rises in so many stages.
STAGES = 8


@dataclass(frozen=True)
class MaskedSteps(Experiment):
    """Teaches arithmetic step by step, with and without masks over the steps that are read.

    Fields:
        masked: shares of the steps, one condition each; the first is what the others are compared with.
        problems: of the lesson; fewer leave more to be found out.
        rising: the part of training in which the share of masks rises.
    """

    row: ClassVar[str] = "s023"
    goal: ClassVar[tuple[str, str, float]] = ("loss", "below", 1.0)
    seeds: ClassVar[tuple[int, ...]] = (5, 6, 7, 8, 9)

    masked: tuple[float, ...] = (0.0, 0.2)
    problems: int = 3000
    rising: float = 2 / 3

    def conditions(self) -> dict[str, Condition]:
        """Names: "masked 0%" and so on; with `full`, 0, 20 and 40%, longer problems and ten times the steps."""
        training = Training(
            steps=20_000 if self.full else 2000,
            batch=64 if self.full else 48,
            lr=1e-3 if self.full else 2e-3,
            optimiser="adamw",
            weight_decay=0.1,
            warmup=100,
            decay="linear",
            measure_every=500,
        )
        shape = {"layers": 2, "heads": 4, "width": 64, "mlp": 256, "pos": "learned", "embed_std": 0.5}
        found = {}
        for share in (0.0, 0.2, 0.4) if self.full else self.masked:
            lesson = MaskedThought(masked=share, problems=self.problems, length=10 if self.full else 6)
            rise = self._rise(lesson, int(self.rising * training.steps)) if share else []
            found[f"masked {share:.0%}"] = Condition(TinyConfig(**lesson.config(**shape)), lesson, training, rise)
        return found

    def _rise(self, lesson: MaskedThought, end: int) -> list[Switch]:
        """The same lesson with fewer masks, in stages up to this step."""
        ends = [end * i // STAGES for i in range(STAGES + 1)]
        return [
            Switch(replace(lesson, masked=lesson.masked * i / STAGES), steps(*ends[i : i + 2])) for i in range(STAGES)
        ]
