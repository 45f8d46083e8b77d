"""Towards Best Practices of Activation Patching in Language Models: Metrics and Methods. Zhang and Nanda, 2023.
arXiv:2309.16042

One place in one column of the corrupt run is set to what it is in the clean run: where enough is known to bring the
answer back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headwise.anatomy import anatomy
from headwise.direct import predicts
from headwise.listen import Place, listen
from headwise.method import HeadMethod
from headwise.progress import hidden
from headwise.scan import noting_tuples, starting
from headwise.score import Score
from headwise.site import Site
from headwise.tap import tap
from headwise.task import Batch, Metric, answer_logits, metric

SITES = ("z", "resid_pre", "attn", "mlp")


@dataclass(frozen=True)
class ActivationPatching(HeadMethod):
    """What the metric gains when a place has its clean value in one column of the corrupt run, the best one (exact).

    That column is chosen on the same prompts, so this flatters; `grid` has all columns.

    Fields:
        site: "z", head by head; or "resid_pre", "attn" or "mlp", layer by layer.
        layers: only these; all by default.
        prompts: prompts in one part; rows: patched runs side by side.
    """

    site: str = "z"
    metric: str = "logprob"
    layers: tuple[int, ...] = ()
    prompts: int = 8
    rows: int = 8

    evidence: ClassVar[str] = "enough"
    needs: ClassVar[str] = "ioi"

    def score(self, model: PreTrainedModel, batch: Batch) -> Score:
        """One number a head, or a layer. Raises ValueError as `grid` does."""
        names, values = self.grid(model, batch)
        best = values.mean(-1).argmax(1)
        rows = {name: values[i, best[i]].numpy() for i, name in enumerate(names)}
        return Score.of_units(self, model, batch, rows, kind="head" if self.site == "z" else "layer")

    @torch.no_grad()
    def grid(self, model: PreTrainedModel, batch: Batch) -> tuple[list[str], Tensor]:
        """Names of the places ("L5.H1", or "L5" for a layer), and what each gains in each column [places, T, B].

        Columns in front of the first that differs between clean and corrupt prompts hold nothing to patch, and gain 0.

        Raises:
            ValueError: a site or layer that is not offered, no corrupt prompts, or a model that predicts no next token.
        """
        predicts(model, "heads.activation_patching")
        if self.site not in SITES:
            raise ValueError(f"{self.site!r} is not patched column by column: {', '.join(SITES)} are.")
        body, measure = anatomy(model), metric(self.metric)
        layers = list(self.layers) or (sorted(body.blocks[""]) if self.site == "resid_pre" else body.layers)
        chunks = list(batch.chunks(self.prompts))
        with tqdm(total=len(layers) * len(chunks), desc="patching", disable=hidden(), leave=False) as bar:
            parts = [self._part(model, part.to(model.device), layers, measure, bar) for part in chunks]
        names = [name for name, _ in parts[0]]
        return names, torch.stack([torch.cat(one, -1) for one in zip(*([v for _, v in p] for p in parts), strict=True)])

    def _part(
        self, model: PreTrainedModel, batch: Batch, layers: list[int], measure: Metric, bar: tqdm
    ) -> list[tuple[str, Tensor]]:
        body, corrupt = anatomy(model), batch.flipped()
        sites = list(dict.fromkeys(f"L{n}.{kind}" for n in layers for kind in ("resid_pre", self.site)))
        with tap(model, *sites) as clean:
            model.base_model(**batch.inputs)
        with tap(model, *sites) as t, noting_tuples(body) as tuples:
            base = measure(answer_logits(model, corrupt), corrupt)
        differ = (batch.ids != corrupt.ids).any(0).nonzero()
        first = int(differ[0, 0]) if len(differ) else batch.ids.shape[1]
        found = []
        for n in layers:
            start, own = t[f"L{n}.resid_pre"], clean[f"L{n}.{self.site}"]
            many = own.shape[2] if self.site == "z" else 1
            jobs = [(i, c) for i in range(many) for c in range(first, own.shape[1])]
            values = torch.zeros(many, own.shape[1], len(batch))
            for at in range(0, len(jobs), max(1, self.rows)):
                few = jobs[at : at + max(1, self.rows)]
                rows = corrupt.take(torch.arange(len(corrupt)).repeat(len(few)))
                begin = start.repeat(len(few), *[1] * (start.ndim - 1))
                change = _put(own, few, heads=self.site == "z")
                if self.site == "resid_pre":
                    begin = change(begin, None)
                handlers = [] if self.site == "resid_pre" else [(Site(n, self.site), change)]
                with starting(model, n, begin, tuples), listen(model, handlers):
                    gained = measure(answer_logits(model, rows), rows).view(len(few), -1) - base
                values[[i for i, _ in few], [c for _, c in few]] = gained.float().cpu()
            found += [(f"L{n}.H{i}" if self.site == "z" else f"L{n}", values[i]) for i in range(many)]
            bar.update()
        return found


def _put(own: Tensor, places: list[tuple[int, int]], heads: bool) -> Callable[[Tensor, Place | None], Tensor]:
    """Puts clean values into one head and column of each copy of the batch; into the whole column without heads."""

    def change(value: Tensor, _: Place | None) -> Tensor:
        new, size = value.clone(), len(own)
        for k, (i, column) in enumerate(places):
            rows = slice(k * size, (k + 1) * size)
            if heads:
                new[rows, column, i] = own[:, column, i].to(new.dtype)
            else:
                new[rows, column] = own[:, column].to(new.dtype)
        return new

    return change
