"""Landmark Attention: Random-Access Infinite Context Length for Transformers. Mohtashami and Jaggi, 2023.
arXiv:2305.16300

Row s091 of the mission. For models trained so, on tokens with a landmark after every block (`with_landmarks`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headwise.mixing import AttentionMethod, Note, per_head, quiet


@dataclass(frozen=True)
class Landmark(AttentionMethod):
    """A token weighs as much as it does in its block, times what the landmark of its block weighs: a grouped softmax.

    The tokens of the query's own block and the landmarks of the blocks before share one softmax; the weight of a
    landmark goes to the tokens of its block, by a softmax among them. A landmark passes on no value of its own. With
    `top`, each head of each query looks only into the blocks whose landmarks it scores highest, and reads no others.

    Notes: "read", share of the causal scores that were computed, those of landmarks among them.

    Fields:
        block: tokens of a block; one landmark follows them, so that it stands at every `block + 1`-th column.
        top: blocks that a query looks back into; None, as in training, for all.
        reach: blocks farther back than this are turned to look as if they were this far back, so that no position is
            farther than in training; None for where they are. For models whose rotary angles have the base `theta`.
    """

    row: ClassVar[str] = "s091"
    block: int = 50
    top: int | None = None
    reach: int | None = None
    theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.block < 1 or (self.top or 0) < 0 or (self.reach is not None and self.reach < 1):
            raise ValueError(
                f"block {self.block} must be at least 1, top {self.top} at least 0 or None, "
                f"reach {self.reach} at least 1 or None."
            )

    def mix(self, q: Tensor, k: Tensor, v: Tensor, scale: float, note: Note = quiet) -> Tensor:
        """Give z [B, H, Tq, dv]; the queries of one block at a time."""
        length, keys, size = q.shape[2], k.shape[2], self.block + 1
        past, heads = keys - length, q.shape[1]
        k, v = per_head(k, heads), per_head(v, heads)
        parts, read = [], torch.zeros(q.shape[:2])
        for own in range(past // size, (keys - 1) // size + 1):
            start, stop = max(past, own * size), min(keys, (own + 1) * size)
            mine = q[:, :, start - past : stop - past] * scale
            columns = slice(own * size, min(stop, own * size + self.block))
            near = (mine @ k[:, :, columns].transpose(2, 3)).float()
            at, there = torch.arange(start, stop)[:, None], torch.arange(columns.start, columns.stop)
            near = near.masked_fill((there > at).to(q.device), -torch.inf)
            earlier = (x[:, :, : own * size].unflatten(2, (own, size)) for x in (k, v))
            z, seen = self._block(mine, near, v[:, :, columns], *earlier)
            parts.append(z)
            read += (there <= at).sum() + seen
        note("read", read / (length * past + length * (length + 1) / 2))
        return torch.cat(parts, 2)

    def _block(self, q: Tensor, near: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, H, n, d] of one block: z, and how many scores of earlier blocks were computed, [B, H]."""
        count = far_k.shape[2]
        nearer = torch.zeros(count, device=q.device)
        if self.reach is not None:
            nearer = torch.arange(count - self.reach, -self.reach, -1, device=q.device).clamp(min=0) * (self.block + 1)
        marks = (q @ self._turned(far_k[:, :, :, -1], nearer).transpose(2, 3)).float()
        chosen = _highest(marks, count if self.top is None else self.top)
        outer = torch.cat([near, marks.masked_fill(~chosen, -torch.inf)], -1).softmax(-1).to(v.dtype)
        z = outer[..., : near.shape[-1]] @ v
        shares = outer[..., near.shape[-1] :]
        seen = torch.tensor(q.shape[2] * count) + chosen.sum((2, 3)).cpu() * self.block
        if self.top is None and count:
            far_k = self._turned(far_k[:, :, :, :-1], nearer[:, None])
            inner = torch.einsum("bhqd,bhnkd->bhqnk", q, far_k).float().softmax(-1).to(v.dtype)
            return z + torch.einsum("bhqn,bhqnk,bhnkd->bhqd", shares, inner, far_v[:, :, :, :-1]), seen
        added = torch.zeros_like(z)
        for row, head, number in chosen.any(2).nonzero().tolist():
            asking = chosen[row, head, :, number].nonzero()[:, 0]
            block_k = self._turned(far_k[row, head, number, :-1], nearer[number])
            inner = (q[row, head, asking] @ block_k.T).float().softmax(-1).to(v.dtype)
            value = shares[row, head, asking, number, None] * (inner @ far_v[row, head, number, :-1])
            added = added.index_put((torch.tensor(row), torch.tensor(head), asking), value, accumulate=True)
        return z + added, seen

    def _turned(self, x: Tensor, by: Tensor) -> Tensor:
        """Rotated queries or keys as if they stood `by` positions later; angles pair the halves of a head."""
        if self.reach is None:
            return x
        half = x.shape[-1] // 2
        angle = by[..., None] * self.theta ** -(torch.arange(half, device=x.device) / half)
        cos, sin = angle.cos(), angle.sin()
        one, other = x.float().split(half, -1)
        return torch.cat([one * cos - other * sin, one * sin + other * cos], -1).to(x.dtype)

    def pattern(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """The grouped softmax written out over all tokens; landmarks have weight 0."""
        length, keys, size = q.shape[2], k.shape[2], self.block + 1
        columns = torch.arange(keys, device=q.device)
        at, block, is_mark = columns[keys - length :, None], columns // size, columns % size == self.block
        scores = self._scores(q, per_head(k, q.shape[1]), at[:, 0] // size) * scale
        own = (block == at // size) & (columns <= at) & ~is_mark
        before = (block < at // size) & is_mark
        marks = _highest(scores.masked_fill(~before, -torch.inf), keys if self.top is None else self.top) & before
        outer = scores.masked_fill(~(own | marks), -torch.inf).softmax(-1)
        weights = outer * own
        for number in range(keys // size):
            members = (block == number) & ~is_mark
            inner = scores.masked_fill(~members, -torch.inf).softmax(-1)
            mark = (outer * (before & (block == number))).sum(-1, keepdim=True)
            weights = weights + mark * inner
        return weights

    def _scores(self, q: Tensor, k: Tensor, own: Tensor) -> Tensor:
        """Unscaled scores [B, H, Tq, Tk]; `own` [Tq] is the block of each query, which is turned towards far blocks."""
        if self.reach is None:
            return (q @ k.transpose(2, 3)).float()
        parts = []
        for number, part in enumerate(k.split(self.block + 1, 2)):
            nearer = (own - number - self.reach).clamp(min=0) * (self.block + 1)
            parts.append((self._turned(q, -nearer) @ part.transpose(2, 3)).float())
        return torch.cat(parts, -1)


def _highest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` highest entries of the last axis."""
    order = scores.topk(min(count, scores.shape[-1]), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)


def with_landmarks(ids: Tensor, landmark: int, block: int) -> Tensor:
    """Token ids [B, T] with the landmark's id after every `block` of them."""
    whole = ids.shape[1] // block * block
    blocks = ids[:, :whole].unflatten(1, (-1, block))
    marks = ids.new_full((*blocks.shape[:2], 1), landmark)
    return torch.cat([torch.cat([blocks, marks], 2).flatten(1), ids[:, whole:]], 1)
