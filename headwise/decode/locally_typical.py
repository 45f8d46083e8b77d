"""Locally Typical Sampling. Meister et al., 2022. arXiv:2202.00666"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, TypicalLogitsWarper

from headwise.drafting import Stats
from headwise.verifying import Decoded, DecodeMethod

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class LocallyTypical(DecodeMethod):
    """Samples among the tokens whose surprise is nearest to what the model expects it to be.

    The rule is transformers' own (`typical_p`); what is here is its entry beside other methods, and its definition in
    the open.

    Fields:
        mass: probability that the tokens that stay have together, above 0 and below 1.
        least: tokens that stay at least.

    Raises:
        ValueError: a mass or a least that is not allowed.
    """

    row: ClassVar[str] = "s035"
    mass: float = 0.95
    least: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.mass < 1 or self.least < 1:
            raise ValueError(
                f"mass is {self.mass} and least {self.least}; allowed are a mass above 0 and below 1, and 1 token or "
                "more."
            )

    def warper(self) -> TypicalLogitsWarper:
        """The rule for `model.generate(logits_processor=...)` with `do_sample=True`."""
        return TypicalLogitsWarper(mass=self.mass, min_tokens_to_keep=self.least)

    def keeps(self, logits: Tensor) -> Tensor:
        """The rule in the open: logits [B, V] -> true for the tokens that stay [B, V]."""
        log_p = logits.double().log_softmax(-1)
        entropy = -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(-1, keepdim=True)
        order = (-log_p - entropy).abs().sort(dim=-1, stable=True).indices
        mass = log_p.exp().gather(-1, order).cumsum(-1)
        # The token with which the mass is reached stays too.
        stay = torch.cat([torch.ones_like(mass[:, :1], dtype=torch.bool), mass[:, :-1] < self.mass], -1)
        stay[:, : self.least] = True
        return torch.zeros_like(stay).scatter(-1, order, stay)

    def generate(
        self, model: PreTrainedModel, ids: Tensor, streamer: "BaseStreamer | None" = None, **options: Any
    ) -> Decoded:
        """Sample after ids [B, T]; `options` are those of `model.generate`. torch's seed decides."""
        rules = LogitsProcessorList([*options.pop("logits_processor", []), self.warper()])
        given = {"do_sample": True, "top_k": 0} | options
        out = model.generate(ids, streamer=streamer, logits_processor=rules, **given)
        return Decoded(out, Stats(rows=len(ids), tokens=len(ids) * (out.shape[1] - ids.shape[1])))
