"""AtP*: An efficient and scalable method for localizing LLM behaviour to components. Kramar, Lieberum, Shah and Nanda,
2024. arXiv:2403.00745

The plain first-order estimate (attribution patching): one forward and one backward pass for all heads at once.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.anatomy import anatomy
from headwise.do import replacement
from headwise.method import HeadMethod
from headwise.score import Score
from headwise.site import Site
from headwise.tap import Place, listen, tap
from headwise.task import Batch, Metric, answer_logits, metric


@dataclass(frozen=True)
class Attribution(HeadMethod):
    """First-order estimate of what the metric loses when a head is replaced: the gradient times the change.

    Fields:
        value: what takes the head's place: "resample" (its value on the corrupt prompt), "mean" (over prompts and
            columns) or "zero".
    """

    value: str = "resample"
    metric: str = "logprob"
    prompts: int = 8

    evidence: ClassVar[str] = "seen"
    needs: ClassVar[str] = "induction"

    def score(self, model: PreTrainedModel, batch: Batch) -> Score:
        """One estimate per head of the main stack. Raises ValueError for resample without corrupt prompts."""
        measure = metric(self.metric)
        if replacement(self.value) == "resample":
            batch.flipped()
        parts = [self._estimate(model, part.to(model.device), measure) for part in batch.chunks(self.prompts)]
        values = {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}
        return Score.of_heads(self, model, batch, values, name=f"attribution_{self.value}")

    def _estimate(self, model: PreTrainedModel, batch: Batch, measure: Metric) -> dict[int, Tensor]:
        instead: dict[int, Tensor] = {}
        if self.value == "resample":
            with torch.no_grad(), tap(model, "z") as other:
                model.base_model(**batch.corrupt)
            instead = other.by_layer("z")
        first = min(anatomy(model).blocks[""])

        def root(value: Tensor, _: Place) -> Tensor:
            # The graph starts here whatever the parameters say about gradients.
            return value.detach().requires_grad_()

        with torch.enable_grad(), listen(model, [(Site(first, "resid_pre"), root)]), tap(model, "z", grad=True) as t:
            total = measure(answer_logits(model, batch), batch).sum()
            z = t.by_layer("z")
            slopes = torch.autograd.grad(total, list(z.values()))
        found = {}
        for (layer, value), slope in zip(z.items(), slopes, strict=True):
            new = instead.get(
                layer, torch.zeros_like(value) if self.value == "zero" else value.mean((0, 1), keepdim=True)
            )
            found[layer] = (slope * (value - new)).sum((1, 3)).detach()
        return found
