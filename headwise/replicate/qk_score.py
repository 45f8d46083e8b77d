"""Listening to the Wise Few: Select-and-Copy Attention Heads for Multiple-Choice QA. Tulchinskii et al., 2024.
arXiv:2410.02343

Row s010 of the mission. For each head, the option whose end the last token's query matches best is the head's answer;
the head is chosen on development questions and answers others.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from headwise.data import MultipleChoice
from headwise.heads import SelectAndCopy, SelectAndCopyAttention
from headwise.models import open_model
from headwise.pattern import right_option
from headwise.progress import hidden
from headwise.replicate import Outcome, Replication, settle
from headwise.replicate.runs import logits_of
from headwise.score import Score
from headwise.stats import binomial_interval


@dataclass(frozen=True)
class QKScore(Replication):
    """Answers multiple-choice questions with one head's query-key products instead of the letter's logit."""

    row: ClassVar[str] = "s010"
    claim: ClassVar[str] = (
        "One head's query-key product with the options' ends answers better than the letters' logits."
    )
    paper: ClassVar[str] = "almost 60 points over the logits on a simple synthetic set, with models of 7B to 70B"

    least_gain: ClassVar[float] = 30.0

    def run(self, seed: int = 0) -> Outcome:
        """Development and held-out questions are two draws of the task with different seeds."""
        model, tokenizer = open_model("default")
        task = MultipleChoice()
        dev, held = task.make(tokenizer, 100, seed), task.make(tokenizer, 400 if self.full else 200, seed + 1)
        detectors = {"qk": SelectAndCopy(), "attention": SelectAndCopyAttention()}
        found: dict[str, dict] = {}
        tested: dict[str, Score] = {}
        with tqdm(total=4, desc="s010 heads", disable=hidden(), leave=False) as bar:
            for name, detector in detectors.items():
                chosen = detector.score(model, dev)
                bar.update()
                tested[name] = detector.score(model, held)
                bar.update()
                found[name] = self._figure(chosen, tested[name], len(held))
        letters = logits_of(model, held)[:, torch.tensor(held.about["letters"])].argmax(-1)
        plain = 100 * float((letters == right_option(held)).float().mean())
        mean_head = 100 * float(tested["qk"].table["value"].to_numpy().mean())
        return self._judge(found, plain, letters, mean_head, len(held))

    def _figure(self, chosen: Score, tested: Score, n: int) -> dict:
        """The head that is best on development questions, and what it gets of the held-out ones."""
        head = chosen.top(1)[0]
        low, high = binomial_interval(round(tested[head] * n), n)
        return {
            "head": head,
            "share": 100 * tested[head],
            "low": 100 * low,
            "high": 100 * high,
            "dev": 100 * chosen[head],
        }

    def _judge(self, found, plain: float, letters: Tensor, mean_head: float, n: int) -> Outcome:
        qk, attention = found["qk"], found["attention"]
        gain = qk["share"] - plain
        checks = {
            f"the query-key product beats the letters by at least {self.least_gain:.0f} points": gain
            >= self.least_gain,
            "attention weights lie between letters and query-key product": plain <= attention["share"] <= qk["share"],
        }
        measured = (
            f"{qk['head']} {qk['share']:.0f} % of {n} held-out questions ({qk['low']:.0f} to {qk['high']:.0f}), "
            f"{gain:+.0f} points; attention weights of {attention['head']} {attention['share']:.0f} %"
        )
        baseline = f"letters' logits {plain:.0f} %, mean of all heads {mean_head:.0f} %, chance 25 %"
        said = torch.bincount(letters, minlength=4).tolist()
        numbers = {**found, "letters": plain, "letters_said": said, "mean_head": mean_head, "held_out": n}
        return settle(measured, baseline, checks, numbers)
