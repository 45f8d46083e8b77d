"""Make Your LLM Fully Utilize the Context. An et al., 2024. arXiv:2404.16811

Row s150 of the mission. Small models trained from scratch on keys with values, in place of a fine-tuned one of 7B.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from headwise.comparison import Condition
from headwise.data import AnswerAnywhere
from headwise.experiment import Experiment
from headwise.lesson import generator
from headwise.task import answer_logits
from headwise.tiny import TinyConfig
from headwise.training import Training


@dataclass(frozen=True)
class WholeContext(Experiment):
    """Asks in training for answers anywhere, only at both ends or only at the start, and later for all places.

    Fields:
        way: "forward", "backward" or "both"; see `AnswerAnywhere`.
    """

    row: ClassVar[str] = "s150"
    goal: ClassVar[tuple[str, str, float]] = ("loss", "below", 0.5)
    seeds: ClassVar[tuple[int, ...]] = (5,)

    way: str = "forward"

    def conditions(self) -> dict[str, Condition]:
        """Names: "uniform", "ends" and "start", what is asked for in training."""
        found = {}
        for asked in ("uniform", "ends", "start"):
            size = {"pairs": 64, "symbols": 128, "questions": 8} if self.full else {}
            lesson = AnswerAnywhere(asked=asked, way=self.way, **size)
            training = Training(
                steps=20_000 if self.full else 3000,
                batch=64,
                lr=1e-3 if self.full else 2e-3,
                warmup=100,
                decay="linear",
                measure_every=250,
            )
            config = TinyConfig(**lesson.config(layers=2, heads=4, width=64, mlp=0, embed_std=0.5))
            found[asked] = Condition(config, lesson, training)
        return found


def accuracy_by_place(model: PreTrainedModel, lesson: AnswerAnywhere, rows: int = 2000, seed: int = 0) -> list[float]:
    """Share of right answers at each place of the context, first to last, on fresh prompts that ask for all alike."""
    batch = replace(lesson, split="anywhere").draw(rows, generator(seed, 150))
    with torch.no_grad():
        right = torch.cat([answer_logits(model, part).argmax(-1) == part.answer for part in batch.chunks(256)])
    return lesson.by_place(right, batch)
