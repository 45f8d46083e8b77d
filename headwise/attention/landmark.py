"""Landmark Attention: Random-Access Infinite Context Length for Transformers. Mohtashami and Jaggi, 2023.
arXiv:2305.16300

Row s091 of the mission. For models trained so, on tokens with a landmark after every block (`with_landmarks`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

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
        """Give z [B, H, Tq, dv]; where only some blocks are read, the queries of one block at a time."""
        length, keys, size = q.shape[2], k.shape[2], self.block + 1
        past, heads = keys - length, q.shape[1]
        k, v = per_head(k, heads), per_head(v, heads)
        if self.top is None:
            note("read", torch.ones(q.shape[:2]))
            return self._whole(q * scale, k, v)
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

    def _whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All blocks at once, as in training."""
        length, keys, size = q.shape[2], k.shape[2], self.block + 1
        at = torch.arange(keys - length, keys, device=q.device)
        k, v = (pad(x, (0, 0, 0, -keys % size)) for x in (k, v))
        blocks = self._scores(q, k, at // size).unflatten(-1, (-1, size))
        members, marks = blocks[..., :-1], blocks[..., -1]
        numbers = torch.arange(marks.shape[-1], device=q.device)
        there = numbers[:, None] * size + torch.arange(self.block, device=q.device)
        own = (numbers[:, None] == (at // size)[:, None, None]) & (there <= at[:, None, None])
        near = members.masked_fill(~own, -torch.inf).flatten(-2)
        marks = marks.masked_fill(numbers >= (at // size)[:, None], -torch.inf)
        outer = torch.cat([near, marks], -1).softmax(-1)
        near, marks = outer[..., : near.shape[-1]].view_as(members), outer[..., near.shape[-1] :]
        weights = (near + marks[..., None] * members.softmax(-1)).flatten(-2).to(v.dtype)
        return weights @ v.unflatten(2, (-1, size))[:, :, :, :-1].flatten(2, 3)

    def _block(self, q: Tensor, near: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor) -> tuple[Tensor, int]:
        """Queries [B, H, n, d] of one block: z, and how many scores of earlier blocks were computed for a head."""
        rows, heads, length, count = *q.shape[:3], far_k.shape[2]
        nearer = torch.zeros(count, device=q.device)
        if self.reach is not None:
            nearer = torch.arange(count - self.reach, -self.reach, -1, device=q.device).clamp(min=0) * (self.block + 1)
        marks = (q @ self._turned(far_k[:, :, :, -1], nearer).transpose(2, 3)).float()
        best = marks.topk(min(self.top or 0, count), -1)
        outer = torch.cat([near, best.values], -1).softmax(-1).to(v.dtype)
        own, shares = outer.split([near.shape[-1], best.values.shape[-1]], -1)
        at = torch.arange(rows)[:, None, None, None], torch.arange(heads)[:, None, None], best.indices
        block_k = self._turned(far_k[at][..., :-1, :], nearer[best.indices][..., None])
        inner = torch.einsum("bhqd,bhqtkd->bhqtk", q, block_k).float().softmax(-1).to(v.dtype)
        z = own @ v + torch.einsum("bhqt,bhqtk,bhqtkd->bhqd", shares, inner, far_v[at][..., :-1, :])
        return z, length * (count + shares.shape[-1] * self.block)

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
