"""Can Mamba Always Enjoy the "Free Lunch"? Ren et al., 2024. arXiv:2410.03810

Row s002 of the mission. In place of Mamba stands the gated recurrence of HGRN2 (arXiv:2404.07904): its memory too is a
matrix that fades by gates, and whose size does not depend on the length of the text.
"""

from dataclasses import dataclass
from typing import ClassVar

from headwise.comparison import Condition
from headwise.data import Copying
from headwise.experiment import Experiment
from headwise.schedule import after
from headwise.tiny import TinyConfig
from headwise.training import Training


@dataclass(frozen=True)
class ConstantMemory(Experiment):
    """Teaches copying to a head that attends, and to heads whose memory of the past has so many slots.

    Every model has one layer with one head and an MLP, and knows positions one by one. A slot holds a vector of as many
    numbers as there are slots.

    Fields:
        counts: letters that are copied.
        slots: of the heads with a constant memory.
        attending: channels of the head that attends.
    """

    row: ClassVar[str] = "s002"
    goal: ClassVar[tuple[str, str, float]] = ("accuracy", "above", 0.95)
    seeds: ClassVar[tuple[int, ...]] = (5,)

    counts: tuple[int, ...] = (8, 16, 32)
    slots: tuple[int, ...] = (4, 8, 16, 32)
    attending: int = 8

    @property
    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Counts and slots; with `full` both go to 128."""
        return ((16, 32, 64, 128), (16, 32, 64, 128)) if self.full else (self.counts, self.slots)

    def conditions(self) -> dict[str, Condition]:
        """Names: "attention, 8 letters", "4 slots, 8 letters" and so on."""
        counts, slots = self.sizes
        training = Training(
            steps=10_000 if self.full else 1000,
            batch=32,
            lr=5e-3,
            warmup=20,
            decay="cosine",
            measure_every=100,
            rows=128,
            until=after("exact", above=0.998),
        )
        found = {}
        for count in counts:
            lesson = Copying(count=count)
            for size in (0, *slots):
                config = TinyConfig(
                    **lesson.config(layers=1, heads=1, width=2 * count + 32, mlp=64, pos="onehot"),
                    head_dim=size or self.attending,
                    mixer={"name": "attention.hgrn2"} if size else None,
                )
                name = f"{size} slots" if size else "attention"
                found[f"{name}, {count} letters"] = Condition(config, lesson, training)
        return found
