"""RazorAttention: Efficient KV Cache Compression Through Retrieval Heads. Tang et al., 2024. arXiv:2407.15891

What is kept after n tokens follows from n alone, not from how they were cut into forward passes. What a query sees does
depend on the cut, as in the paper: all of its own forward pass, and of what came before only what was kept. A short
turn, such as a draft, is read as decoding would read it, token by token.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from headwise.kv_cache import CacheMethod
from headwise.narrow import Window
from headwise.store import Store, Turn, mix


@dataclass(frozen=True)
class Razor(CacheMethod):
    """First and recent tokens, and one compensation token with the weight of all dropped ones, of which it is the mean.

    Give it the KV heads that do not retrieve; `heads.echo` and `heads.razor_induction` find those that do. Without the
    compensation token it is `cache.streaming`, but for the prompt, which its own queries see in full here.

    Fields:
        sink: tokens kept at the start of each row.
        recent: most recent tokens kept at least; 4000 in the paper, 256 in the code released with it.
        share: share of all tokens so far that is kept as recent ones where it is more; below 1, 0 for a fixed number.
        single: turns up to this length, but for the first, are read as if their tokens had come one by one; 1 is the
            paper's, under which drafts cannot be read.
    """

    row: ClassVar[str] = "s124"
    sink: int = 4
    recent: int = 256
    share: float = 0.2
    single: int = 32

    def __post_init__(self) -> None:
        Window(self.sink, self.recent)
        if not 0 <= self.share < 1:
            raise ValueError(f"share is {self.share}; allowed is 0 or more, and less than 1.")
        if self.single < 1:
            raise ValueError(f"single is {self.single}; allowed is a length of 1 or more tokens.")

    def store(self, reserve: int = 0) -> Store:
        """Slots for the sinks, for the mean of what was dropped, and for the recent tokens."""
        return _Compensated(self)


class _Compensated(Store):
    """Slots [B, H, room, d]: sinks, the mean of the dropped, a gap of at most an eighth, the recent tokens in order."""

    def __init__(self, method: Razor) -> None:
        super().__init__()
        self.sink, self.recent, self.share, self.single = method.sink, method.recent, method.share, method.single
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.bias: Tensor | None = None  # [B, 1, room, 1] what is added to a slot's score; -inf where it is empty
        self.sums: Tensor | None = None  # [B, H, 1, d + dv] of the dropped keys and values
        self.dropped: Tensor | None = None  # [B] how many they are
        self.start = self.stop = self.sink + 1

    def clear(self) -> None:
        """Hold nothing."""
        super().clear()
        self.start = self.stop = self.sink + 1

    def oldest(self, tokens: int) -> int:
        """The column of the oldest recent token once so many are in; never falls while they grow."""
        return max(0, tokens - max(self.recent, int(self.share * tokens)))

    @property
    def one_by_one(self) -> int:
        """What the method says."""
        return self.single

    def openings(self, length: int) -> range:
        """All of a prompt: only behind it is anything dropped."""
        return range(length, length + 1)

    def read(self, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        """Queries see all that was kept and the new tokens up to their own; then what is too old is dropped."""
        turn.plain("RazorAttention")
        columns = turn.columns(k.shape[2], q.device)
        if turn.past == 0:
            self.remember(k, v, turn)
            seen = None if turn.pads is None else turn.seen(columns, columns)
            return mix(q, k, v, seen, turn, causal=seen is None)
        if 1 < len(columns) <= self.single:
            parts = zip(*(one.split(1, 2) for one in (q, k, v)), strict=True)
            turns = (replace(turn, past=turn.past + i) for i in range(len(columns)))
            return torch.cat([self.read(*part, one) for part, one in zip(parts, turns, strict=True)], 2)
        self._append(k, v, turn)
        bias = self.bias[:, :, : self.stop].transpose(2, 3)
        if len(columns) > 1:
            new = torch.zeros(1, device=q.device).masked_fill(~turn.seen(columns, columns), -torch.inf)
            old = bias[..., : -len(columns)].expand(-1, -1, len(columns), -1)
            bias = torch.cat([old, new.expand(len(old), -1, -1, -1)], 3)
        mean = self.sums[:, :, 0] / self.dropped.clamp_min(1)[:, None, None]
        self.k[:, :, self.sink], self.v[:, :, self.sink] = mean.split([k.shape[3], v.shape[3]], 2)
        z = mix(q, self.k[:, :, : self.stop], self.v[:, :, : self.stop], bias.to(q.dtype), turn)
        self._drop(turn, turn.past + len(columns))
        return z

    def remember(self, k: Tensor, v: Tensor, turn: Turn) -> None:
        """Take in new tokens [B, H, Q, d], and drop what is too old."""
        self._append(k, v, turn)
        self._drop(turn, turn.past + k.shape[2])

    def _append(self, k: Tensor, v: Tensor, turn: Turn) -> None:
        (rows, heads, length, size), width = k.shape, v.shape[3]
        if self.k is None:
            self.k, self.v = (one.new_zeros(rows, heads, self.stop, one.shape[3]) for one in (k, v))
            self.bias = torch.full((rows, 1, self.stop, 1), -torch.inf, device=k.device)
            self.sums = torch.zeros(rows, heads, 1, size + width, device=k.device)
            self.dropped = torch.zeros(rows, dtype=torch.long, device=k.device)
        if self.stop + length > self.k.shape[2]:
            self._move(length + self._spare())
        here = slice(self.stop, self.stop + length)
        self.k[:, :, here], self.v[:, :, here], self.bias[:, :, here] = k, v, 0
        if turn.pads is not None:
            hidden = turn.columns(length, k.device) < turn.pads[:, None]
            self.bias[:, 0, here, 0].masked_fill_(hidden, -torch.inf)
        self.stop += length

    def _spare(self) -> int:
        return max(16, (self.stop - self.start) // 8)

    def _move(self, more: int) -> None:
        """Into new slots, with the recent tokens right behind the fixed ones and room for some more."""
        fixed, recent = slice(self.sink + 1), slice(self.start, self.stop)
        for name, empty in (("k", 0), ("v", 0), ("bias", -torch.inf)):
            was = getattr(self, name)
            new = was.new_full((*was.shape[:2], more, was.shape[3]), empty)
            setattr(self, name, torch.cat([was[:, :, fixed], was[:, :, recent], new], 2))
        self.start, self.stop = self.sink + 1, self.sink + 1 + self.stop - self.start

    def _drop(self, turn: Turn, tokens: int) -> None:
        """What is too old goes to the sinks of its row, or into the mean."""
        first = tokens - (self.stop - self.start)
        count = self.oldest(tokens) - first
        if count <= 0:
            return
        assert self.sums is not None and self.dropped is not None
        away = slice(self.start, self.start + count)
        k, v = self.k[:, :, away], self.v[:, :, away]
        pads = torch.zeros_like(self.dropped) if turn.pads is None else turn.pads
        place = torch.arange(first, first + count, device=k.device) - pads[:, None]
        if first < self.sink or turn.pads is not None:
            self._fill_sinks(k, v, -place[:, :1])
        gone = place >= self.sink
        self.sums += (torch.cat([k, v], 3).float() * gone[:, None, :, None]).sum(2, keepdim=True)
        self.dropped += gone.sum(1)
        self.bias[:, 0, self.sink, 0] = self.dropped.float().log()
        self.bias[:, :, away] = -torch.inf
        self.start += count
        if self.start - self.sink - 1 > self._spare():
            self._move(self._spare())

    def _fill_sinks(self, k: Tensor, v: Tensor, lead: Tensor) -> None:
        """Those among the dropped that are the first of their row; `lead` [B, 1] is where the row begins in them."""
        source = lead + torch.arange(self.sink, device=k.device)
        inside = (source >= 0) & (source < k.shape[2])
        at = source.clamp(0, k.shape[2] - 1)[:, None, :, None]
        for room, new in ((self.k, k), (self.v, v)):
            taken = new.gather(2, at.expand(-1, new.shape[1], -1, new.shape[3]))
            room[:, :, : self.sink] = torch.where(inside[:, None, :, None], taken, room[:, :, : self.sink])
        self.bias[:, 0, : self.sink, 0].masked_fill_(inside, 0)
