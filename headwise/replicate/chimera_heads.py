"""Chimera: A Lossless Decoding Method for Accelerating Large Language Models Inference by Fusing all Tokens.
Zeng et al., 2024. arXiv:2402.15758

Row s033 of the mission. As for s101, with Chimera, and with copying from the text so far (CopySpec) as the drafter that
needs no training.
"""

from dataclasses import dataclass
from typing import ClassVar

from headwise.decode import Chimera, CopySpec
from headwise.replicate import Outcome, Replication, settle
from headwise.replicate.drafted_text import TREE, Trial, medusas, trial, writer


@dataclass(frozen=True)
class ChimeraHeads(Replication):
    """Tokens a pass by Medusa, Chimera and copying."""

    row: ClassVar[str] = "s033"
    claim: ClassVar[str] = "A trigram encoder fused with the model's own states drafts better than Medusa, losslessly."
    paper: ClassVar[str] = "2.7 times faster than decoding without drafts (Vicuna, LLaMA-2)"

    changed: ClassVar[str] = (
        "a first run had no deeper Medusa than one of 5 layers, with 9 % fewer weights in its heads than Chimera; "
        "since then one of 6 layers, which has 10 % more, is tried too."
    )

    largest_p: ClassVar[float] = 0.05
    least: ClassVar[float] = 1.5

    def run(self, seed: int = 0) -> Outcome:
        """Train and draft."""
        methods = medusas() | {"Chimera": Chimera(tree=TREE)}
        others = {"copying": CopySpec(near=0).drafter(writer(seed)[0])}
        return self._judge(trial(methods, others, seed, self.full, "s033"), seed)

    def _judge(self, found: Trial, seed: int) -> Outcome:
        best = found.best_of(medusas())
        p = found.p("Chimera", best, seed)
        checks = {
            "Chimera gains more tokens a pass than the best Medusa": found.mean("Chimera") > found.mean(best),
            f"the difference has p below {self.largest_p}": p < self.largest_p,
            "it gains more than copying": found.mean("Chimera") > found.mean("copying"),
            f"it gains at least {self.least} tokens a pass": found.mean("Chimera") >= self.least,
            "every text is that of greedy decoding without drafts": found.same,
        }
        weights = found.parameters
        measured = (
            f"{found.mean('Chimera'):.2f} tokens a pass with {weights['Chimera']:,} weights; "
            f"{len(found.per_pass['Chimera'])} prompts"
        )
        baseline = (
            f"{best} {found.mean(best):.2f} tokens a pass with {weights[best]:,} weights, copying "
            f"{found.mean('copying'):.2f}; 1 without drafts"
        )
        return settle(measured, baseline, checks, found.numbers() | {"p": p})
