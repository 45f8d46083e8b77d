"""Experiment: conditions under which small models are trained with paired seeds, as one file of the lab room."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from headwise.comparison import Comparison, Condition, Goal, compare
from headwise.growth import Grown, grown_heads
from headwise.method import Method
from headwise.training import Training, Watch

# The shape of a small GPT-2, at which papers train on functions in context.
GPT2 = {"layers": 12, "heads": 8, "width": 256, "mlp": 1024}


@dataclass(frozen=True)
class Experiment(Method):
    """Base of the lab room.

    Fields:
        full: as large as in the paper, for hours instead of minutes.

    Class attributes:
        goal: (metric, "below" or "above", bound): when a run is said to be done.
        seeds: that are used by default.
    """

    full: bool = False

    goal: ClassVar[Goal] = ("loss", "below", 0.1)
    seeds: ClassVar[tuple[int, ...]] = (5, 6, 7)

    def conditions(self) -> dict[str, Condition]:
        """Everything that is trained, by name; the first is what the others are compared with."""
        raise TypeError(f"{type(self).__name__} does not say what is trained.")

    def run(
        self,
        seeds: "Sequence[int] | None" = None,
        folder: "Path | str | None" = None,
        only: "Sequence[str] | None" = None,
        processes: int = 1,
        watch: Watch | None = None,
    ) -> Comparison:
        """Train its conditions, or some of them.

        Args:
            seeds: by default the experiment's own.
            folder: where runs are kept; what is there already goes on.
            only: names of conditions, in the order of comparison.
            processes: runs at a time.
            watch: shown every run after each of its measurements. See `train`.

        Raises:
            ValueError: a condition that there is not.
        """
        paired = tuple(seeds or self.seeds)
        return compare(self.chosen(only), seeds=paired, folder=folder, processes=processes, watch=watch, goal=self.goal)

    def chosen(self, only: "Sequence[str] | None" = None) -> dict[str, Condition]:
        """Its conditions, or those named. Raises ValueError for one that there is not."""
        every = self.conditions()
        for name in only or ():
            if name not in every:
                raise ValueError(f"{type(self).__name__} has no condition {name!r}; it has {', '.join(every)}.")
        return {name: every[name] for name in only or every}

    def grown(self, found: Comparison) -> list[Grown]:
        """Induction heads that grew, of runs that have a folder; their atlases keep the claims. See `grown_claims`."""
        return grown_heads(found.runs)

    def summary(self, found: Comparison) -> list[dict[str, Any]]:
        """One row a condition: when it was done, how much sooner than the first, and the last loss and accuracy."""
        metric, side, bound = self.goal
        loss, accuracy = found.last("loss"), found.last("accuracy", missing=None)
        return [
            {**one.row(), "loss": loss[one.name], "accuracy": accuracy[one.name]}
            for one in found.time_to(metric, **{side: bound})
        ]


def in_context(steps: int, full: bool) -> Training:
    """How functions are learned in context: at the rate of the papers' GPT-2, or at one that suits minutes."""
    return Training(
        steps=steps,
        batch=64 if full else 32,
        lr=1e-4 if full else 2e-3,
        warmup=100,
        decay="cosine",
        clip=1.0,
        measure_every=500,
        rows=256,
    )
