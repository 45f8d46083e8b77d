"""Circuit Component Reuse Across Tasks in Transformer Language Models. Merullo, Eickhoff and Pavlick, 2023.
arXiv:2310.08744

Row s121 of the mission. Heads are weighed on indirect objects and on coloured objects by what is lost when each alone
writes what it writes on another prompt. The
default model does the second badly. Up to four heads of the first circuit are set to another strength, chosen on one
half of the prompts and measured on others; as many random heads of the same layers are set by the same rule.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from headwise.circuits import ComponentReuse as Method
from headwise.data import IOI, ColouredObjects
from headwise.do import Scale, do
from headwise.heads import Ablation
from headwise.models import open_model
from headwise.replicate import Outcome, Replication, settle
from headwise.replicate.runs import logits_of
from headwise.score import Score
from headwise.task import Batch


@dataclass(frozen=True)
class ComponentReuse(Replication):
    """Compares two tasks head by head, then repairs the one that the model does badly."""

    row: ClassVar[str] = "s121"
    claim: ClassVar[str] = "Two tasks share most of their heads, and setting four of them repairs the weaker one."
    paper: ClassVar[str] = "78 % of the heads are shared; 49.6 % to 93.7 % on coloured objects by setting four heads"
    changed: ClassVar[str] = (
        "after its first record the check on shared heads was put first, as it is the claim; heads were weighed by the "
        "gradient (attribution patching) before they were by exact patching; no threshold was moved"
    )

    candidates: ClassVar[int] = 10
    most_p: ClassVar[float] = 0.01
    least_shared: ClassVar[float] = 0.5
    least_rise: ClassVar[float] = 15.0

    def run(self, seed: int = 0) -> Outcome:
        """Overlap of the two circuits; accuracy with and without the repair on prompts that chose nothing."""
        model, tokenizer = open_model("default")
        n = 32 if self.full else 16
        weak = ColouredObjects()
        scores = [
            Ablation(value="resample", metric="logit_diff").score(model, task.make(tokenizer, n, seed))
            for task in (IOI(), weak)
        ]
        method = Method(seed=seed)
        reuse = method.compare(scores[0], scores[1])
        dev, held = weak.make(tokenizer, n, seed + 1), weak.make(tokenizer, 3 * n, seed + 2)
        heads = scores[0].top(self.candidates)
        beside = self._beside(scores[0], heads, seed)
        own, rival = (method.repair(model, dev, few) for few in (heads, beside))
        rates = [self._right(model, held, strengths) for strengths in ({}, own, rival)]
        return self._judge(reuse, own, rival, rates, len(held))

    def _beside(self, score: Score, heads: list[str], seed: int) -> list[str]:
        """A random other head of the same layer for each head."""
        draw, taken = random.Random(f"reuse {seed}"), set(heads)
        for name in heads:
            layer = name.split(".")[0] + "."
            pool = [u for u in score.table["unit"] if u.startswith(layer) and u not in taken]
            if pool:
                taken.add(draw.choice(pool))
        return sorted(taken.difference(heads))

    def _right(self, model: PreTrainedModel, batch: Batch, strengths: dict[str, float]) -> float:
        """Percent of prompts whose answer is the top token."""
        with torch.no_grad(), do(model, *[Scale(head, alpha) for head, alpha in strengths.items()]):
            said = logits_of(model, batch, 8).argmax(-1)
        return 100 * float((said == batch.answer[:, 0]).float().mean())

    def _judge(self, reuse, own: dict[str, float], rival: dict[str, float], rates: list[float], n: int) -> Outcome:
        checks = {
            f"at least {self.least_shared:.0%} of the first circuit's heads are in the second": reuse.shared
            >= self.least_shared,
            f"heads are worth alike in both tasks (p < {self.most_p})": reuse.p < self.most_p,
            f"setting at most four heads adds {self.least_rise:.0f} points": rates[1] - rates[0] >= self.least_rise,
            "random heads of the same layers, set by the same rule, add less": rates[1] > rates[2],
        }

        def said(strengths: dict[str, float]) -> str:
            return ", ".join(f"{head} x{alpha:g}" for head, alpha in strengths.items()) or "none"

        measured = (
            f"rank correlation {reuse.rank:.2f} (p = {reuse.p:.2g}), {reuse.shared:.0%} of the top "
            f"{len(reuse.first)} heads shared; {said(own)}: {rates[0]:.0f} % to {rates[1]:.0f} % of {n} held-out "
            "prompts"
        )
        baseline = f"shared at random {reuse.chance:.0%}; random heads ({said(rival)}) {rates[2]:.0f} %"
        numbers = {
            "rank": reuse.rank, "p": reuse.p, "shared": reuse.shared, "first": sorted(reuse.first),
            "second": sorted(reuse.second), "set": own, "set_at_random": rival, "right": rates, "held_out": n,
        }  # fmt: skip
        return settle(measured, baseline, checks, numbers)
