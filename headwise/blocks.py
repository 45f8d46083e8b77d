"""Keys in blocks: bounds of their channels, reading scattered columns, buffers that let go of their start, replaying.

Shared by the cache methods that keep every key and choose which of them a query reads.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from headwise.buffer import Buffer
from headwise.rotary import Rotate
from headwise.store import Store, Turn, mix

# Share of the largest fit by which a block is ahead of the one before it where both fit equally well.
TIE = 1e-6


def columns_of(x: Tensor, columns: Tensor) -> Tensor:
    """The entries of x [B, H, T, d] at columns [B, H or H*G, K] -> [B, H or H*G, K, d].

    Columns beside the tensor are taken for the nearest in it; the caller hides what it gets for them.
    """
    heads = torch.arange(max(x.shape[1], columns.shape[1]), device=x.device) * x.shape[1]
    heads = heads // max(x.shape[1], columns.shape[1])
    rows = torch.arange(x.shape[0], device=x.device)[:, None, None]
    return x[rows, heads[None, :, None], columns.clamp(0, x.shape[2] - 1)]


def rotation_of(turn: Turn, method: str) -> Rotate:
    """How keys are moved in this model. Raises ValueError where its positions are not rotary."""
    rotate = turn.rotation() if turn.rotation is not None else None
    if rotate is None:
        raise ValueError(
            f"{method} moves keys to other positions, which works with rotary positions that are the same in every "
            "layer; this model has others. cache.pages leaves positions as they are."
        )
    return rotate


def received(q: Tensor, k: Tensor, seen: Tensor, real: Tensor, scale: float) -> Tensor:
    """Attention that keys k [B, H, K, d] get among themselves from q [B, H*G, Q, d], summed over queries: [B, H, K].

    seen [B or 1, 1, Q, K] says who sees whom, real [B, Q] which queries count.
    """
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = (grouped @ k[:, :, None].transpose(3, 4)).float() * scale
    pattern = scores.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
    return (pattern * real[:, None, None, :, None]).sum((2, 3))


def later_first(fit: Tensor) -> Tensor:
    """Fits [..., N] in which of two that are equal but for rounding the later one is larger.

    The same words said twice fit equally well in the first layer. Which of them was chosen would hang on how many
    tokens are read at a time.
    """
    fit = fit.float()
    return fit + torch.arange(fit.shape[-1], device=fit.device) * (TIE * fit.abs().amax(-1, keepdim=True))


def mix_near_and_far(
    q: tuple[Tensor, Tensor],
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor],
    seen: tuple[Tensor, Tensor],
    turn: Turn,
) -> Tensor:
    """One softmax over near keys, met by the queries q[0] [B, H*G, Q, d], and far ones, met by q[1].

    Each kind of key fills half of the channels, with zeros in the other half.

    Args:
        near, far: keys and values of each kind. seen: [B or 1, 1, Q, near] and [B, 1, Q, far]. turn: with its scale.
    """
    k = [torch.cat(pair, 3) for pair in ((near[0], torch.zeros_like(near[0])), (torch.zeros_like(far[0]), far[0]))]
    visible = torch.cat([seen[0].expand(len(seen[1]), -1, -1, -1), seen[1]], 3)
    return mix(torch.cat(q, 3), torch.cat(k, 2), torch.cat([near[1], far[1]], 2), visible, turn)


class Bounds(Buffer):
    """The smallest and the largest value of each channel over each `size` keys, counted from a row's first real token.

    `k` [B, H, pieces, d] holds the smallest, `v` the largest. Pieces without keys have inf and -inf.

    Attributes:
        first: [B] the first real column of each row; least: the smallest of them, as a number.
        padded: whether any row is padded.
    """

    codable = False  # rounded bounds would bound nothing

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

    def clear(self) -> None:
        """Hold nothing."""
        super().clear()
        self.first, self.least, self.padded = torch.empty(0), 0, False

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that are held."""
        yield from super().tensors()
        if self.length:
            yield from (self.first,) if self.length else ()


class Appended(Buffer):
    """A buffer that is written behind its end only, so that a copy may share its memory."""

    def __deepcopy__(self, _: dict) -> "Appended":
        return copy.copy(self)


class Offloaded(Appended):
    """Keys and values in host memory, whatever device they come from."""

    def append(self, k: Tensor, v: Tensor) -> None:
        """Copy k [B, H, Q, d] and v [B, H, Q, dv] to the host, behind what is there."""
        super().append(k.cpu(), v.cpu())

    def pick(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        super().pick(rows.cpu())


class Archive(Offloaded):
    """Blocks of keys and values in host memory, each with a key that stands for it where the model runs.

    Attributes:
        marks: [B, H, blocks, d] the keys that stand for the blocks.
    """

    codable = False  # blocks of padded rows are written in place, later than those of others

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.marks: Tensor | None = None

    def put(self, number: int, rows: Tensor, batch: int, k: Tensor, v: Tensor, mark: Tensor) -> None:
        """Keep block `number` of some rows: k [R, H, size, d], v [R, H, size, dv], mark [R, H, d]; `batch` is B."""
        if number * self.size >= self.length:
            self.append(k.new_zeros(batch, *k.shape[1:]), v.new_zeros(batch, *v.shape[1:]))
            room = mark.new_zeros(batch, mark.shape[1], 1, mark.shape[2])
            self.marks = room if self.marks is None else torch.cat([self.marks, room], 2)
        assert self.marks is not None
        self.marks[rows, :, number] = mark
        place, host = slice(number * self.size, (number + 1) * self.size), rows.to(self.k.device)
        self.k[host, :, place], self.v[host, :, place] = k.to(host.device), v.to(host.device)

    def fetch(self, mean: Tensor, count: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """The blocks whose marks fit a mean query [B, H*G, d] best, of the first count [B] blocks of each row.

        Returns:
            keys and values [B, H, tokens, d], and whether they exist [B, tokens].
        """
        assert self.marks is not None
        fit = (mean.unflatten(1, (self.marks.shape[1], -1)).sum(2)[:, :, None] * self.marks).sum((1, 3))
        numbers = torch.arange(fit.shape[1], device=fit.device)
        best = later_first(fit).masked_fill(numbers >= count[:, None], -torch.inf).topk(min(most, fit.shape[1]))
        columns = (best.indices[..., None] * self.size + torch.arange(self.size, device=fit.device)).flatten(1)
        columns = columns[:, None].expand(-1, self.k.shape[1], -1).to(self.k.device)
        k, v = (columns_of(one, columns).to(fit.device) for one in (self.k, self.v))
        return k, v, (best.values > -torch.inf).repeat_interleave(self.size, 1)

    def pick(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        super().pick(rows)
        self.marks = None if self.marks is None else self.marks.index_select(0, rows)

    def clear(self) -> None:
        """Hold nothing."""
        super().clear()
        self.marks = None

    def offloaded(self) -> Iterator[Tensor]:
        """The tensors in host memory."""
        return super().tensors()

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that are held."""
        yield from super().tensors()
        if self.marks is not None:
            yield self.marks


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
            k, v, start = self.k[:, :, tokens:], self.v[:, :, tokens:], self.start + tokens
            self.clear()
            if k.shape[2]:
                self.append(k, v)
            self.start = start

    def clear(self) -> None:
        """Hold nothing."""
        super().clear()
        self.start = 0


class Replaying(Store):
    """A store in which what is kept depends on queries: what stays of a turn that is taken back is read once more.

    Attributes:
        first: [B] the first real column of each row; least: the smallest of them; padded: whether any row is padded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.empty(0)
        self.least, self.padded = 0, False
        self._queries: Tensor | None = None

    # Which blocks there are changes from token to token: every one of them would be compiled anew.
    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        """`read`, with what is needed to take the turn back where recording is on."""
        if self.recording:
            self._past.append((self._state() | {"_queries": q}, k, v, turn))
        if turn.past == 0:
            self.first = q.new_zeros(q.shape[0], dtype=torch.long) if turn.pads is None else turn.pads.clone()
            self.padded = turn.pads is not None
            self.least = int(self.first.min()) if self.padded else 0
        return self.read(q, k, v, turn)

    def remember(self, k: Tensor, v: Tensor, turn: Turn) -> None:
        """Read the first tokens of a turn that was taken back."""
        assert self._queries is not None
        q, self._queries = self._queries[:, :, : k.shape[2]], None
        self.attend(q, k, v, turn)

    def crop(self, tokens: int) -> None:
        """Take the last tokens back. Raises ValueError: more tokens than the recorded turns held."""
        super().crop(tokens)
        self._queries = None

    def finished(self, column: int, offset: int, size: int, done: Tensor) -> "Iterator[tuple[int, Tensor]]":
        """(number of a block, rows [R] in which it is new): blocks of `size` that end before a column.

        The first block of a row begins `offset` columns after the row's first; done [B] counts those known before.
        """
        most = max(0, (column - self.least - offset) // size)
        if not self.padded:
            every = torch.arange(len(done), device=done.device)
            yield from ((number, every) for number in range(int(done[0]), most))
            return
        there = (column - self.first - offset) // size
        for number in range(int(done.min()), most):
            rows = ((done <= number) & (number < there)).nonzero()[:, 0]
            if len(rows):
                yield number, rows


def cuts(length: int, single: int, size: int) -> list[tuple[int, int]]:
    """A turn of `length` tokens in parts: one by one up to `single` tokens, else of `size` each, counted from its end.

    Counted from the end, parts fall on the same tokens of a text whatever padding stands before it.
    """
    size = 1 if length <= single else size
    edges = [max(0, stop) for stop in range(length, -size, -size)][::-1]
    return list(zip(edges[:-1], edges[1:], strict=True))
