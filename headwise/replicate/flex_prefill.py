"""FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference. Lai et al., 2025.
arXiv:2502.20766

Row s080 of the mission. Counted are scores, not seconds: the paper's speed is that of its GPU kernels. Prompts are far
shorter than the paper's, so that blocks are half as large.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headwise.anatomy import anatomy
from headwise.attention import FlexPrefill as Method
from headwise.attention import StreamingPrefill
from headwise.data import Needle
from headwise.mixing import causal, softmax_scores, use
from headwise.models import open_model
from headwise.progress import hidden
from headwise.replicate import Outcome, Replication, settle
from headwise.tap import tap
from headwise.task import Batch

METHOD = Method(gamma=0.95, tau=0.1, block=64, budget=128)
SINK = 64


def covered(method: Method, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """True attention inside the kept blocks, [H, query blocks], mean over the queries of a block. q [1, H, T, d]."""
    length = q.shape[2]
    keep, places = method.kept(q, k, scale), torch.arange(length) // method.block
    found = []
    for number in range(keep.shape[2]):
        stop = min(length, (number + 1) * method.block)
        mine = q[:, :, number * method.block : stop]
        weights = softmax_scores(mine, k[:, :, :stop], scale, causal(mine.shape[2], stop))
        found.append((weights * keep[:, :, number, None, places[:stop]]).sum(-1).mean(-1)[0])
    return torch.stack(found, 1)


def window_of_share(share: float, length: int, sink: int = SINK) -> int:
    """The smallest window that, with these sinks, sees at least this share of the scores of causal attention."""
    ago = torch.arange(length)[:, None] - torch.arange(length)
    counts = torch.bincount(ago[:, sink:][ago[:, sink:] >= 0], minlength=length).cumsum(0)
    first = int((ago[:, :sink] >= 0).sum())
    whole = length * (length + 1) / 2
    return 1 + int(((first + counts) < share * whole).sum())


@dataclass(frozen=True)
class FlexPrefill(Replication):
    """Prompts with a needle: attention in full, by FlexPrefill, and by sinks and a window of as many scores."""

    row: ClassVar[str] = "s080"
    claim: ClassVar[str] = (
        "Blocks chosen by each head for each prompt change the prediction less than a fixed pattern of equal cost."
    )
    paper: ClassVar[str] = "faster and more accurate than earlier sparse prefill (no figure in the abstract)"

    most_change: ClassVar[float] = 0.02
    most_computed: ClassVar[float] = 0.5
    least_cases: ClassVar[float] = 0.95
    read: ClassVar[int] = 64

    def run(self, seed: int = 0) -> Outcome:
        """Prompt by prompt; changes are KL divergences from full attention over the last columns."""
        model, tokenizer = open_model("default")
        length, n = (4096, 6) if self.full else (2048, 3)
        batch = Needle(length=length, depths=(0.2, 0.5, 0.8)).make(tokenizer, n, seed)
        rows = [self._row(model, batch.take([i])) for i in tqdm(range(n), desc="s080", disable=hidden(), leave=False)]
        return self._judge(rows, length)

    def _row(self, model: PreTrainedModel, batch: Batch) -> dict:
        pad = int((batch.inputs["attention_mask"][0] == 0).sum())
        batch = Batch({"input_ids": batch.ids[:, pad:]}, batch.at - pad, batch.answer)
        with torch.no_grad(), tap(model, "q", "k") as t:
            whole = self._said(model, batch)
            cases, body = [], anatomy(model)
            for number in body.layers:
                scale = body.layer(number).attention.scaling
                cases.append(covered(METHOD, t[f"L{number}.q"], t[f"L{number}.k"], scale).flatten())
        with torch.no_grad(), use(model, METHOD) as notes:
            chosen = self._said(model, batch)
        table = notes.table()
        share = float(table["computed"].mean())
        window = window_of_share(share, batch.ids.shape[1])
        with torch.no_grad(), use(model, StreamingPrefill(SINK, window)):
            fixed = self._said(model, batch)
        met = torch.cat(cases) >= METHOD.gamma

        def change(other: Tensor) -> float:
            return float((whole.exp() * (whole - other)).sum(-1).mean())

        def right(logits: Tensor) -> bool:
            return bool(logits[-1].argmax() == batch.answer[0, 0])

        said = {"full": whole, "flex": chosen, "fixed": fixed}
        return {
            "change": {"flex": change(chosen), "fixed": change(fixed)},
            "last": {"flex": float((whole.exp() * (whole - chosen)).sum(-1)[-1])},
            "right": {name: right(logits) for name, logits in said.items()},
            "computed": share,
            "window": window,
            "query_aware": float(table["query_aware"].mean()),
            "cases": float(met.float().mean()),
            "covered": float(torch.cat(cases).mean()),
        }

    def _said(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """[columns, V] log-probabilities at the last columns."""
        logits = model(**batch.inputs, logits_to_keep=self.read, use_cache=False).logits
        return logits[0].float().log_softmax(-1)

    def _judge(self, rows: list[dict], length: int) -> Outcome:
        n = len(rows)
        change = {name: sum(row["change"][name] for row in rows) / n for name in ("flex", "fixed")}
        right = {name: sum(row["right"][name] for row in rows) for name in ("full", "flex", "fixed")}
        mean = {name: sum(row[name] for row in rows) / n for name in ("computed", "cases", "covered", "query_aware")}
        checks = {
            "the prediction changes less than with sinks and a window of as many scores": change["flex"]
            < change["fixed"],
            f"it changes by less than {self.most_change} nats": change["flex"] < self.most_change,
            f"at most {100 * self.most_computed:.0f} % of the scores are computed": mean["computed"]
            <= self.most_computed,
            f"gamma of the attention is covered in {100 * self.least_cases:.0f} % of heads and blocks of queries": mean[
                "cases"
            ]
            >= self.least_cases,
        }
        measured = (
            f"KL {change['flex']:.4f} nats with {100 * mean['computed']:.0f} % of the scores; gamma {METHOD.gamma} "
            f"covered in {100 * mean['cases']:.0f} % of heads and blocks (mean {mean['covered']:.3f}); needle "
            f"{right['flex']} of {n}; {100 * mean['query_aware']:.0f} % of heads query-aware; "
            f"{n} prompts of {length} tokens"
        )
        baseline = (
            f"KL {change['fixed']:.4f} with {SINK} sinks and a window of {rows[0]['window']}, needle {right['fixed']} "
            f"of {n}; in full {right['full']} of {n}"
        )
        return settle(measured, baseline, checks, {"rows": rows, **mean, "change": change, "right": right})
