"""Retrieval Head Mechanistically Explains Long-Context Factuality. Wu et al., 2024. arXiv:2404.15574

Row s066 of the mission. Retrieval scores come from needles of one seed; taking the best heads away is measured on
needles of another, beside random heads of the same layers that retrieve nothing.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headwise.data import Needle, RepeatedTokens
from headwise.do import Zero, do
from headwise.heads import Induction, Retrieval
from headwise.models import open_model
from headwise.progress import hidden
from headwise.replicate import Outcome, Replication, settle
from headwise.replicate.runs import whole_answers
from headwise.score import Score
from headwise.stats import spearman
from headwise.task import Batch, with_needle


@dataclass(frozen=True)
class RetrievalHeads(Replication):
    """Scores retrieval, then masks the ten best heads and ten random ones."""

    row: ClassVar[str] = "s066"
    claim: ClassVar[str] = "A few heads copy the needle out of a long context, and without them it is not found."
    paper: ClassVar[str] = "under 5 % of heads score above 0.1; masking them breaks retrieval, masking others does not"

    masked: ClassVar[int] = 10
    threshold: ClassVar[float] = 0.1
    most_heads: ClassVar[float] = 0.1
    least_drop: ClassVar[float] = 50.0
    most_random: ClassVar[float] = 10.0
    least_rank: ClassVar[float] = 0.8

    def run(self, seed: int = 0) -> Outcome:
        """Scores at two lengths with different prose; drops on prompts that neither has seen."""
        model, tokenizer = open_model("default")
        n = 18 if self.full else 9
        held = with_needle(Needle(length=500).make(tokenizer, 2 * n, seed + 2))
        draws = 5 if self.full else 3
        with tqdm(total=4 + draws, desc="s066 needles", disable=hidden(), leave=False) as bar:
            scores = []
            for length, at in ((500, seed), (900, seed + 1)):
                scores.append(Retrieval().score(model, Needle(length=length).make(tokenizer, n, at)))
                bar.update()
            best = scores[0].top(self.masked)
            whole = self._found(model, held, [])
            bar.update()
            without = self._found(model, held, best)
            bar.update()
            at_random = []
            for draw in range(draws):
                at_random.append(self._found(model, held, self._others(scores[0], best, f"{seed} {draw}")))
                bar.update()
        induction = Induction().score(model, RepeatedTokens(length=50).make(tokenizer, 8, seed))
        return self._judge(scores, induction, best, whole, without, at_random, len(held))

    def _found(self, model: PreTrainedModel, batch: Batch, units: list[str]) -> float:
        """Percent of needles said in full, without these heads."""
        with do(model, *[Zero(unit) for unit in units]):
            return 100 * float(whole_answers(model, batch).float().mean())

    def _others(self, score: Score, best: list[str], seed: str) -> list[str]:
        """As many heads of the same layers, none above the threshold; of any layer where a layer has none left."""
        draw, taken = random.Random(f"retrieval {seed}"), []
        quiet = [u for u in score.table["unit"].to_list() if score[u] <= self.threshold and u not in best]
        for unit in best:
            left = [u for u in quiet if u not in taken]
            beside = [u for u in left if u.split(".")[0] == unit.split(".")[0]]
            taken.append(draw.choice(beside or left))
        return taken

    def _judge(self, scores, induction: Score, best, whole, without, at_random, n: int) -> Outcome:
        values = scores[0].table["value"].to_numpy()
        above = int((values > self.threshold).sum())
        share = above / len(values)
        rank = spearman(values, scores[1].table["value"].to_numpy())
        alike = set(induction.top(self.masked))
        jaccard = len(alike & set(best)) / len(alike | set(best))
        drop, worst = whole - without, whole - sum(at_random) / len(at_random)
        checks = {
            f"without the top {self.masked} heads accuracy falls by at least {self.least_drop:.0f} points": drop
            >= self.least_drop,
            f"without {self.masked} random heads it falls by at most {self.most_random:.0f}": worst <= self.most_random,
            f"at most {100 * self.most_heads:.0f} % of heads score above {self.threshold}": share <= self.most_heads,
            f"rank correlation between lengths and texts above {self.least_rank}": rank > self.least_rank,
        }
        measured = (
            f"{above} of {len(values)} heads ({100 * share:.0f} %) above {self.threshold}; needles found "
            f"{whole:.0f} %, "
            f"without the top {self.masked} {without:.0f} % ({n} held-out); rank correlation {rank:.2f}; "
            f"Jaccard with induction heads {jaccard:.2f}"
        )
        baseline = (
            f"without {self.masked} random heads of the same layers {sum(at_random) / len(at_random):.0f} % "
            f"({len(at_random)} draws, lowest {min(at_random):.0f} %)"
        )
        numbers = {
            "best": {unit: scores[0][unit] for unit in best},
            "above": above,
            "found": {"whole": whole, "without": without, "random": at_random},
            "rank_correlation": rank,
            "jaccard_induction": jaccard,
            "held_out": n,
        }
        return settle(measured, baseline, checks, numbers)
