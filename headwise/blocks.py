"""Keys in blocks: bounds of their channels, reading scattered columns, buffers that let go of their start, replaying.

Shared by the cache methods that keep every key and choose which of them a query reads.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from headwise.rotary import Rotate
from headwise.store import Buffer, Store, Turn


def columns_of(x: Tensor, columns: Tensor) -> Tensor:
    """The entries of x [B, H, T, d] at columns [B, H or 1, K] -> [B, H, K, d]; columns outside give the nearest one."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None, None]
    heads = torch.arange(x.shape[1], device=x.device)[None, :, None]
    return x[rows, heads, columns.clamp(0, x.shape[2] - 1)]


def rotation_of(turn: Turn, method: str) -> Rotate:
    """How keys are moved in this model. Raises ValueError where its positions are not rotary."""
    rotate = turn.rotation() if turn.rotation is not None else None
    if rotate is None:
        raise ValueError(
            f"{method} moves keys to other positions, which works with rotary positions that are the same in every "
            "layer; this model has others. cache.pages leaves positions as they are."
        )
    return rotate


class Bounds(Buffer):
    """The smallest and the largest value of each channel over each `size` keys, counted from a row's first real token.

    `k` [B, H, pieces, d] holds the smallest, `v` the largest. Pieces without keys have inf and -inf.

    Attributes:
        first: [B] the first real column of each row; least: the smallest of them, as a number.
        padded: whether any row is padded.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.first = torch.empty(0)
        self.least, self.padded = 0, False

    def take(self, k: Tensor, start: int, pads: Tensor | None) -> None:
        """Widen by keys k [B, H, Q, d] in columns from `start`; pads [B] is read when the first keys come."""
        if not self.length:
            self.first = k.new_zeros(k.shape[0], dtype=torch.long) if pads is None else pads.clone()
            self.padded = pads is not None
            self.least = int(self.first.min()) if self.padded else 0
        need = max(0, (start + k.shape[2] - 1 - self.least) // self.size + 1) - self.length
        if need > 0:
            empty = k.new_full((k.shape[0], k.shape[1], need, k.shape[3]), torch.inf)
            self.append(empty, -empty)
        if k.shape[2] and self.length:
            places = torch.arange(start, start + k.shape[2], device=k.device) - self.first[:, None]
            index = (places.clamp_min(0) // self.size)[:, None, :, None].expand_as(k)
            padding = (places < 0)[:, None, :, None]
            self.k.scatter_reduce_(2, index, k.masked_fill(padding, torch.inf), "amin")
            self.v.scatter_reduce_(2, index, k.masked_fill(padding, -torch.inf), "amax")

    def shrink(self, k: Tensor) -> None:
        """What is left when k [B, H, T, d] are all keys that are still there."""
        if not self.length:
            return
        pieces = torch.arange(self.length, device=k.device)
        gone = (pieces >= ((k.shape[2] - self.first) // self.size)[:, None])[:, None, :, None]
        self.k.masked_fill_(gone, torch.inf)
        self.v.masked_fill_(gone, -torch.inf)
        start = max(0, k.shape[2] - self.size)
        self.take(k[:, :, start:], start, None)

    def above(self, q: Tensor, pieces: int) -> Tensor:
        """No less than q.k for any key of a piece: q [B, H*G, 1, d] -> [B, H, G, pieces]."""
        batch, _, _, size = q.shape
        q = q.reshape(batch, self.k.shape[1], -1, size)
        low, high = (one[:, :, :pieces].transpose(2, 3) for one in (self.k, self.v))
        return q.clamp_min(0) @ high + q.clamp_max(0) @ low

    def pick(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        super().pick(rows)
        if self.length:
            self.first = self.first.index_select(0, rows)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that are held."""
        yield from super().tensors()
        yield self.first


class Shelf(Buffer):
    """A buffer that lets go of its oldest tokens.

    Attributes:
        start: the column of its first token.
    """

    def __init__(self, reserve: int = 0) -> None:
        super().__init__(reserve)
        self.start = 0

    def drop(self, tokens: int) -> None:
        """Let go of the first tokens; their memory is freed."""
        if tokens > 0:
            k, v, self.start = self.k[:, :, tokens:].clone(), self.v[:, :, tokens:].clone(), self.start + tokens
            super().clear()
            if k.shape[2]:
                self.append(k, v)

    def clear(self) -> None:
        """Hold nothing."""
        super().clear()
        self.start = 0


class Replaying(Store):
    """A store whose turns are taken back by reading what stays of them once more: what it keeps depends on queries."""

    def __init__(self) -> None:
        super().__init__()
        self._queries: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        """`read`, with the queries kept where recording is on."""
        if self.recording:
            self._past.append((self._state() | {"_queries": q}, k, v, turn))
        return self.read(q, k, v, turn)

    def remember(self, k: Tensor, v: Tensor, turn: Turn) -> None:
        """Read the first tokens of a turn that was taken back."""
        assert self._queries is not None
        q, self._queries = self._queries, None
        self.read(q[:, :, : k.shape[2]], k, v, turn)

    def crop(self, tokens: int) -> None:
        """Take the last tokens back. Raises ValueError: more tokens than the recorded turns held."""
        super().crop(tokens)
        self._queries = None


class Offloaded(Buffer):
    """A buffer in host memory, whatever device keys come from."""

    def append(self, k: Tensor, v: Tensor) -> None:
        """Copy k [B, H, Q, d] and v [B, H, Q, dv] to the host, behind what is there."""
        super().append(k.cpu(), v.cpu())

    def pick(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        super().pick(rows.cpu())
