"""Pushing the Limits of Rule Reasoning in Transformers through Natural Language Satisfiability. Richardson and
Sabharwal, 2021. arXiv:2112.09054

Row s068 of the mission. Small encoders taught from nothing, where the paper fine-tunes T5; a rule is one position.
"""

from dataclasses import dataclass
from typing import ClassVar

from headwise.comparison import Condition
from headwise.data import Rules
from headwise.data.rules import KINDS
from headwise.experiment import Experiment
from headwise.tiny import TinyConfig
from headwise.training import Training


@dataclass(frozen=True)
class PhaseTransition(Experiment):
    """Teaches whether rules can all hold, on problems near the crossing or far from it.

    Fields:
        facts: what a problem is about.
        steps: of training; 40,000 with `full`.
    """

    row: ClassVar[str] = "s068"
    goal: ClassVar[tuple[str, str, float]] = ("accuracy", "above", 0.9)
    seeds: ClassVar[tuple[int, ...]] = (5,)

    facts: int = 5
    steps: int = 3000

    def conditions(self) -> dict[str, Condition]:
        """Names: "near" and "far"; with `full`, 8 facts, a wider network and more steps."""
        training = Training(
            steps=40_000 if self.full else self.steps,
            batch=64 if self.full else 48,
            lr=1e-3,
            optimiser="adamw",
            weight_decay=0.01,
            warmup=100,
            decay="cosine",
            clip=1.0,
            measure_every=1000,
            rows=1000,
        )
        shape = {"layers": 4 if self.full else 2, "heads": 4, "width": 192 if self.full else 96}
        found = {}
        for kind in KINDS:
            lesson = Rules(facts=8 if self.full else self.facts, kind=kind)
            config = TinyConfig(**lesson.config(**shape, mlp=4 * shape["width"]))
            found[kind] = Condition(config, lesson, training)
        return found
