"""Sinks and a ring of recent tokens: the store of every method that keeps the start and the end of the text."""

import torch
from torch import Tensor

from headwise.store import Store, Turn, mix


class Ring(Store):
    """The first `sink` real tokens of each row, and the last `recent` columns in a ring written in place.

    Memory does not grow with the text. Many new tokens are read in blocks of queries, each with the keys it can see: a
    prompt of T tokens costs T * (sink + recent + block) scores, not T * T.

    With `whole`, a pass of more than `recent` new tokens is taken for a prompt: its tokens all see each other, and only
    then is anything dropped.
    """

    def __init__(self, sink: int, recent: int, *, whole: bool = False) -> None:
        super().__init__()
        self.sink, self.recent, self.whole = sink, recent, whole
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def one_by_one(self) -> int:
        """A prompt that sees itself whole is longer than the ring."""
        return self.recent if self.whole else super().one_by_one

    def openings(self, length: int) -> range:
        """All of a prompt that sees itself whole; else no more than sinks and ring hold, before anything is dropped."""
        if self.whole and length > self.recent:
            return range(length, length + 1)
        return range(min(length, self.sink + self.recent) + 1)

    def read(self, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        """Queries see the sinks and the last `recent` columns, their own among them."""
        turn.plain("A streaming cache")
        length = k.shape[2]
        if length == 1:
            self.remember(k, v, turn)
            return self._one(q, turn)
        prompt = self.whole and length > self.recent
        if turn.past == 0 and turn.pads is None and (prompt or length <= self.recent):
            self.remember(k, v, turn)
            return mix(q, k, v, None, turn, causal=True)
        z = self._prompt(q, k, v, turn) if prompt else self._many(q, k, v, turn)
        self.remember(k, v, turn)
        return z

    def remember(self, k: Tensor, v: Tensor, turn: Turn) -> None:
        """Put new tokens [B, H, Q, d] into the sinks they belong to and into the ring."""
        if self.k is None or self.v is None:
            room = self.sink + self.recent
            self.k, self.v = (one.new_zeros(*one.shape[:2], room, one.shape[3]) for one in (k, v))
        kept = min(k.shape[2], self.recent)
        end = turn.past + k.shape[2]
        for room, new in ((self.k, k), (self.v, v)):
            self._fill_sinks(room, new, turn)
            if kept == 1:
                slot = (end - 1) % self.recent + self.sink
                room[:, :, slot : slot + 1] = new[:, :, -1:]
            else:
                slots = torch.arange(end - kept, end, device=k.device) % self.recent + self.sink
                room[:, :, slots] = new[:, :, -kept:]

    def _fill_sinks(self, room: Tensor, new: Tensor, turn: Turn) -> None:
        length = new.shape[2]
        if turn.pads is None:
            stop = min(self.sink, turn.past + length)
            if stop > turn.past:
                room[:, :, turn.past : stop] = new[:, :, : stop - turn.past]
            return
        source = turn.pads[:, None] + torch.arange(self.sink, device=new.device) - turn.past
        inside = (source >= 0) & (source < length)
        if bool(inside.any()):
            at = source.clamp(0, length - 1)[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
            room[:, :, : self.sink] = torch.where(inside[:, None, :, None], new.gather(2, at), room[:, :, : self.sink])

    def columns(self, turn: Turn, end: int, device: torch.device) -> Tensor:
        """[B or 1, 1, 1, sink + recent] the column that each slot holds once `end` columns are in; -1 where none.

        A token that is a sink and recent too is counted once, as a sink.
        """
        first = torch.zeros(1, 1, dtype=torch.long, device=device) if turn.pads is None else turn.pads[:, None]
        sinks = first + torch.arange(self.sink, device=device)
        slots = torch.arange(self.recent, device=device)
        recent = (end - 1 - (end - 1 - slots) % self.recent).expand(len(first), -1)
        sinks = sinks.masked_fill(sinks >= end, -1)
        recent = recent.masked_fill(recent < first + self.sink, -1)
        return torch.cat([sinks, recent], 1)[:, None, None]

    def _one(self, q: Tensor, turn: Turn) -> Tensor:
        assert self.k is not None and self.v is not None
        end = turn.past + 1
        if turn.pads is None and end >= self.sink + self.recent:
            return mix(q, self.k, self.v, None, turn)
        columns = self.columns(turn, end, q.device)
        return mix(q, self.k, self.v, turn.seen(turn.columns(1, q.device), columns), turn)

    def _prompt(self, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        """Queries see each other's tokens and what is held from before, the ring by each query's own window."""
        queries = turn.columns(k.shape[2], q.device)
        if self.k is None or self.v is None:
            return mix(q, k, v, turn.seen(queries, queries), turn)
        old = self.columns(turn, turn.past, q.device)
        places = torch.cat([old, queries.expand(len(old), 1, 1, -1)], 3)
        near = torch.arange(places.shape[3], device=q.device)
        near = (near < self.sink) | (near >= old.shape[3]) | (places > queries[:, None] - self.recent)
        seen = turn.seen(queries, places) & near
        return mix(q, torch.cat([self.k, k], 2), torch.cat([self.v, v], 2), seen, turn)

    def _many(self, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        """Blocks of queries, each beside the sinks, what the ring still holds for it, and the new keys it can see."""
        length, device = k.shape[2], q.device
        first = torch.zeros(1, 1, dtype=torch.long, device=device) if turn.pads is None else turn.pads[:, None]
        old = self.columns(turn, turn.past, device).expand(len(first), 1, 1, -1) if self.k is not None else None
        sinks = self._new_sinks(k, v, turn, first)
        block = max(64, self.recent)
        parts = []
        for start in range(0, length, block):
            stop = min(length, start + block)
            low = max(0, start - self.recent + 1)
            keys, values = [sinks[0], k[:, :, low:stop]], [sinks[1], v[:, :, low:stop]]
            columns = turn.past + torch.arange(low, stop, device=device).expand(len(first), -1)
            here = [sinks[2], columns.masked_fill((columns >= first) & (columns < first + self.sink), -1)]
            if old is not None and self.k is not None and self.v is not None:
                upto = self.sink if start >= self.recent - 1 else self.sink + self.recent
                keys.append(self.k[:, :, :upto])
                values.append(self.v[:, :, :upto])
                here.append(old[:, 0, 0, :upto])
            places = torch.cat(here, 1)[:, None, None]
            queries = turn.past + torch.arange(start, stop, device=device)
            seen = turn.seen(queries, places)
            is_sink = (places >= first[:, :, None, None]) & (places < (first + self.sink)[:, :, None, None])
            seen = seen & (is_sink | (places > queries[None, None, :, None] - self.recent))
            parts.append(mix(q[:, :, start:stop], torch.cat(keys, 2), torch.cat(values, 2), seen, turn))
        return torch.cat(parts, 2)

    def _new_sinks(self, k: Tensor, v: Tensor, turn: Turn, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sinks among the new tokens, once for all blocks: keys, values [B, H, s, d], columns [B or 1, s]."""
        source = first + torch.arange(self.sink, device=k.device) - turn.past
        inside = (source >= 0) & (source < k.shape[2])
        if not bool(inside.any()):
            return k[:, :, :0], v[:, :, :0], source[:, :0]
        at = source.clamp(0, k.shape[2] - 1)[:, None, :, None]
        taken = [one.gather(2, at.expand(one.shape[0], one.shape[1], -1, one.shape[3])) for one in (k, v)]
        return taken[0], taken[1], (source + turn.past).masked_fill(~inside, -1)
