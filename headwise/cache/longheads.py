"""LongHeads: Multi-Head Attention is Secretly a Long Context Processor. Lu et al., 2024. arXiv:2402.10685"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headwise.blocks import Appended, Replaying, Shelf, columns_of, cuts, later_first, rotation_of
from headwise.kv_cache import CacheMethod
from headwise.rotary import Rotate
from headwise.store import Store, Turn, mix

NONE = -1


@dataclass(frozen=True)
class LongHeads(CacheMethod):
    """Every query head reads a few chunks of the text that fit its query, laid side by side within the trained range.

    All keys are kept. A chunk is known by a key that its own attention points to: the mean of what its queries read in
    it is the query, and what that reads of the chunk's keys is the answer. The first chunk and the last two are always
    read.

    Fields:
        chunk: tokens of a chunk. chunks: how many a query reads, its own among them, 4 or more.
        together: tokens of a long turn that choose together. single: turns up to this length choose token by token.
    """

    row: ClassVar[str] = "s115"
    chunk: int = 256
    chunks: int = 8
    together: int = 64
    single: int = 32

    def __post_init__(self) -> None:
        if min(self.chunk, self.together, self.single) < 1 or self.chunks < 4:
            raise ValueError(
                f"chunk is {self.chunk}, chunks {self.chunks}, together {self.together} and single {self.single}; "
                "allowed are 4 chunks or more, and the others from 1."
            )

    def store(self, reserve: int = 0) -> Store:
        """All keys and values of some KV heads, and what their chunks are known by."""
        return Chunks(self, reserve)


class Chunks(Replaying):
    """Keys and values of every token, queries of the chunk that is not complete, and a key for each complete chunk.

    Chunks are counted from the first real token of each row.

    Attributes:
        chosen: [B, H*G, chunks - 1] the chunks that were read last, in order; -1 where there are fewer.
    """

    def __init__(self, method: LongHeads, reserve: int = 0) -> None:
        super().__init__()
        self.method = method
        self.kept = Appended(reserve)
        self.asked = Shelf()
        self.asked.codable = False
        self.known: Tensor | None = None  # [B, H*G, chunks, d]
        self.count: Tensor | None = None  # [B] complete chunks of each row
        self.chosen: Tensor | None = None

    @property
    def one_by_one(self) -> int:
        """What the method says."""
        return self.method.single

    def read(self, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        """Own chunk, the one before, the first, and those that fit."""
        turn.plain("A LongHeads cache")
        rotate = rotation_of(turn, "LongHeads")
        if v.shape[3] != q.shape[3]:
            raise ValueError(
                f"LongHeads asks with values, so they must be as wide as queries; here they have {v.shape[3]} and "
                f"{q.shape[3]} channels."
            )
        if self.count is None:
            self.count = torch.zeros_like(self.first)
        self.kept.append(k, v)
        self.asked.append(q, q[..., :0])
        self._sum_up(turn, rotate)
        parts = [
            self._look(q[:, :, a:b], turn.past + a, turn, rotate)
            for a, b in cuts(q.shape[2], self.method.single, self.method.together)
        ]
        return torch.cat(parts, 2)

    def _sum_up(self, turn: Turn, rotate: Rotate) -> None:
        """Find the key of each chunk that is complete now."""
        assert self.count is not None
        before, size = self.count, self.method.chunk
        scale = self.asked.k.shape[3] ** -0.5 if turn.scale is None else turn.scale
        for number, rows in self.finished(self.kept.length, 0, size, before):
            columns = (self.first[rows, None] + number * size + torch.arange(size, device=rows.device))[:, None]
            q = columns_of(self.asked.k[rows], columns.expand(-1, self.asked.k.shape[1], -1) - self.asked.start)
            k, v = (columns_of(one[rows], columns.expand(-1, q.shape[1], -1)) for one in (self.kept.k, self.kept.v))
            said = ((q @ k.transpose(2, 3) * scale).float().softmax(-1).to(v.dtype) @ v).mean(2, keepdim=True)
            local = rotate(k, torch.full((size,), -number * size, device=rows.device))
            key = (said @ local.transpose(2, 3) * q.shape[3] ** -0.5).float().softmax(-1).to(v.dtype) @ local
            if self.known is None or self.known.shape[2] <= number:
                room = q.new_zeros(len(self.first), q.shape[1], 1, q.shape[3])
                self.known = room if self.known is None else torch.cat([self.known, room], 2)
            self.known[rows, :, number] = key[:, :, 0]
            self.count = self.count.index_fill(0, rows, number + 1)
        if self.count is not before:
            self.asked.drop(int((self.first + self.count * size).min()) - self.asked.start)

    def _look(self, q: Tensor, column: int, turn: Turn, rotate: Rotate) -> Tensor:
        """What tokens that choose together read."""
        method, n = self.method, self.method.chunks - 1
        queries = torch.arange(column, column + q.shape[2], device=q.device)
        if (column - self.least) // method.chunk <= n:
            end = column + q.shape[2]
            return mix(
                q,
                self.kept.k[:, :, :end],
                self.kept.v[:, :, :end],
                turn.seen(queries, queries.new_tensor(range(end))),
                turn,
            )
        own = (column - self.first) // method.chunk
        chosen = self._choose(q, queries, own, rotate)
        start = self.first[:, None, None]
        inside = torch.arange(method.chunk, device=q.device)
        far = ((start + chosen * method.chunk)[..., None] + inside).flatten(2)
        tail = torch.arange(method.chunk - 1 + q.shape[2], device=q.device)
        near = (start + own[:, None, None] * method.chunk + tail).expand(-1, q.shape[1], -1)
        # Chunks move to where they touch; the last of them and the own one stay.
        by = (own[:, None, None] - chosen - n + torch.arange(n, device=q.device)) * method.chunk
        moved = rotate(columns_of(self.kept.k, far), by.repeat_interleave(method.chunk, 2))
        k = torch.cat([moved, columns_of(self.kept.k, near)], 2)
        v = columns_of(self.kept.v, torch.cat([far, near], 2))
        there = (chosen != NONE).repeat_interleave(method.chunk, 2)[:, :, None].expand(-1, -1, q.shape[2], -1)
        near, here = near[:, :, None], queries[:, None]
        seen = torch.cat([there, ((near <= here) & (near >= start[..., None])) | (near == here)], 3)
        return mix(q, k, v, seen, turn)

    def _choose(self, q: Tensor, queries: Tensor, own: Tensor, rotate: Rotate) -> Tensor:
        """[B, H*G, chunks - 1] the chunks before the own one [B] that each query head reads, in order."""
        assert self.known is not None
        real = (queries >= self.first[:, None])[:, None, :, None]
        flat = rotate(q, (self.first[:, None] - queries)[:, None].expand(-1, q.shape[1], -1)) * real
        fit = later_first((flat.sum(2, keepdim=True) @ self.known.transpose(2, 3))[:, :, 0])
        numbers = torch.arange(fit.shape[2], device=q.device)
        own = own[:, None, None]
        fit = fit.masked_fill((numbers == 0) | (numbers == own - 1), torch.inf).masked_fill(numbers >= own, -torch.inf)
        best = fit.topk(self.method.chunks - 1, 2)
        self.chosen = best.indices.masked_fill(best.values == -torch.inf, NONE).sort(2).values
        return self.chosen
