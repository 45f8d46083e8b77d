"""HGRN2: Gated Linear RNNs with State Expansion. Qin et al., 2024. arXiv:2404.07904

Not attention: what is kept of the past has the same size however long the text. For models trained so, as `Tiny` is
with `mixer`; the convolution, the output gate and the lower bounds that rise from layer to layer are left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from headwise.mixing import AttentionMethod, Note, per_head, quiet


@dataclass(frozen=True)
class HGRN2(AttentionMethod):
    """A memory of as many slots as a head has channels; each token opens each slot by a gate, and what was there fades.

    A slot holds a vector, a running mean of values: new = (1 - gate) * old + gate * value, where the gate of a slot is
    the sigmoid of its channel of the key, less `keep`. The first token fills all slots. Queries choose slots by a
    softmax over their channels, so that z is a mixture of values whose weights sum to 1; `scale` plays no part.

    Notes: "gate", its mean over tokens and slots: 1 / gate is about how many tokens a slot remembers.

    Fields:
        keep: how far gates are closed where a key is 0: 4 keeps 98 % at every token, 0 a half.
        block: tokens that are computed together; another size gives the same z.
    """

    keep: float = 4.0
    block: int = 16

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"A block of {self.block} tokens does not work; it must be 1 or more.")

    def mix(self, q: Tensor, k: Tensor, v: Tensor, scale: float, note: Note = quiet) -> Tensor:
        """Give z [B, H, Tq, dv]: block by block, with nothing but the slots carried from one to the next."""
        asked, faded, opened = self._parts(q, k)
        values, length = per_head(v, q.shape[1]).float(), k.shape[2]
        note("gate", opened.mean((2, 3)))
        # Queries may be fewer than keys: the columns before them are mixed for nobody.
        asked = pad(asked, (0, 0, length - q.shape[2], 0))
        memory, parts = values.new_zeros(*values.shape[:2], k.shape[-1], v.shape[-1]), []
        for start in range(0, length, self.block):
            read, fade, gate, value = (x[:, :, start : start + self.block] for x in (asked, faded, opened, values))
            total = fade.cumsum(2)
            apart = total[:, :, :, None] - total[:, :, None]
            later = torch.ones(apart.shape[2:4], dtype=torch.bool, device=q.device).triu(1)
            left = apart.masked_fill(later[..., None], -torch.inf).exp()
            inside = (read[:, :, :, None] * left * gate[:, :, None]).sum(-1)
            parts.append((read * total.exp()) @ memory + inside @ value)
            ends = total[:, :, -1:]
            written = ((ends - total).exp() * gate).transpose(2, 3) @ value
            memory = ends.exp().transpose(2, 3) * memory + written
        return torch.cat(parts, 2)[:, :, length - q.shape[2] :].to(v.dtype)

    def pattern(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """How much of each value is left in the slots that a query chooses, slot by slot."""
        asked, faded, opened = self._parts(q, k)
        total, first = faded.cumsum(2), k.shape[2] - q.shape[2]
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(first + 1)
        weights = asked.new_zeros(*asked.shape[:3], k.shape[2])
        for slot in range(k.shape[-1]):
            apart = total[:, :, first:, None, slot] - total[:, :, None, :, slot]
            left = apart.masked_fill(later, -torch.inf).exp()
            weights = weights + asked[..., slot, None] * left * opened[:, :, None, :, slot]
        return weights

    def _parts(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shares of the slots that are read [B, H, Tq, d], and for each key log(1 - gate) and gate [B, H, Tk, d]."""
        drive = per_head(k, q.shape[1]).float() - self.keep
        gate = drive.sigmoid()
        opened = torch.cat([torch.ones_like(gate[:, :, :1]), gate[:, :, 1:]], 2)
        return q.float().softmax(-1), logsigmoid(-drive), opened
