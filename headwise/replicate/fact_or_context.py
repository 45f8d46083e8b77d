"""Characterizing Mechanisms for Factual Recall in Language Models. Yu et al., 2023. arXiv:2310.15910

Row s058 of the mission. The attribution of every head to (stated minus memorised capital) on development countries
gives a short list; scaling on the same countries picks the head; other countries give the figures.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from tqdm.auto import tqdm

from headwise.anatomy import anatomy
from headwise.data import CapitalsConflict
from headwise.do import Scale, do
from headwise.heads import ValueScaling
from headwise.models import open_model
from headwise.progress import hidden
from headwise.replicate import Outcome, Replication, settle
from headwise.replicate.runs import known_countries, neutral_nll, rates


@dataclass(frozen=True)
class FactOrContext(Replication):
    """Scales one head up and down and counts which of the two answers the model gives."""

    row: ClassVar[str] = "s058"
    claim: ClassVar[str] = (
        "Scaling the value vectors of one head decides whether the answer comes from context or memory."
    )
    paper: ClassVar[str] = "88 % in-context answers after scaling a single head"
    changed: ClassVar[str] = (
        "a first run listed five heads by direct attribution and got L23.H7 (72 % to 86 %, 59 % at x0; fails "
        "as well); now the room's own method tries the twelve largest on development countries. From 72 % a "
        "rise of 30 points is out of reach."
    )

    least_flip: ClassVar[float] = 30.0
    most_neutral: ClassVar[float] = 0.05
    most_random: ClassVar[float] = 5.0
    alphas: ClassVar[tuple[float, float]] = (3.0, 0.0)

    def run(self, seed: int = 0) -> Outcome:
        """Held-out countries never take part in choosing the head."""
        model, tokenizer = open_model("default")
        known = known_countries(model, tokenizer, seed)
        dev, held = (CapitalsConflict(countries=known[i::2]).make(tokenizer, len(known[i::2]), seed) for i in (0, 1))
        tried = ValueScaling(alpha=self.alphas[0]).score(model, dev)
        head = tried.top(1)[0]
        others = random.Random(f"random heads {seed}").sample(
            [unit for unit in anatomy(model).units() if unit != head], 24 if self.full else 8
        )
        with tqdm(total=2 * len(others) + 5, desc="s058 scaling", disable=hidden(), leave=False) as bar:
            before = rates(model, held)
            up, down = (self._scaled(model, held, head, alpha) for alpha in self.alphas)
            bar.update(3)
            random_shifts = []
            for unit in others:
                for alpha in self.alphas:
                    random_shifts.append(self._scaled(model, held, unit, alpha)["stated"] - before["stated"])
                    bar.update()
            calm = neutral_nll(model, tokenizer)
            with do(model, Scale(head, self.alphas[0])):
                shaken = neutral_nll(model, tokenizer)
        extra = {"dev_change": 100 * tried[head], "known_countries": len(known)}
        return self._judge(head, before, up, down, random_shifts, shaken - calm, len(held), extra)

    def _scaled(self, model, batch, unit: str, alpha: float) -> dict:
        with do(model, Scale(unit, alpha)):
            return rates(model, batch)

    def _judge(self, head, before, up, down, random_shifts, neutral, n, extra) -> Outcome:
        rise, fall = up["stated"] - before["stated"], before["stated"] - down["stated"]
        random_mean = sum(map(abs, random_shifts)) / len(random_shifts)
        checks = {
            f"scaling up adds at least {self.least_flip:.0f} points of in-context answers": rise >= self.least_flip,
            f"scaling to 0 takes at least {self.least_flip:.0f} points of them": fall >= self.least_flip,
            f"neutral text loses at most {self.most_neutral} nats a token": neutral <= self.most_neutral,
            f"random heads move the rate by at most {self.most_random:.0f} points on average": random_mean
            <= self.most_random,
        }
        measured = (
            f"{head} x{self.alphas[0]:.0f}: in-context answers {before['stated']:.0f} % to {up['stated']:.0f} %; x0: "
            f"{down['stated']:.0f} % (memorised {before['memorised']:.0f} % to {down['memorised']:.0f} %); "
            f"neutral text "
            f"{neutral:+.3f} nats; {n} held-out countries"
        )
        baseline = (
            f"{len(random_shifts) // 2} random heads, x3 and x0: mean shift {random_mean:.1f} points, largest "
            f"{max(map(abs, random_shifts)):.0f}"
        )
        numbers = {
            "head": head,
            "before": {k: before[k] for k in ("stated", "memorised")},
            "up": {k: up[k] for k in ("stated", "memorised")},
            "down": {k: down[k] for k in ("stated", "memorised")},
            "neutral_nats": neutral,
            "random_shifts": random_shifts,
            "held_out": n,
            **extra,
        }
        return settle(measured, baseline, checks, numbers)
