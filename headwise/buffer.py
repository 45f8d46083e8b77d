"""Keys and values of some tokens in memory that is reserved ahead, as they are or written in another way."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor

GROWTH = 1.25


class Codec(ABC):
    """Another way to write keys or values down, token by token."""

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Values [B, H, Q, d] as tensors whose first three axes are the same."""

    @abstractmethod
    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        """[B, H, Q, d] again, as well as it can be had."""


class Buffer:
    """Keys and values [B, H, length, d], written in place into memory that is reserved ahead and grows by a quarter.

    Attributes:
        length: tokens it holds.
        reserve: tokens to make room for at first, where the final length is known; 0 where it is not.
        codable: whether what it holds may be rounded (`write_in`).
    """

    codable = True

    def __init__(self, reserve: int = 0) -> None:
        self.reserve = reserve
        self.length = 0
        self._codec: Codec | None = None
        self._k: tuple[Tensor, ...] = ()
        self._v: tuple[Tensor, ...] = ()

    @property
    def k(self) -> Tensor:
        """[B, H, length, d]; a view, unless a codec is in use."""
        return self._read(self._k)

    @property
    def v(self) -> Tensor:
        """[B, H, length, dv]; a view, unless a codec is in use."""
        return self._read(self._v)

    def _read(self, rooms: tuple[Tensor, ...]) -> Tensor:
        if not rooms:
            raise RuntimeError("Nothing has been written to this buffer yet.")
        parts = tuple(room[:, :, : self.length] for room in rooms)
        return parts[0] if self._codec is None else self._codec.decode(parts)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write k [B, H, Q, d] and v [B, H, Q, dv] behind what is there."""
        end = self.length + k.shape[2]
        # One after the other, so that at most one of the old tensors is held twice.
        self._k = self._written(self._k, k, end)
        self._v = self._written(self._v, v, end)
        self.length = end

    def _written(self, rooms: tuple[Tensor, ...], new: Tensor, end: int) -> tuple[Tensor, ...]:
        parts = (new,) if self._codec is None else self._codec.encode(new)
        room = rooms[0].shape[2] if rooms else 0
        if end > room:
            size = max(end, int(room * GROWTH) + 1 if rooms else self.reserve)
            wider = [one.new_empty(*one.shape[:2], size, one.shape[3]) for one in parts]
            for one, old in zip(wider, rooms, strict=bool(rooms)):
                one[:, :, : self.length] = old[:, :, : self.length]
            rooms = tuple(wider)
        for one, part in zip(rooms, parts, strict=True):
            one[:, :, self.length : end] = part
        return rooms

    def write_in(self, codec: Codec) -> None:
        """From now on hold everything by this codec, what is there included."""
        if not self.codable or self._codec is codec:
            return
        there = (self.k, self.v) if self._k else None
        self.reserve = max(self.reserve, self._k[0].shape[2] if there else 0)
        self.length, self._codec, self._k, self._v = 0, codec, (), ()
        if there is not None:
            self.append(*there)

    def crop(self, tokens: int) -> None:
        """Forget the last tokens."""
        self.length = max(0, self.length - tokens)

    def pick(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may come twice."""
        self._k = tuple(one.index_select(0, rows) for one in self._k)
        self._v = tuple(one.index_select(0, rows) for one in self._v)

    def clear(self) -> None:
        """Hold nothing."""
        self.length, self._k, self._v = 0, (), ()

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that are held."""
        yield from (*self._k, *self._v)
