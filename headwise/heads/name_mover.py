"""Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 Small. Wang et al., 2022.
arXiv:2211.00593
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from headwise.direct import direct_attribution, predicts, toward_answer
from headwise.method import HeadMethod
from headwise.pattern import answering, real
from headwise.score import Score
from headwise.tap import per_row
from headwise.task import Batch
from headwise.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class NameMover(HeadMethod):
    """Attention from where the answer is due to where it stands in the prompt, in prompts whose answer the head raises.

    Prompts in which the head's own output does not move the logits from the foil to the answer count as 0.
    """

    needs: ClassVar[str] = "ioi"

    def score(self, model: "PreTrainedModel", batch: Batch) -> Score:
        """One attention share per head, 0 to 1. Raises ValueError for a model that predicts no next token."""
        weights = Weights(model)
        predicts(model, "heads.name_mover")
        raised = direct_attribution(weights, batch, toward_answer(weights, batch))
        found: dict[int, list[Tensor]] = {}
        for part in batch.chunks(8):
            part = part.to(model.device)
            for layer, value in per_row(model, part, "pattern", partial(_on_answer, part)).items():
                found.setdefault(layer, []).append(value)
        values = {layer: torch.cat(value) * (raised[layer] > 0) for layer, value in found.items()}
        return Score.of_heads(self, model, batch, values)


def _on_answer(batch: Batch, pattern: Tensor) -> Tensor:
    there = real(batch, pattern.shape[-1])
    holds = (batch.ids[:, None, :] == batch.answer[:, :, None]) & there[:, None, :]
    return (answering(pattern, batch).float() * holds[:, None]).sum(-1).mean(-1)
