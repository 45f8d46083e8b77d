"""Listening to the Wise Few: Select-and-Copy Attention Heads for Multiple-Choice QA. Tulchinskii et al., 2024.
arXiv:2410.02343

Row s010 of the mission. Choose the head on some prompts and report it on others: `batch.split()`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from headwise.anatomy import anatomy
from headwise.method import HeadMethod
from headwise.pattern import option_ends, right_option
from headwise.score import Score
from headwise.tap import tap
from headwise.task import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SelectAndCopy(HeadMethod):
    """Accuracy of a head as a judge: the option whose end its last query likes best, by query times key before RoPE."""

    row: ClassVar[str] = "s010"
    needs: ClassVar[str] = "multiple_choice"

    def score(self, model: "PreTrainedModel", batch: Batch) -> Score:
        """One accuracy per head, chance being one in the number of options.

        Raises:
            ValueError: the batch marks no options, or the model shows no queries and keys before RoPE.
        """
        right = right_option(batch)
        values = {layer: (liked == right[:, None]).float() for layer, liked in self.choices(model, batch).items()}
        return Score.of_heads(self, model, batch, values)

    def choices(self, model: "PreTrainedModel", batch: Batch) -> dict[int, Tensor]:
        """{layer: [B, H]} the number of the option that each head would answer."""
        query, key = ("q_pre", "k_pre") if _rotates(model) else ("q", "k")
        found: dict[int, list[Tensor]] = {}
        for part in batch.chunks(8):
            part = part.to(model.device)
            ends = option_ends(part)
            rows = torch.arange(len(part), device=model.device)
            with torch.no_grad(), tap(model, query, key) as t:
                model.base_model(**part.inputs)
            keys = t.by_layer(key)
            for layer, q in t.by_layer(query).items():
                last = q.transpose(1, 2)[rows, part.at[:, -1]]
                option = keys[layer].transpose(1, 2)[rows[:, None], ends]
                option = option.repeat_interleave(anatomy(model).heads(layer) // option.shape[2], 2)
                found.setdefault(layer, []).append(torch.einsum("bhd,bohd->bho", last, option).argmax(-1).cpu())
        return {layer: torch.cat(parts) for layer, parts in found.items()}


def _rotates(model: nn.Module) -> bool:
    return any("Rotary" in type(module).__name__ for module in model.modules())
