"""Hopping Too Late: Exploring the Limitations of Large Language Models on Multi-Hop Queries. Biran et al., 2024.
arXiv:2406.12775

The state that a token has reached in a late layer is put into an earlier layer of the same token, and the model goes on
from there: what it understood too late may then be used in time.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headwise.anatomy import anatomy
from headwise.direct import predicts
from headwise.method import HeadMethod
from headwise.progress import hidden
from headwise.scan import noting_tuples, starting
from headwise.score import Score
from headwise.tap import tap
from headwise.task import Batch, answer_logits, metric


@dataclass(frozen=True)
class BackPatching(HeadMethod):
    """Share of prompts answered right when a layer's state is put into an earlier layer, the best one for all prompts.

    The earlier layer is chosen on the same prompts, so this flatters; `grid` has all pairs, to choose on some prompts
    and to measure on others.

    Fields:
        at: the span whose last column is patched.
        stride: every so many layers are tried.
        metric: "correct" (the answer is the top token), or a name of `headwise.task.METRICS`.
        unrelated: put in the state of another prompt of the batch: the control.
        rows: patched runs side by side.
    """

    at: str = "end"
    stride: int = 2
    metric: str = "correct"
    unrelated: bool = False
    prompts: int = 16
    rows: int = 4

    row: ClassVar[str] = "s139"
    evidence: ClassVar[str] = "enough"
    needs: ClassVar[str] = "two_hop"

    def score(self, model: PreTrainedModel, batch: Batch) -> Score:
        """One number a layer that is a source. Raises ValueError as `grid` does."""
        sources, _, values = self.grid(model, batch)
        best = values.nan_to_num(-float("inf")).mean(-1).argmax(1)
        parts = {f"L{n}": values[i, best[i]] for i, n in enumerate(sources)}
        return Score.of_units(self, model, batch, {name: value.numpy() for name, value in parts.items()}, kind="layer")

    @torch.no_grad()
    def grid(self, model: PreTrainedModel, batch: Batch) -> tuple[list[int], list[int], Tensor]:
        """Source layers, target layers, and [sources, targets, B] the metric; NaN where the target is the later one.

        Raises:
            ValueError: no such span, a stride below 1, or a model that does not predict next tokens.
        """
        predicts(model, "heads.back_patching")
        if self.stride < 1:
            raise ValueError(f"stride = {self.stride} tries no layer; allowed are 1 and more.")
        if self.at not in batch.spans:
            raise ValueError(f"These prompts mark no span {self.at!r}; they mark {', '.join(batch.spans) or 'none'}.")
        layers = sorted(anatomy(model).blocks[""])[:: self.stride]
        chunks = list(batch.chunks(self.prompts))
        bar = tqdm(total=len(layers) * len(chunks), desc="back-patching", disable=hidden(), leave=False)
        with bar:
            found = [self._part(model, part.to(model.device), layers, bar) for part in chunks]
        return layers, layers, torch.cat(found, -1)

    def _part(self, model: PreTrainedModel, batch: Batch, layers: list[int], bar: tqdm) -> Tensor:
        body, rows = anatomy(model), torch.arange(len(batch), device=model.device)
        column = batch.spans[self.at][:, 1].to(model.device) - 1
        sites = [f"L{n}.{kind}" for n in layers for kind in ("resid_pre", "resid_post")]
        with tap(model, *sites) as t, noting_tuples(body) as tuples:
            model.base_model(**batch.inputs)
        states = torch.stack([t[f"L{n}.resid_post"][rows, column] for n in layers])
        if self.unrelated:
            states = states.roll(1, 1)
        found = torch.full((len(layers), len(layers), len(batch)), float("nan"))
        for j, target in enumerate(layers):
            kept = t[f"L{target}.resid_pre"]
            for first in range(j, len(layers), max(1, self.rows)):
                few = states[first : first + max(1, self.rows)]
                start = kept.repeat(len(few), 1, 1)
                start[torch.arange(len(start), device=start.device), column.repeat(len(few))] = few.flatten(0, 1)
                found[first : first + len(few), j] = self._run(model, batch, target, start, tuples)
            bar.update()
        return found

    def _run(self, model: PreTrainedModel, batch: Batch, target: int, start: Tensor, tuples: set[int]) -> Tensor:
        """[K, B] the metric of runs that begin at a layer with the given states."""
        many = batch.take(torch.arange(len(batch)).repeat(len(start) // len(batch)))

        with starting(model, target, start, tuples):
            logits = answer_logits(model, many)
        if self.metric == "correct":
            value = (logits.argmax(-1) == many.answer).all(-1).float()
        else:
            value = metric(self.metric)(logits, many)
        return value.view(-1, len(batch)).float().cpu()
