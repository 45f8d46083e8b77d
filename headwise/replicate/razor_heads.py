"""RazorAttention: Efficient KV Cache Compression Through Retrieval Heads. Tang et al., 2024. arXiv:2407.15891

Row s124 of the mission. Heads are chosen on repeated random tokens alone. A context is read in full, then only the
chosen KV heads keep all of it, and the question sees what is left: the cache is simulated by hiding keys, so bytes
are counted, not saved.
"""

import copy
import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Cache, PreTrainedModel

from headwise.anatomy import anatomy
from headwise.data import Needle, NeutralText, RepeatedTokens
from headwise.do import Add, do
from headwise.heads import Echo, RazorInduction
from headwise.models import open_model
from headwise.progress import hidden
from headwise.replicate import Outcome, Replication, settle
from headwise.score import Score
from headwise.site import Unit
from headwise.task import with_needle

Kept = dict[str, int]


def compensation(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, float]:
    """One key and one value that stand for N dropped ones, and what is added to their score.

    Args:
        keys, values: [..., N, d].

    Returns:
        mean key and mean value [..., 1, d], and log N: exact where all dropped keys are alike.
    """
    return keys.mean(-2, keepdim=True), values.mean(-2, keepdim=True), float(torch.tensor(float(keys.shape[-2])).log())


@dataclass(frozen=True)
class RazorHeads(Replication):
    """Keeps the whole context in the retrieval KV heads only, and asks for a needle in it."""

    row: ClassVar[str] = "s124"
    claim: ClassVar[str] = (
        "Full memory in a few retrieval heads keeps the needle where the same budget spread over all heads loses it."
    )
    paper: ClassVar[str] = "over 70 % of the KV cache saved without noticeable loss"

    chosen: ClassVar[int] = 27
    sink: ClassVar[int] = 4
    recent: ClassVar[int] = 64
    least_saved: ClassVar[float] = 60.0
    least_kept: ClassVar[float] = 0.9
    most_without: ClassVar[float] = 0.5
    most_nats: ClassVar[float] = 0.03

    def run(self, seed: int = 0) -> Outcome:
        """Heads come from random tokens, the figures from prose: no prompt is used for both."""
        model, tokenizer = open_model("default")
        kv = [
            str(Unit("", layer, "G", g))
            for layer in anatomy(model).layers
            for g in range(anatomy(model).kv_heads(layer))
        ]
        heads = self.search(model, tokenizer, seed)
        needles = Needle(length=1000).make(tokenizer, 36 if self.full else 18, seed)
        prose = NeutralText(length=1128).make(tokenizer, 8 if self.full else 4, seed)
        others = [u for u in kv if u not in heads]
        drawn = random.Random(f"random KV heads {seed}").sample(others, self.chosen)
        policies = {"razor": heads, "random heads": drawn, "no choice": []}
        found: dict[str, list[Tensor]] = {}
        nats: dict[str, list[Tensor]] = {}
        saved: list[dict[str, float]] = []
        with tqdm(total=len(needles) + len(prose), desc="s124 contexts", disable=hidden(), leave=False) as bar:
            for row in range(len(needles)):
                answers, share = self._needle(model, needles.take([row]), policies)
                saved.append(share)
                for name, value in answers.items():
                    found.setdefault(name, []).append(value)
                bar.update()
            for row in range(len(prose)):
                ids = prose.ids[row : row + 1]
                for name, value in self._asked(model, ids, 1000, policies).items():
                    nats.setdefault(name, []).append(value)
                bar.update()
        rate = {name: 100 * float(torch.stack(v).float().mean()) for name, v in found.items()}
        loss = {name: float(torch.stack(v).mean()) for name, v in nats.items()}
        off = torch.stack(nats["razor, nothing for the dropped"]) - torch.stack(nats["razor"])
        share = {name: 100 * sum(s[name] for s in saved) / len(saved) for name in saved[0]}
        return self._judge(rate, loss, share, off, len(needles), heads)

    def search(self, model: PreTrainedModel, tokenizer, seed: int) -> list[str]:
        """The KV heads to keep: one by echo for 14 by induction, as in the paper, each by its best query head."""
        batch = RepeatedTokens(length=50, repeats=4).make(tokenizer, 8, seed)
        echo: Score = Echo().kv(model, batch)
        induction: Score = RazorInduction().kv(model, batch)
        by_echo = echo.top(max(1, round(self.chosen / 15)))
        rest = [unit for unit in induction.top(len(induction.table)) if unit not in by_echo]
        return by_echo + rest[: self.chosen - len(by_echo)]

    def _needle(self, model, batch, policies) -> tuple[dict[str, Tensor], dict[str, float]]:
        start = int(batch.inputs["attention_mask"].argmax())
        said = with_needle(batch)
        ids = said.ids[:, start:]
        context = int(batch.spans["question"][0, 0]) - start
        share = {name: self._saved(model, context, kept) for name, kept in policies.items()}
        return self._asked(model, ids, context, policies, said.answer[0]), share

    def _saved(self, model, context: int, kept: list[str]) -> float:
        """Share of the context's keys and values that are gone."""
        layers = anatomy(model).layers
        total = sum(anatomy(model).kv_heads(layer) for layer in layers)
        short = min(context, self._short(model, context, kept) + (1 if kept else 0))
        return 1 - (len(kept) * context + (total - len(kept)) * short) / (total * context)

    def _short(self, model, context: int, kept: list[str]) -> int:
        """Keys that a head without the whole context sees: sink and recent ones; without choice the whole budget."""
        if kept:
            return self.sink + self.recent
        total = sum(anatomy(model).kv_heads(layer) for layer in anatomy(model).layers)
        return round((self.chosen * context + (total - self.chosen) * (self.sink + self.recent + 1)) / total)

    def _asked(self, model, ids: Tensor, context: int, policies, answer: Tensor | None = None) -> dict[str, Tensor]:
        """Read the context once; then the rest under each policy: is the answer said, or (without one) nats a token."""
        with torch.no_grad():
            cache = model.base_model(input_ids=ids[:, :context], use_cache=True).past_key_values
        runs = {"full": (None, False), **{name: (kept, bool(kept)) for name, kept in policies.items()}}
        runs["razor, nothing for the dropped"] = (policies["razor"], False)
        out = {}
        for name, (kept, compensate) in runs.items():
            copied = copy.deepcopy(cache)
            edits = [] if kept is None else self._hide(model, copied, context, ids.shape[1], kept, compensate)
            with torch.no_grad(), do(model, *edits):
                logits = model(input_ids=ids[:, context:], past_key_values=copied).logits[0].float()
            if answer is None:
                out[name] = -logits[:-1].log_softmax(-1).gather(-1, ids[0, context + 1 :, None]).mean()
            else:
                out[name] = (logits[-len(answer) :].argmax(-1) == answer).all()
        return out

    def _hide(self, model, cache: Cache, context: int, width: int, kept: list[str], compensate: bool) -> list[Add]:
        """What takes the dropped keys out of sight, layer by layer; with compensation, one of them stands for all."""
        body, edits = anatomy(model), []
        short = self._short(model, context, kept)
        first, end = self.sink, context - (short - self.sink)
        for place, layer in enumerate(body.layers):
            bias = torch.zeros(1, body.heads(layer), 1, width)
            for g in range(body.kv_heads(layer)):
                if f"L{layer}.G{g}" in kept or end - first < 2:
                    continue
                heads = [h for h in range(body.heads(layer)) if body.group(layer, h) == g]
                bias[0, heads, 0, first:end] = -torch.inf
                if compensate:
                    part = cache.layers[place]
                    key, value, more = compensation(part.keys[:, g, first:end], part.values[:, g, first:end])
                    part.keys[:, g, first : first + 1], part.values[:, g, first : first + 1] = key, value
                    bias[0, heads, 0, first] = more
            edits.append(Add(f"L{layer}.scores", bias))
        return edits

    def _judge(self, rate, loss, share, off: Tensor, n: int, heads: list[str]) -> Outcome:
        more = loss["razor"] - loss["full"]
        saved = share["razor"]
        checks = {
            f"at {self.least_saved:.0f} % or more saved, at least {100 * self.least_kept:.0f} % of the "
            f"needles found with full memory "
            "are found": saved >= self.least_saved and rate["razor"] >= self.least_kept * rate["full"],
            f"the same budget without choice finds at most {100 * self.most_without:.0f} %": rate["no choice"]
            <= self.most_without * rate["full"],
            f"prose loses at most {self.most_nats} nats a token": more <= self.most_nats,
            "the compensation token lowers the loss": float(off.mean()) > 0,
        }
        measured = (
            f"{saved:.0f} % of KV entries hidden: {rate['razor']:.0f} % of {n} needles ({rate['full']:.0f} % "
            f"with full memory), "
            f"prose {more:+.3f} nats, {float(off.mean()):+.4f} more without the compensation token"
        )
        baseline = (
            f"same budget: no head choice {rate['no choice']:.0f} % ({loss['no choice'] - loss['full']:+.3f} "
            f"nats), random KV heads "
            f"{rate['random heads']:.0f} % ({loss['random heads'] - loss['full']:+.3f} nats)"
        )
        numbers = {"rate": rate, "nats": loss, "saved": share, "without_compensation": off.tolist(), "kv_heads": heads}
        return settle(measured, baseline, checks, numbers)
