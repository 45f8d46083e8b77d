"""Clover: Regressive Lightweight Speculative Decoding with Sequential Knowledge. Xiao et al., 2024. arXiv:2405.00263

Row s116 of the mission. As for s101, with Clover, and with Clover's own heads that are not told the guessed tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

from headwise.decode import Clover
from headwise.replicate import Outcome, Replication, settle
from headwise.replicate.drafted_text import TREE, Trial, medusas, trial


@dataclass(frozen=True)
class CloverHeads(Replication):
    """Tokens a pass by Medusa, Clover, and Clover without its regressive connection."""

    row: ClassVar[str] = "s116"
    claim: ClassVar[str] = "Taking guessed tokens in by attention makes draft heads better than Medusa's."
    paper: ClassVar[str] = "up to 37 % (small model) and 57 % (large) more throughput than Medusa"

    changed: ClassVar[str] = (
        "a first run had no deeper Medusa than one of 5 layers, with 4 % fewer weights in its heads than Clover; since "
        "then one of 6 layers, which has 15 % more, is tried too."
    )

    largest_p: ClassVar[float] = 0.05
    least_lost: ClassVar[float] = 0.5

    def run(self, seed: int = 0) -> Outcome:
        """Train and draft."""
        methods = medusas() | {
            "Clover": Clover(tree=TREE),
            "without tokens": Clover(tree=TREE, regressive=False),
        }
        return self._judge(trial(methods, {}, seed, self.full, "s116"), seed)

    def _judge(self, found: Trial, seed: int) -> Outcome:
        best = found.best_of(medusas())
        gain, p = found.mean("Clover") - found.mean(best), found.p("Clover", best, seed)
        lost = (found.mean("Clover") - found.mean("without tokens")) / gain if gain > 0 else 0.0
        checks = {
            "Clover gains more tokens a pass than the best Medusa": gain > 0,
            f"the difference has p below {self.largest_p}": p < self.largest_p,
            f"without the regressive connection at least {self.least_lost:.0%} of that is lost": lost
            >= self.least_lost,
            "every text is that of greedy decoding without drafts": found.same,
        }
        weights = found.parameters
        measured = (
            f"{found.mean('Clover'):.2f} tokens a pass with {weights['Clover']:,} weights, "
            f"{found.mean('without tokens'):.2f} without the regressive connection; "
            f"{len(found.per_pass['Clover'])} prompts"
        )
        baseline = f"{best} {found.mean(best):.2f} tokens a pass with {weights[best]:,} weights; 1 without drafts"
        return settle(measured, baseline, checks, found.numbers() | {"gain": gain, "p": p, "lost": lost})
