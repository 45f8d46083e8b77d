"""DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads.
Xiao et al., 2024. arXiv:2410.10819

Row s104 of the mission. Gates are trained on short synthetic passkeys; needles in longer prose, which no gate has seen,
are then answered through a real cache in two parts, and so is held-out text.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headwise.attach import caching
from headwise.cache import Duo
from headwise.data import HeldOut, Needle, Passkeys
from headwise.heads import DuoGate
from headwise.kv_cache import kv_units
from headwise.matmul import fast_matmul
from headwise.models import open_model
from headwise.narrow import Window, alone, streaming
from headwise.progress import hidden
from headwise.recall import perplexity, retrieval
from headwise.replicate import Outcome, Replication, settle
from headwise.task import Batch, with_needle


@dataclass(frozen=True)
class DuoAttention(Replication):
    """Trains gates, keeps half of the KV heads full, and asks for needles through the cache."""

    row: ClassVar[str] = "s104"
    claim: ClassVar[str] = (
        "Full memory in the half of the KV heads that trained gates leave open keeps what full memory in all finds."
    )
    paper: ClassVar[str] = (
        "50 % of KV heads full for grouped-query models, without loss on needles; 1.67 times less memory"
    )

    changed: ClassVar[str] = (
        "needles at depth 0.9 stood among the 256 latest tokens, where streaming heads see them too (1 of 9 was found "
        "with all heads streaming); depths are now 0.1 to 0.8."
    )

    length: ClassVar[int] = 2000
    depths: ClassVar[tuple[float, ...]] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    share: ClassVar[float] = 0.5
    least_kept: ClassVar[float] = 0.95
    least_random: ClassVar[float] = 30.0
    most_streaming: ClassVar[float] = 10.0
    most_nats: ClassVar[float] = 0.02
    most_bytes: ClassVar[float] = 0.6
    most_apart: ClassVar[float] = 1e-4

    def run(self, seed: int = 0) -> Outcome:
        """Gates come from passkeys of another seed and length; needles and text are the same for every cache."""
        model, tokenizer = open_model("default")
        train = Passkeys(length=500, passkeys=2, asked=2).make(tokenizer, 16, seed + 1)
        gates = DuoGate(steps=300 if self.full else 100, seed=seed).score(model, train)
        units = kv_units(model)
        count = round(self.share * len(units))
        chosen = gates.top(len(units))[:count]
        caches: dict[str, list[str] | None] = {"full": None, "gates": chosen, "streaming": []}
        for draw in range(3 if self.full else 1):
            caches[f"random {draw}"] = random.Random(f"duo {seed} {draw}").sample(units, count)
        needles = Needle(length=self.length, depths=self.depths).make(tokenizer, 24 if self.full else 8, seed)
        needles = with_needle(needles)
        texts = HeldOut(length=self.length).make(tokenizer, 6 if self.full else 2, seed)
        with fast_matmul(model):
            found, nats, size = self._measure(model, tokenizer, needles, texts, caches)
            apart = self._apart(model, needles, chosen)
        return self._judge(found, nats, size, apart, len(needles), {unit: gates[unit] for unit in units}, chosen)

    def _measure(self, model, tokenizer, needles: Batch, texts: Batch, caches: Mapping[str, list[str] | None]):
        """Percent of needles found, nats a token, and bytes of a cache in the end, each by the name of the cache."""
        found, nats, size = {}, {}, {}
        room = needles.ids.shape[1]
        total = len(caches) * (len(needles) + len(texts))
        with tqdm(total=total, desc="s104 caches", disable=hidden(), leave=False) as bar:
            for name, full in caches.items():
                make = None if full is None else lambda full=full: Duo().split(model, full, reserve=room)
                got = retrieval(model, tokenizer, needles, make, step=bar.update)
                found[name] = 100 * got.accuracy
                size[name] = float(got.bytes.float().mean())
                nats[name] = float(perplexity(model, texts.ids, make, step=bar.update).mean())
        return found, nats, size

    def _apart(self, model: PreTrainedModel, needles: Batch, full: list[str]) -> float:
        """How far the cache's logits are from those of the same heads masked, as a share of the largest."""
        one, duo = alone(needles, 0), Duo()
        start = int(one.spans["question"][0, 0])
        others = [unit for unit in kv_units(model) if unit not in full]
        with torch.no_grad():
            with streaming(model, others, Window(duo.sink, duo.recent)):
                masked = model(input_ids=one.ids).logits[:, start:]
            with caching(model):
                cache = duo.split(model, full)
                model(input_ids=one.ids[:, :start], past_key_values=cache)
                real = model(input_ids=one.ids[:, start:], past_key_values=cache).logits
        return float((real - masked).abs().max() / masked.abs().max())

    def _judge(self, found, nats, size, apart: float, n: int, gates: dict[str, float], chosen: list[str]) -> Outcome:
        others = [name for name in found if name.startswith("random")]
        drawn = sum(found[name] for name in others) / len(others)
        more, held = nats["gates"] - nats["full"], size["gates"] / size["full"]
        checks = {
            f"with {100 * self.share:.0f} % of KV heads full, at least {100 * self.least_kept:.0f} % of the needles "
            "found with full memory are found": found["full"] > 0 and found["gates"] >= self.least_kept * found["full"],
            f"with as many random KV heads full, at least {self.least_random:.0f} points fewer": found["full"] - drawn
            >= self.least_random,
            f"with all streaming at most {self.most_streaming:.0f} %": found["streaming"] <= self.most_streaming,
            f"held-out text loses at most {self.most_nats} nats a token": more <= self.most_nats,
            f"at most {100 * self.most_bytes:.0f} % of the bytes are held": held <= self.most_bytes,
            f"the cache equals the masked simulation to {self.most_apart:.0e} of the largest logit": apart
            <= self.most_apart,
        }
        measured = (
            f"{len(chosen)} of {len(gates)} KV heads full: {found['gates']:.0f} % of {n} needles at {self.length} "
            f"tokens ({found['full']:.0f} % with full memory), {100 * held:.0f} % of the bytes, text {more:+.3f} nats; "
            f"cache and simulation differ by {apart:.0e}"
        )
        baseline = (
            f"random KV heads {drawn:.0f} % ({nats[others[0]] - nats['full']:+.3f} nats), all streaming "
            f"{found['streaming']:.0f} % ({nats['streaming'] - nats['full']:+.3f} nats)"
        )
        numbers = {"found": found, "nats": nats, "bytes": size, "apart": apart, "gates": gates, "full_heads": chosen}
        return settle(measured, baseline, checks, numbers)
