"""What needs to go right for an induction head? A mechanistic study of in-context learning circuits and their
formation. Singh et al., 2024. arXiv:2404.07129

Row s001 of the mission. Scaled down: random vectors in place of images, 64 channels, Adam 2e-4, minutes on a CPU.
"""

from dataclasses import dataclass, replace
from math import log
from typing import ClassVar

from headwise.comparison import Condition
from headwise.data import FewShotLabels
from headwise.edits import Edit, Pass, copied, pattern, value_of
from headwise.experiment import Experiment
from headwise.schedule import after
from headwise.tiny import TinyConfig
from headwise.training import Training

CLAMPS = ("none", "previous token", "first layer", "copy", "first layer and copy", "match")
SURPRISES = ("previous token", "previous token, three heads", "previous token, all heads")
# What is left to learn when all else is held: to copy ("match"), and to match ("first layer and copy").
ALONE = ("match", "first layer and copy")


@dataclass(frozen=True)
class ClampedInduction(Experiment):
    """Holds one part of an induction circuit perfect while the rest is trained, and sees how much sooner it forms.

    Fields:
        live: the head of the second layer that may work; the others are held at 0. In "all heads" all of them work.
    """

    row: ClassVar[str] = "s001"
    goal: ClassVar[tuple[str, str, float]] = ("loss", "below", 0.4 * log(2))

    live: int = 3

    def clamps(self) -> dict[str, list[Edit]]:
        """The edits of every clamp; as progress measures they are the same objects."""
        alone = Edit("L1.z", 0.0, spare=(self.live,))
        # The first layer held perfect: each key holds the token before it, queries and values what was read.
        before = Pass("L1.k", [Edit("L1.resid_pre", value_of("L0.resid_pre", along="previous"))])
        layer = [Edit("L1.resid_pre", value_of("L0.resid_pre")), Edit("L1.k", before)]
        copy = [Edit("logits", copied(f"L1.H{self.live}"))]

        def previous(heads: int) -> list[Edit]:
            return [Edit("L0.pattern", pattern("previous"), heads=tuple(range(heads)))]

        parts = {
            "none": [],
            "previous token": previous(1),
            "first layer": layer,
            "copy": copy,
            "first layer and copy": [*layer, *copy],
            "match": [Edit("L1.pattern", pattern("match"), heads=(self.live,))],
            "previous token, three heads": previous(3),
            "previous token, all heads": previous(8),
        }
        return {name: [alone, *edits] for name, edits in parts.items()}

    def conditions(self) -> dict[str, Condition]:
        """The clamps; "15 labels", unclamped and with all but one part held; "all heads", until all is learned."""
        lesson = FewShotLabels(dim=512, classes=50) if self.full else FewShotLabels()
        training = Training(
            steps=31_250 if self.full else 4000,
            lr=1e-5 if self.full else 2e-4,
            measure_every=100 if self.full else 25,
            rows=128,
            until=after(self.goal[0], below=self.goal[2]),
        )
        config = TinyConfig(**lesson.config(layers=2, heads=8, width=64))
        found = {name: Condition(config, lesson, training, edits) for name, edits in self.clamps().items()}
        more = replace(lesson, labels=15)
        wider = TinyConfig(**more.config(layers=2, heads=8, width=64))
        found["15 labels"] = Condition(wider, more, training, self.clamps()["none"])
        for name in ALONE:
            found[f"{name}, 15 labels"] = Condition(wider, more, training, self.clamps()[name])
        longer = replace(training, until=None, measure_every=100, rows=256)
        found["all heads"] = Condition(config, lesson, longer)
        return found
