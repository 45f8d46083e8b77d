"""Retrieval Head Mechanistically Explains Long-Context Factuality. Wu et al., 2024. arXiv:2404.15574

Row s066 of the mission.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from headwise.direct import predicts
from headwise.method import HeadMethod
from headwise.pattern import answering
from headwise.score import Score
from headwise.tap import tap
from headwise.task import Batch, answer_logits, with_needle

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Retrieval(HeadMethod):
    """Share of needle tokens for which a head's most-attended position is that token in the needle, as it is produced.

    The needle is given to the model token by token after the question; a token counts as produced when the model itself
    ranks it first. Prompts of which the model produces no more than `gate` of the needle do not count.
    """

    row: ClassVar[str] = "s066"
    needs: ClassVar[str] = "needle"

    gate: float = 0.5

    def score(self, model: "PreTrainedModel", batch: Batch) -> Score:
        """One share per head, 0 to 1; 0.1 and more is a retrieval head. n is the number of prompts behind the gate.

        Raises:
            ValueError: no prompt passes the gate, needles differ in length, or the model predicts no next token.
        """
        predicts(model, "heads.retrieval")
        forced = with_needle(batch)
        produced: list[Tensor] = []
        hits: dict[int, list[Tensor]] = {}
        for part in forced.chunks(2):
            part = part.to(model.device)

            def most(pattern: Tensor, part: Batch = part) -> Tensor:
                return answering(pattern, part).argmax(-1)

            with torch.no_grad(), tap(model, "pattern", reduce=most) as t:
                right = answer_logits(model, part).argmax(-1) == part.answer
            start, stop = part.spans["needle"].to(model.device).T[..., None, None]
            for layer, top in t.by_layer("pattern").items():
                held = part.ids[torch.arange(len(top), device=top.device)[:, None, None], top]
                hit = (top >= start) & (top < stop) & (held == part.answer[:, None]) & right[:, None]
                hits.setdefault(layer, []).append(hit.float().mean(-1).cpu())
            produced.append(right.float().mean(-1).cpu())
        share = torch.cat(produced)
        passed = share > self.gate
        if not passed.any():
            raise ValueError(
                f"None of {len(batch)} prompts passes the answer gate: at most {float(share.max()):.0%} of a needle is "
                f"produced, and more than {self.gate:.0%} is needed. Try shorter prompts (`length` of data.needle), "
                "a larger model, or a lower `gate`."
            )
        return Score.of_heads(self, model, batch, {layer: torch.cat(hit)[passed] for layer, hit in hits.items()})
