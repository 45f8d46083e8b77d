"""Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution.
Devoto et al., 2025. arXiv:2510.00636

The score with which kvpress, the library released with the paper, chooses heads for DuoAttention on the fly. It reads
text once and asks for no answers: the positions alone say how far a head looks.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from headwise.anatomy import anatomy
from headwise.method import HeadMethod
from headwise.pattern import real
from headwise.progress import hidden
from headwise.rotary import Rotate, rotation
from headwise.score import Score
from headwise.tap import tap
from headwise.task import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Reach(HeadMethod):
    """How far back a KV head looks by position alone: its mean query attends to its mean key, put at every distance.

    The value is the area under the attention that is summed from the farthest key to the nearest: 1 where all of it is
    at the farthest, one half where distance does not matter, nearly 0 where all of it is at the token itself. Means are
    over the tokens of a text, of queries and keys before they are rotated; query heads of a group are averaged.

    Fields:
        tokens: how many keys the mean key is put at.
    """

    tokens: int = 500

    needs: ClassVar[str] = "held_out"

    def score(self, model: "PreTrainedModel", batch: Batch) -> Score:
        """One area per KV head and text, 0 to 1.

        Raises:
            ValueError: fewer than two keys, or a model whose positions are not rotary or differ between layers.
        """
        if self.tokens < 2:
            raise ValueError(f"tokens is {self.tokens}; a distance needs 2 or more.")
        rotate = rotation(model)
        if rotate is None:
            raise ValueError(
                f"heads.reach turns queries and keys, and the positions of {model.config.model_type} are not rotary, "
                "or differ between layers."
            )
        found: dict[str, list[Tensor]] = {}
        for part in tqdm(list(batch.chunks(4)), desc="reach", disable=hidden(), leave=False):
            for unit, areas in self._areas(model, part.to(model.device), rotate).items():
                found.setdefault(unit, []).append(areas)
        return Score.of_units(self, model, batch, {unit: torch.cat(a) for unit, a in found.items()}, kind="kv")

    def _areas(self, model: "PreTrainedModel", batch: Batch, rotate: Rotate) -> dict[str, Tensor]:
        """{KV head: [B]}."""
        there = real(batch, batch.ids.shape[1])
        places = (there.cumsum(1) - 1).clamp_min(0)
        weights = (there / there.sum(1, keepdim=True))[:, None, :, None]

        def mean(x: Tensor) -> Tensor:
            return (rotate(x.float(), -places[:, None]) * weights).sum(2)

        with torch.no_grad(), tap(model, "q", "k", reduce=mean) as t:
            model.base_model(**batch.inputs)
        body, back = anatomy(model), torch.arange(self.tokens - 1, -1, -1, device=batch.ids.device)
        areas = {}
        for layer, k in t.by_layer("k").items():
            q = t[f"L{layer}.q"].unflatten(1, (k.shape[1], -1))
            scale = getattr(body.layer(layer).attention, "scaling", None) or k.shape[-1] ** -0.5
            for head in range(k.shape[1]):
                far = rotate(q[:, head, :, None].expand(-1, -1, self.tokens, -1), back)
                pattern = ((far @ k[:, head, None, :, None])[..., 0] * scale).softmax(-1)
                areas[f"L{layer}.G{head}"] = pattern.cumsum(-1).mean((1, 2)).cpu()
        return areas
