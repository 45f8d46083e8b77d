"""Dual Process Learning: Controlling Use of In-Context vs. In-Weights Strategies with Weight Forgetting. Anand et al.,
2024. arXiv:2406.00053

Row s138 of the mission. Scaled down: 1,000 words, two layers, Adam 1e-3. In 3 of 10 prompts the sentence is unclear,
which asks for knowing words by heart; where all are clear, so small a model reads them whatever is done to it. Words
that were never taught are drawn anew before every update; the readout would else learn never to say them.
"""

from dataclasses import dataclass
from typing import ClassVar

from headwise.comparison import Condition
from headwise.data import PartsOfSpeech
from headwise.experiment import Experiment
from headwise.resets import Reset
from headwise.schedule import When, every, steps
from headwise.tiny import TinyConfig
from headwise.training import Training


@dataclass(frozen=True)
class DualProcess(Experiment):
    """Trains an encoder on parts of speech, without forgetting, with it, and with forgetting for a time.

    Fields:
        words, zipf: of the lesson.
        forget: updates from one drawing of the words' embeddings to the next.
        until: when temporary forgetting ends.
    """

    row: ClassVar[str] = "s138"
    goal: ClassVar[tuple[str, str, float]] = ("loss", "below", 0.05)
    seeds: ClassVar[tuple[int, ...]] = (5, 6, 7)

    words: int = 1000
    zipf: float = 0.0
    forget: int = 5
    until: int = 1500

    def conditions(self) -> dict[str, Condition]:
        """Vanilla, active and temporary forgetting, all on the same prompts."""
        lesson = PartsOfSpeech(words=10_000 if self.full else self.words, zipf=self.zipf)
        config = TinyConfig(**lesson.config(layers=6 if self.full else 2))
        training = Training(
            steps=62_500 if self.full else 2000,
            batch=128 if self.full else 64,
            lr=1e-4 if self.full else 1e-3,
            measure_every=500 if self.full else 100,
            rows=512,
        )
        forget = every(1000 if self.full else self.forget)
        fresh = Reset("embed.weight", rows=lesson.unseen)

        def one(when: When | None) -> Condition:
            word = [Reset("embed.weight", when, rows=lesson.taught)] if when else []
            return Condition(config, lesson, training, [fresh, *word])

        return {
            "vanilla": one(None),
            "active forgetting": one(forget),
            "temporary forgetting": one(forget & steps(0, 20_000 if self.full else self.until)),
        }
