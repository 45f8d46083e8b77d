"""Successor Heads: Recurring, Interpretable Attention Heads In The Wild. Gould et al., 2023. arXiv:2312.09230

Row s107 of the mission.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from headwise.method import HeadMethod
from headwise.score import Score
from headwise.weights import Weights, effective_embedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.task import Batch


@dataclass(frozen=True)
class Successor(HeadMethod):
    """How often a head's OV circuit turns an ordinal token into its successor rather than any other of its list.

    Tokens enter as embedding plus first MLP. Chance is one in the number of tokens of the list.
    """

    row: ClassVar[str] = "s107"
    evidence: ClassVar[str] = "read"
    needs: ClassVar[str] = "successor"

    @torch.no_grad()
    def score(self, model: "PreTrainedModel", batch: "Batch") -> Score:
        """One share per head; n is the number of ordinal tokens that have a successor.

        Raises:
            ValueError: the batch names no ordered lists, or the model does not offer its weights.
        """
        sets = batch.about.get("sets") if batch is not None else None
        if not sets:
            raise ValueError("Successor heads are scored on ordered lists; give a batch of data.successor.")
        weights = Weights(model)
        readout = weights.readout
        lists = [torch.tensor(ids, device=readout.device) for ids in sets.values()]
        embedded = [effective_embedding(weights, ids) for ids in lists]
        values = {}
        for layer in weights.layers:
            row = []
            for head in range(weights.heads(layer)):
                ov = weights.ov(layer, head)
                hits = []
                for ids, given in zip(lists, embedded, strict=True):
                    logits = (weights.into_layer(layer, given) @ ov.A) @ (ov.B @ readout[ids].T)
                    # Each token may answer anything of its list but itself.
                    logits = logits.fill_diagonal_(-torch.inf)[:-1]
                    hits.append(logits.argmax(-1) == torch.arange(1, len(ids), device=logits.device))
                row.append(torch.cat(hits).float())
            values[layer] = torch.stack(row, -1)
        return Score.of_heads(self, model, batch, values)
