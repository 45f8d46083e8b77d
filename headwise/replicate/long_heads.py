"""LongHeads: Multi-Head Attention is Secretly a Long Context Processor. Lu et al., 2024. arXiv:2402.10685

Row s115 of the mission. The model could read further than it is allowed to: the limit of 512 tokens stands for a model
that was trained no further, so that full attention can be the yardstick.
"""

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

from tqdm.auto import tqdm

from headwise.cache.longheads import NONE, Chunks, LongHeads
from headwise.cache.streaming import Streaming
from headwise.data import HeldOut, Needle
from headwise.kv_cache import kv_units
from headwise.matmul import fast_matmul
from headwise.models import open_model
from headwise.progress import hidden
from headwise.recall import retrieval
from headwise.replicate import Outcome, Replication, settle
from headwise.replicate.far import Made, last_logits, nats
from headwise.task import with_needle


@dataclass(frozen=True)
class LongHeadsClaim(Replication):
    """Reads prompts of 2,000 tokens while each head sees 512 of them, laid side by side."""

    row: ClassVar[str] = "s115"
    claim: ClassVar[str] = (
        "Heads that each choose chunks of their own within a window of 512 tokens find what stands far outside of it."
    )
    paper: ClassVar[str] = "a usable context beyond the trained one without training; passkeys found at 128k tokens"

    changed: ClassVar[str] = (
        "A first run asked for passkeys of words at random depths: full attention found 3 of 4, LongHeads 1 of 4, and "
        "one stood inside the sliding window. Now they are five digits in the first 60 % of the prompt."
    )

    window: ClassVar[int] = 512
    method: ClassVar[LongHeads] = LongHeads(chunk=32, chunks=15, together=16)
    sliding: ClassVar[Streaming] = Streaming(sink=16, recent=496)
    least_found: ClassVar[float] = 80.0
    most_without: ClassVar[float] = 10.0
    most_perplexity: ClassVar[float] = 1.1
    most_alike: ClassVar[float] = 0.7
    last: ClassVar[int] = 128

    def run(self, seed: int = 0) -> Outcome:
        """Passkeys at 2,000 tokens, and the last 128 tokens of texts; `full` has three times as many."""
        model, tokenizer = open_model("default")
        method = self.method
        assert method.chunks * method.chunk + method.together <= self.window
        n, texts = (12, 6) if self.full else (4, 2)
        passkeys = with_needle(Needle(length=2000, depths=(0.1, 0.25, 0.4, 0.55)).make(tokenizer, n, seed))
        prose = HeldOut(length=4 * self.window).make(tokenizer, texts, seed).ids
        units = kv_units(model)
        ways = {"full": {}, "longheads": dict.fromkeys(units, method), "sliding": dict.fromkeys(units, self.sliding)}
        found: dict[str, dict[str, Any]] = {}
        total = len(ways) * (n + texts) + texts
        with fast_matmul(model), tqdm(total=total, desc="s115", disable=hidden(), leave=False) as bar:
            inside = []
            for ids in prose:
                inside.append(nats(last_logits(model, ids[-self.window :], Made(model, {}), self.last)[0], ids))
                bar.update()
            for name, treatments in ways.items():
                made = Made(model, treatments)
                answers = retrieval(model, tokenizer, passkeys, made, step=bar.update)
                alike = self._alike(made)
                losses = []
                for ids in prose:
                    losses.append(nats(last_logits(model, ids, made, self.last)[0], ids))
                    bar.update()
                found[name] = {
                    "right": 100 * answers.accuracy,
                    "tokens": 100 * float(answers.tokens.float().mean()),
                    "said": answers.said,
                    "nats": sum(losses) / texts,
                    "alike": alike,
                }
        return self._judge(found, sum(inside) / texts, n)

    def _alike(self, made: Made) -> dict[str, float]:
        """Mean Jaccard index of what two heads of a layer read for the last token; and without what all must read."""
        found: dict[str, list[float]] = {"all": [], "free": []}
        for store in made.stores(Chunks):
            for row in store.chosen:
                heads = [set(one.tolist()) - {NONE} for one in row]
                forced = set.intersection(*heads) & {0, max(heads[0])}
                for name, less in (("all", set()), ("free", forced)):
                    pairs = combinations([one - less for one in heads], 2)
                    found[name] += [len(a & b) / len(a | b) for a, b in pairs if a | b]
        return {name: sum(values) / len(values) for name, values in found.items() if values}

    def _judge(self, found: dict, inside: float, n: int) -> Outcome:
        full, ours, sliding = found.values()
        ratio = math.exp(ours["nats"] - inside)
        checks = {
            f"at least {self.least_found:.0f} % of the passkeys": ours["right"] >= self.least_found,
            f"a sliding window with sinks finds at most {self.most_without:.0f} %": sliding["right"]
            <= self.most_without,
            f"perplexity at four windows at most {self.most_perplexity} times that of the same tokens in one": ratio
            <= self.most_perplexity,
            f"mean Jaccard index of the chunks of two heads below {self.most_alike}": ours["alike"]["all"]
            < self.most_alike,
        }
        measured = (
            f"{ours['right']:.0f} % of passkeys at 2,000 tokens ({ours['tokens']:.0f} % of their tokens, {n} prompts) "
            f"with {self.window} tokens in sight of a head, perplexity {ratio:.2f} times that in one window, Jaccard "
            f"{ours['alike']['all']:.2f} ({ours['alike']['free']:.2f} without the chunks that all must read)"
        )
        baseline = (
            f"full attention {full['right']:.0f} %; sinks and sliding window of the same size {sliding['right']:.0f} % "
            f"({sliding['tokens']:.0f} % of tokens) and {math.exp(sliding['nats'] - inside):.2f} times"
        )
        return settle(measured, baseline, checks, {"ways": found, "inside": inside})
