"""InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory. Xiao et al., 2024.
arXiv:2402.04617
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from headwise.blocks import Archive, Replaying, Shelf, columns_of, cuts, mix_near_and_far, received, rotation_of
from headwise.kv_cache import CacheMethod
from headwise.rotary import Rotate
from headwise.store import Store, Turn, mix


@dataclass(frozen=True)
class InfLLM(CacheMethod):
    """The start and the recent tokens stay; older blocks go to host memory, and the most relevant ones are fetched.

    A block is known by the mean key of the tokens that queries nearby attended to most. Its relevance is that key times
    the mean query of the tokens that look together, summed over all heads of the layer that are kept so. Fetched
    tokens and sinks all seem to stand `recent + block` tokens back, so that no distance is beyond the trained range.

    Fields:
        sink: tokens kept at the start. recent: tokens always seen; up to block + chunk more come with them.
        block: tokens of a block. blocks: how many are fetched. representatives: tokens that stand for a block.
        chunk: tokens of a long turn that look together. single: turns up to this length look token by token.
    """

    row: ClassVar[str] = "s044"
    sink: int = 64
    recent: int = 512
    block: int = 64
    blocks: int = 16
    representatives: int = 4
    chunk: int = 128
    single: int = 32

    def __post_init__(self) -> None:
        sizes = (self.sink, self.recent, self.block, self.blocks, self.representatives, self.chunk, self.single)
        if min(sizes) < 1 or self.representatives > self.block:
            raise ValueError(
                f"Sizes of {sizes} were given for sink, recent, block, blocks, representatives, chunk and single; "
                "allowed are 1 and more, and no more representatives than tokens of a block."
            )

    def store(self, reserve: int = 0) -> Store:
        """What stays and what is offloaded of some KV heads."""
        return Memory(self)


class Memory(Replaying):
    """Sinks, near tokens, the keys that stand for the blocks before them, and those blocks in host memory.

    Keys of sinks and blocks are turned to position 0. Blocks are counted from the first real token of each row.
    """

    def __init__(self, method: InfLLM) -> None:
        super().__init__()
        self.method = method
        self.near = Shelf(method.recent + 2 * method.block + method.chunk)
        self.far = Archive(method.block)
        self.received: Tensor | None = None  # [B, H, near] attention that each near token got
        self.sink_k: Tensor | None = None  # [B, H, sink, d]
        self.sink_v: Tensor | None = None
        self.count: Tensor | None = None  # [B] blocks of each row

    @property
    def one_by_one(self) -> int:
        """What the method says."""
        return self.method.single

    def read(self, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        """Near tokens where they stand, with sinks and fetched blocks at one far place."""
        turn.plain("An InfLLM cache")
        rotate = rotation_of(turn, "InfLLM")
        turn = replace(turn, scale=q.shape[3] ** -0.5 if turn.scale is None else turn.scale)
        if self.count is None:
            self.count = torch.zeros_like(self.first)
        parts = [
            self._look(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], turn.past + a, turn, rotate)
            for a, b in cuts(k.shape[2], self.method.single, self.method.chunk)
        ]
        return torch.cat(parts, 2)

    def _look(self, q: Tensor, k: Tensor, v: Tensor, column: int, turn: Turn, rotate: Rotate) -> Tensor:
        """What the tokens of one part read, after the blocks that are old for the first of them went away."""
        self.near.append(k, v)
        new = q.new_zeros(*k.shape[:3], dtype=torch.float32)
        self.received = new if self.received is None else torch.cat([self.received, new], 2)
        start = self._shelve(column, rotate)
        assert self.count is not None
        queries = torch.arange(column, column + q.shape[2], device=q.device)
        columns = self.near.start + torch.arange(self.near.length, device=q.device)
        seen = (columns <= queries[:, None]) & (columns >= start[:, None, None])
        seen = (seen | (columns == queries[:, None]))[:, None]
        real = queries >= self.first[:, None]
        self.received += received(q, self.near.k, seen, real, turn.scale or 1.0)
        if self.far.marks is None or self.sink_k is None or self.sink_v is None:
            return mix(q, self.near.k, self.near.v, seen, turn)
        away = rotate(q, self.method.recent + self.method.block - queries)
        real = real[:, None, :, None]
        k, v, there = self.far.fetch((away * real).sum(2) / real.sum(2).clamp_min(1), self.count, self.method.blocks)
        k, v = torch.cat([self.sink_k, k], 2), torch.cat([self.sink_v, v], 2)
        there = torch.cat([(self.count > 0)[:, None].expand(-1, self.method.sink), there], 1)
        there = there[:, None, None].expand(-1, -1, q.shape[2], -1)
        return mix_near_and_far((q, away), (self.near.k, self.near.v), (k, v), (seen, there), turn)

    def _shelve(self, column: int, rotate: Rotate) -> Tensor:
        """Send away the blocks of which no token is among the `recent` before a column; [B] where the rest begins."""
        assert self.count is not None and self.received is not None
        method, before = self.method, self.count
        for number, rows in self.finished(column - method.recent + 1, method.sink, method.block, before):
            self._send(number, rows, rotate)
            self.count = self.count.index_fill(0, rows, number + 1)
        start = self.first + torch.where(self.count > 0, method.sink + self.count * method.block, 0)
        if self.count is not before:
            gone = int(start.min()) - self.near.start
            self.received = self.received[:, :, gone:].clone()
            self.near.drop(gone)
        return start

    def _send(self, number: int, rows: Tensor, rotate: Rotate) -> None:
        """Move one block of some rows to host memory, and its sinks aside if it is the first."""
        assert self.received is not None
        method, heads = self.method, self.near.k.shape[1]
        start = self.first[rows, None] + method.sink + number * method.block
        columns = (start + torch.arange(method.block, device=rows.device))[:, None].expand(-1, heads, -1)
        k, v = self._turned(rows, columns, rotate)
        top = self.received[rows].gather(2, columns - self.near.start).topk(method.representatives, 2).indices
        mark = k.gather(2, top[..., None].expand(-1, -1, -1, k.shape[3])).mean(2)
        self.far.put(number, rows, len(self.first), k, v, mark)
        if number == 0:
            columns = self.first[rows, None] + torch.arange(method.sink, device=rows.device)
            k, v = self._turned(rows, columns[:, None].expand(-1, heads, -1), rotate)
            if self.sink_k is None or self.sink_v is None:
                self.sink_k, self.sink_v = (one.new_zeros(len(self.first), *one.shape[1:]) for one in (k, v))
            self.sink_k[rows], self.sink_v[rows] = k, v

    def _turned(self, rows: Tensor, columns: Tensor, rotate: Rotate) -> tuple[Tensor, Tensor]:
        """Near keys, turned to position 0, and values of some rows at columns [R, H, T]."""
        k, v = (columns_of(one[rows], columns - self.near.start) for one in (self.near.k, self.near.v))
        return rotate(k, -columns), v

    def offloaded(self) -> Iterator[Tensor]:
        """The tensors in host memory."""
        return self.far.offloaded()
