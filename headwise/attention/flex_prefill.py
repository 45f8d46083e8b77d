"""FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference. Lai et al., 2025.
arXiv:2502.20766

Row s080 of the mission.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from headwise.mixing import AttentionMethod, Note, causal, per_head, quiet, softmax_scores


@dataclass(frozen=True)
class FlexPrefill(AttentionMethod):
    """Each head, on each prompt, computes only the blocks that its last queries say it needs.

    Where pooled queries and keys predict the attention of the last queries (the root of the Jensen-Shannon divergence
    is below `tau`), blocks are taken by that prediction, for every block of queries its own ("query-aware"); else the
    columns and distances that the last queries attend to are taken for all ("vertical-slash"). The first block of keys
    and the diagonal are always kept.

    Notes: "query_aware", 1 where a head was; "computed", share of the causal scores that were computed; "covered",
    share of the estimated attention that lies in the kept blocks, at least `gamma`.

    Fields:
        gamma: share of estimated attention to cover; 1 keeps every block.
        tau: largest distance at which a head counts as query-aware; 0 for none.
        block: tokens of a block; smaller ones fit short prompts.
        budget: tokens of columns, and of distances, that are taken however little mass they need; prompts of up to
            twice a block or this are attended in full.
    """

    row: ClassVar[str] = "s080"
    gamma: float = 0.9
    tau: float = 0.1
    block: int = 128
    budget: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1 or not 0 <= self.tau <= 1:
            raise ValueError(f"gamma {self.gamma} must be above 0 and at most 1, tau {self.tau} from 0 to 1.")
        if self.block < 1 or self.budget < 0:
            raise ValueError(f"block {self.block} must be at least 1 and budget {self.budget} at least 0.")

    def mix(self, q: Tensor, k: Tensor, v: Tensor, scale: float, note: Note = quiet) -> Tensor:
        """Give z [B, H, Tq, dv]; each block of queries meets only the kept blocks of keys, head by head."""
        length, keys = q.shape[2], k.shape[2]
        if self._short(length):
            whole = causal(length, keys, q.device)
            for name, value in (("query_aware", 0.0), ("computed", 1.0), ("covered", 1.0)):
                note(name, torch.full(q.shape[:2], value))
            return scaled_dot_product_attention(q, k, v, whole, scale=scale, enable_gqa=True)
        keep = self.kept(q, k, scale, note)
        places = torch.arange(keys, device=q.device)
        past, group = keys - length, q.shape[1] // k.shape[1]
        first = past // self.block
        rows = []
        for line in range(keep.shape[2]):
            start = max(0, (first + line) * self.block - past)
            stop = min(length, (first + line + 1) * self.block - past)
            at = places[past + start : past + stop, None]
            seen = keep[:, :, line].repeat_interleave(self.block, -1)[..., : past + stop]
            heads = []
            for row in range(q.shape[0]):
                for head in range(q.shape[1]):
                    columns = seen[row, head].nonzero()[:, 0]
                    own = row, head // group, columns
                    heads.append(
                        scaled_dot_product_attention(
                            q[row, head, start:stop][None], k[own][None], v[own][None], columns <= at, scale=scale
                        )
                    )
            rows.append(torch.cat(heads).unflatten(0, q.shape[:2]))
        return torch.cat(rows, 2)

    def pattern(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Softmax over the tokens of kept blocks."""
        length, keys = q.shape[2], k.shape[2]
        seen = causal(length, keys, q.device)
        if not self._short(length):
            lines = torch.arange(keys - length, keys, device=q.device) // self.block
            columns = torch.arange(keys, device=q.device) // self.block
            seen = seen & self.kept(q, k, scale)[:, :, lines - lines[0]][..., columns]
        return softmax_scores(q, k, scale, seen)

    def kept(self, q: Tensor, k: Tensor, scale: float, note: Note = quiet) -> Tensor:
        """[B, H, query blocks, key blocks] true where a block is computed. Blocks are counted from the first key."""
        length, keys = q.shape[2], k.shape[2]
        count, first = math.ceil(keys / self.block), (keys - length) // self.block
        lines, columns = torch.arange(first, count, device=q.device)[:, None], torch.arange(count, device=q.device)
        allowed = columns <= lines
        vertical, slash = self._last(q, k, scale)
        pooled, keys_pooled = self._pooled(q, keys - length), self._pooled(per_head(k, q.shape[1]), 0)
        guess = (self._mean_of_last(q) @ keys_pooled.transpose(2, 3)).float().mul(scale).softmax(-1)[:, :, 0]
        aware = _divergence(vertical, guess) < self.tau
        least = min(count, math.ceil(self.budget / self.block))
        share = torch.where(aware, 0.0, self.gamma)[..., None]
        by_distance = _cover(slash, share, least)
        ago = lines - columns
        near = by_distance[..., ago.clamp(min=0)] | (by_distance[..., (ago - 1).clamp(min=0)] & (ago > 0))
        stripes = _cover(vertical, share, least)[:, :, None] | near
        flat = (pooled @ keys_pooled.transpose(2, 3)).float().mul(scale).masked_fill(~allowed, -torch.inf).softmax(-1)
        chosen = _cover(flat.flatten(2), self.gamma, 0).view_as(flat) & aware[..., None, None]
        keep = (chosen | stripes | (columns == 0) | (ago == 0)) & allowed
        self._tell(note, keep, aware, vertical, flat, length, keys)
        return keep

    def _tell(self, note: Note, keep: Tensor, aware: Tensor, vertical: Tensor, flat: Tensor, length: int, keys: int):
        if note is quiet:
            return
        sizes = torch.nn.functional.one_hot(torch.arange(keys, device=keep.device) // self.block).float()
        whole = causal(length, keys, keep.device).float() @ sizes
        lines = torch.arange(keys - length, keys, device=keep.device) // self.block
        per_block = torch.zeros(keep.shape[2:], device=keep.device).index_add_(0, lines - lines[0], whole)
        note("query_aware", aware.float())
        note("computed", (keep * per_block).sum((2, 3)) / per_block.sum())
        by_last, by_pools = (vertical * keep[:, :, -1]).sum(-1), (flat * keep).sum((2, 3)) / flat.shape[2]
        note("covered", torch.where(aware, by_pools, by_last))

    def _short(self, length: int) -> bool:
        return self.gamma == 1 or length <= max(2 * self.block, self.budget)

    def _last(self, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of the last queries, summed over blocks of keys and of distances: each [B, H, blocks]."""
        last, keys = q[:, :, -self.block :], k.shape[2]
        weights = softmax_scores(last, k, scale, causal(last.shape[2], keys, q.device)) / last.shape[2]
        columns = torch.arange(keys, device=q.device)
        distances = (columns[keys - last.shape[2] :, None] - columns).clamp(min=0) // self.block
        count = math.ceil(keys / self.block)
        blank = weights.new_zeros(*weights.shape[:2], count)
        vertical = blank.index_add(2, columns // self.block, weights.sum(2))
        return vertical, blank.index_add(2, distances.flatten(), weights.flatten(2))

    def _mean_of_last(self, q: Tensor) -> Tensor:
        return q[:, :, -self.block :].mean(2, keepdim=True)

    def _pooled(self, x: Tensor, past: int) -> Tensor:
        """Means [B, H, blocks, d] over the tokens that each block has; the first token stands at `past`."""
        lead = past % self.block
        more = -(lead + x.shape[2]) % self.block
        filled = pad(x, (0, 0, lead, more)).unflatten(2, (-1, self.block)).sum(3)
        counts = pad(x.new_ones(x.shape[2]), (lead, more)).view(-1, self.block).sum(1)
        return filled / counts[:, None]


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence of distributions along the last axis, in nats."""
    middle = (p + q) / 2
    parts = [torch.xlogy(one, one / middle.clamp_min(1e-30)).sum(-1) for one in (p, q)]
    return (sum(parts) / 2).clamp_min(0).sqrt()


def _cover(mass: Tensor, share: "Tensor | float", least: int) -> Tensor:
    """The fewest entries of the last axis, at least `least`, that hold this share of the mass: true where chosen."""
    order = mass.sort(-1, descending=True)
    before = order.values.cumsum(-1) - order.values
    rank = torch.arange(mass.shape[-1], device=mass.device)
    wanted = (before < share * mass.sum(-1, keepdim=True)) | (rank < least)
    return torch.zeros_like(wanted).scatter(-1, order.indices, wanted)
