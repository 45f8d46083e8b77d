"""Efficient Streaming Language Models with Attention Sinks. Xiao et al., 2023. arXiv:2309.17453

Sinks and a local window, for prompts: computed a block of queries at a time, so that the cost grows with the length of
the prompt times the window, not with its square. LServe (arXiv:2502.14866) prefills its streaming heads so.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headwise.mixing import AttentionMethod, Note, quiet, softmax_scores


@dataclass(frozen=True)
class StreamingPrefill(AttentionMethod):
    """Every query sees the first tokens and the latest ones.

    Notes: "computed", the share of the scores of full causal attention that were computed.

    Fields:
        sink: tokens at the start that all queries see.
        window: latest tokens that a query sees, itself among them.
        block: queries that are computed together; another size gives the same z.
    """

    sink: int = 64
    window: int = 256
    block: int = 128

    def __post_init__(self) -> None:
        if self.sink < 0 or self.window < 1 or self.block < 1:
            raise ValueError(
                f"sink {self.sink}, window {self.window} and block {self.block} must be at least 0, 1 and 1."
            )

    def mix(self, q: Tensor, k: Tensor, v: Tensor, scale: float, note: Note = quiet) -> Tensor:
        """Give z [B, H, Tq, dv]; each block of queries meets the sinks and the keys from its first window on."""
        length, keys = q.shape[2], k.shape[2]
        past, computed, parts = keys - length, 0, []
        for start in range(0, length, self.block):
            stop = min(start + self.block, length)
            near = max(0, past + start - self.window + 1)
            columns = torch.cat([torch.arange(min(self.sink, near)), torch.arange(near, past + stop)]).to(q.device)
            at = torch.arange(past + start, past + stop, device=q.device)
            mask = self._seen(at, columns)
            parts.append(
                scaled_dot_product_attention(
                    q[:, :, start:stop], k[:, :, columns], v[:, :, columns], mask, scale=scale, enable_gqa=True
                )
            )
            computed += (stop - start) * len(columns)
        whole = length * past + length * (length + 1) / 2
        note("computed", torch.full(q.shape[:2], min(1.0, computed / whole)))
        return torch.cat(parts, 2)

    def pattern(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Softmax over the keys that are seen."""
        columns = torch.arange(k.shape[2], device=q.device)
        return softmax_scores(q, k, scale, self._seen(columns[k.shape[2] - q.shape[2] :], columns))

    def _seen(self, at: Tensor, columns: Tensor) -> Tensor:
        """[queries, keys] of positions."""
        ago = at[:, None] - columns
        return (ago >= 0) & ((ago < self.window) | (columns < self.sink))
