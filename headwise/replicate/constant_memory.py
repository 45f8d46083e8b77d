"""Can Mamba Always Enjoy the "Free Lunch"? Ren et al., 2024. arXiv:2410.03810

Row s002 of the mission. The gated recurrence of HGRN2 stands in for Mamba; models have one layer, so that what is kept
of the past is one matrix. The part of the paper on chains of thought for dynamic programs is not tried.
"""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from headwise.comparison import Comparison
from headwise.data import Copying
from headwise.lab import ConstantMemory as Experiment
from headwise.replicate import Outcome, Replication, settle
from headwise.stats import spearman


@dataclass(frozen=True)
class ConstantMemory(Replication):
    """Copying by attention and by memories of several constant sizes, over lengths."""

    row: ClassVar[str] = "s002"
    claim: ClassVar[str] = (
        "A memory of constant size cannot copy beyond a length that grows with its size, where attention copies at any."
    )
    paper: ClassVar[str] = "theory: constant size may fail at COPY, a size linear in the length is enough"

    least_exact: ClassVar[float] = 0.99
    most_small: ClassVar[float] = 0.7
    enough: ClassVar[float] = 0.95
    least_order: ClassVar[float] = 0.9

    def run(self, seed: int = 0) -> Outcome:
        """One seed of every mixer at every length; three where `full`."""
        lab = Experiment(full=self.full)
        counts, slots = lab.sizes
        found = lab.run(tuple(seed + one for one in ((5, 6, 7) if self.full else lab.seeds)))
        right = found.last("accuracy")
        exact = {count: found.last("exact")[f"attention, {count} letters"] for count in counts}
        shares = {count: {size: right[f"{size} slots, {count} letters"] for size in slots} for count in counts}
        needed = {
            count: min((size for size, share in by.items() if share >= self.enough), default=inf)
            for count, by in shares.items()
        }
        return self._judge(found, exact, shares, needed)

    def _judge(
        self,
        found: Comparison,
        exact: dict[int, float],
        shares: dict[int, dict[int, float]],
        needed: dict[int, float],
    ) -> Outcome:
        counts, slots = list(shares), list(shares[min(shares)])
        few, most, fewest = min(slots), max(counts), list(needed.values())
        order = spearman(counts, fewest) if len(set(fewest)) > 1 else 0.0
        checks = {
            f"with {few} slots under {self.most_small:.0%} of {most} letters are right, and the fewest slots that give "
            f"{self.enough:.0%} never fall with length, with a rank correlation above {self.least_order}": shares[most][
                few
            ]
            < self.most_small
            and fewest == sorted(fewest)
            and order > self.least_order,
            f"attention copies {self.least_exact:.0%} of texts exactly at every length": min(exact.values())
            >= self.least_exact,
            f"as many slots as letters give {self.enough:.0%} at every length": all(
                needed[count] <= count for count in counts
            ),
        }
        table = "; ".join(
            f"{count} letters: " + ", ".join(f"{100 * share:.0f}" for share in by.values())
            for count, by in shares.items()
        )
        measured = (
            f"letters right in % with {', '.join(map(str, slots))} slots: {table}. Fewest slots for {self.enough:.0%}: "
            + ", ".join("more" if one == inf else str(one) for one in fewest)
        )
        baseline = "attention copies exactly " + ", ".join(f"{100 * v:.0f} % of {count}" for count, v in exact.items())
        numbers = {
            "right": shares,
            "exact with attention": exact,
            "fewest slots": {count: None if one == inf else one for count, one in needed.items()},
            "rank correlation": order,
            "a memory of as many letters": {
                count: {size: Copying(count=count).remembered(size) for size in slots} for count in counts
            },
            "looking at the source": {name: by[min(by)].heads("copying") for name, by in found.tapes.items()},
            "steps": {name: [tape.rows[-1][0] for tape in by.values()] for name, by in found.tapes.items()},
        }
        return settle(measured, baseline, checks, numbers)
