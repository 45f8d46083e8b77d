"""InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory. Xiao et al., 2024.
arXiv:2402.04617

Row s044 of the mission. The model could read further than it is allowed to: the limit of 512 tokens stands for a model
that was trained no further, so that full attention can be the yardstick.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from tqdm.auto import tqdm

from headwise.cache.infllm import InfLLM
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
class Infllm(Replication):
    """Reads prompts of 2,000 tokens with 512 in sight, through InfLLM and through sinks with recent tokens."""

    row: ClassVar[str] = "s044"
    claim: ClassVar[str] = (
        "With a window of 512 tokens and blocks fetched from host memory, what stands far outside the window is found."
    )
    paper: ClassVar[str] = "models trained on a few thousand tokens match continually trained ones, up to 1,024K tokens"

    changed: ClassVar[str] = (
        "a first run had 128 recent tokens, nine blocks and four tokens to stand for each (two of four needles). Sizes "
        "were then chosen by eight needles of another seed: 64 recent tokens, eleven blocks and eight tokens to stand "
        "for each, within the same window."
    )

    window: ClassVar[int] = 512
    method: ClassVar[InfLLM] = InfLLM(sink=16, recent=64, block=32, blocks=11, chunk=32, representatives=8)
    sliding: ClassVar[Streaming] = Streaming(sink=16, recent=496)
    least_found: ClassVar[float] = 0.8
    most_without: ClassVar[float] = 10.0
    most_resident: ClassVar[float] = 0.25
    last: ClassVar[int] = 128

    def run(self, seed: int = 0) -> Outcome:
        """Needles in the first 60 % of the prompts, all out of the window's sight; `full` has three times as many."""
        model, tokenizer = open_model("default")
        method = self.method
        most = method.sink + method.recent + method.block + method.chunk + method.blocks * method.block
        assert most <= self.window
        n, texts = (12, 6) if self.full else (4, 2)
        needles = with_needle(Needle(length=2000, depths=(0.1, 0.25, 0.4, 0.55)).make(tokenizer, n, seed))
        prose = HeldOut(length=2000).make(tokenizer, texts, seed).ids
        units = kv_units(model)
        ways = {"full": {}, "infllm": dict.fromkeys(units, method), "sliding": dict.fromkeys(units, self.sliding)}
        found: dict[str, dict[str, Any]] = {}
        with fast_matmul(model), tqdm(total=len(ways) * (n + texts), desc="s044", disable=hidden(), leave=False) as bar:
            for name, treatments in ways.items():
                made = Made(model, treatments)
                answers = retrieval(model, tokenizer, needles, made, step=bar.update)
                assert made.last is not None
                resident, away = made.last.resident_bytes(), made.last.offloaded_bytes()
                losses = []
                for ids in prose:
                    losses.append(nats(last_logits(model, ids, made, self.last)[0], ids))
                    bar.update()
                found[name] = {
                    "right": 100 * answers.accuracy,
                    "tokens": 100 * float(answers.tokens.float().mean()),
                    "said": answers.said,
                    "resident": resident,
                    "offloaded": away,
                    "nats": sum(losses) / texts,
                }
        return self._judge(found, n)

    def _judge(self, found: dict, n: int) -> Outcome:
        full, ours, sliding = found.values()
        share = ours["right"] / full["right"] if full["right"] else 0.0
        resident = ours["resident"] / full["resident"]
        checks = {
            f"at least {100 * self.least_found:.0f} % of what full attention finds": share >= self.least_found,
            f"a sliding window with sinks finds at most {self.most_without:.0f} %": sliding["right"]
            <= self.most_without,
            f"at most {100 * self.most_resident:.0f} % of the cache resident": resident <= self.most_resident,
            "perplexity no higher than with the sliding window": ours["nats"] <= sliding["nats"],
        }
        measured = (
            f"{ours['right']:.0f} % of needles at 2,000 tokens ({ours['tokens']:.0f} % of their tokens, {n} prompts) "
            f"with {self.window} tokens in sight, {100 * resident:.0f} % of the cache resident, "
            f"{ours['nats']:.3f} nats a token"
        )
        baseline = (
            f"full attention {full['right']:.0f} % and {full['nats']:.3f} nats; sinks and sliding window of "
            f"the same size {sliding['right']:.0f} % ({sliding['tokens']:.0f} % of tokens), {sliding['nats']:.3f} nats"
        )
        return settle(measured, baseline, checks, found)
