"""What Algorithms can Transformers Learn? A Study in Length Generalization. Zhou et al., 2023. arXiv:2310.16028

Row s048 of the mission. Positions are learned and prompts begin anywhere among them, as in the paper, unless rotary
ones with slow turns are asked for.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from headwise.comparison import Condition
from headwise.data import LengthLesson
from headwise.data.rasp_programs import TASKS
from headwise.experiment import Experiment
from headwise.tiny import TinyConfig
from headwise.training import Training


@dataclass(frozen=True)
class LengthGeneralization(Experiment):
    """Teaches algorithmic tasks on short prompts, with and without a short RASP-L program, and tests them on long ones.

    Fields:
        longest: items of the longest prompts that are taught.
        tested: items of those that are tested.
        steps: of training, twice as many where hints are written; 20,000 of all with `full`.
        positions: "learned" with prompts that begin anywhere, as in the paper, or "rope".
    """

    row: ClassVar[str] = "s048"
    goal: ClassVar[tuple[str, str, float]] = ("exact", "above", 0.95)
    seeds: ClassVar[tuple[int, ...]] = (5,)

    longest: int = 10
    tested: int = 20
    steps: int = 2000
    positions: str = "learned"

    def conditions(self) -> dict[str, Condition]:
        """One a task, by its name; with `full`, 20 items are taught and 40 tested. Hints take longer to learn."""
        lengths = {"longest": 20, "tested": 40} if self.full else {"longest": self.longest, "tested": self.tested}
        training = Training(
            steps=20_000 if self.full else self.steps,
            batch=64 if self.full else 32,
            lr=1e-3 if self.full else 2e-3,
            warmup=100,
            decay="linear",
            clip=1.0,
            measure_every=500,
            rows=200,
        )
        shape = {"layers": 4 if self.full else 3, "heads": 4, "width": 64, "mlp": 128, "rope_theta": 1e5}
        found = {}
        for task in TASKS:
            lesson = LengthLesson(task=task, **lengths, offsets=self.positions == "learned")
            config = TinyConfig(**lesson.config(**shape, pos=self.positions, embed_std=0.5))
            longer = not self.full and task.endswith("with hints")
            found[task] = Condition(config, lesson, replace(training, steps=2 * self.steps) if longer else training)
        return found
