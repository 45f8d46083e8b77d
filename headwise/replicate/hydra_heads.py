"""Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding. Ankner et al., 2024. arXiv:2402.05109

Row s101 of the mission. Heads are trained for a small writer of text for the same steps on the same self-written texts.
Medusa has one run as the paper has it and one with as many weights as Hydra; the better one is what Hydra must beat.
Tokens gained in a pass are measured, not time.
"""

from dataclasses import dataclass
from typing import ClassVar

from headwise.decode import Hydra, HydraPlus, Medusa
from headwise.replicate import Outcome, Replication, settle
from headwise.replicate.drafted_text import TREE, Trial, trial


@dataclass(frozen=True)
class HydraHeads(Replication):
    """Tokens a pass by Medusa, Hydra and Hydra++ on held-out prompts."""

    row: ClassVar[str] = "s101"
    claim: ClassVar[str] = "Draft heads that know the tokens guessed before theirs guess better, and no text changes."
    paper: ClassVar[str] = "Hydra++ 1.31 times Medusa's throughput, 2.71 times decoding without drafts"

    least_gain: ClassVar[float] = 1.1
    largest_p: ClassVar[float] = 0.05

    def run(self, seed: int = 0) -> Outcome:
        """Train and draft."""
        methods = {
            "Medusa": Medusa(tree=TREE),
            "Medusa, as many weights": Medusa(tree=TREE, layers=7),
            "Hydra": Hydra(tree=TREE),
            "Hydra++": HydraPlus(tree=TREE),
        }
        return self._judge(trial(methods, {}, seed, self.full, "s101"), seed)

    def _judge(self, found: Trial, seed: int) -> Outcome:
        best = max(("Medusa", "Medusa, as many weights"), key=found.mean)
        gain, p = found.mean("Hydra") / found.mean(best), found.p("Hydra", best, seed)
        checks = {
            f"Hydra gains at least {self.least_gain} times the tokens a pass of the better Medusa": gain
            >= self.least_gain,
            f"the difference has p below {self.largest_p}": p < self.largest_p,
            "every text is that of greedy decoding without drafts": found.same,
            "Hydra++ gains at least as many as Hydra": found.mean("Hydra++") >= found.mean("Hydra"),
        }
        rest = ", ".join(f"{100 * share:.0f}" for share in found.accuracy["Hydra"])
        medusa = ", ".join(f"{100 * share:.0f}" for share in found.accuracy[best])
        measured = (
            f"{found.mean('Hydra'):.2f} tokens a pass with Hydra ({gain:.2f} times Medusa), "
            f"{found.mean('Hydra++'):.2f} with Hydra++; guesses right in {rest} %; "
            f"{len(found.per_pass['Hydra'])} prompts"
        )
        baseline = (
            f"Medusa {found.mean(best):.2f} tokens a pass ({best}), guesses right in {medusa} %; 1 without drafts"
        )
        return settle(measured, baseline, checks, found.numbers() | {"gain": gain, "p": p})
