"""KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache. Liu et al., 2024. arXiv:2402.02750

The arithmetic is torchao's, and simpler than the paper's: 8 or 4 bits, keys and values alike token by token. So tokens
may come, go and be taken back one at a time, under any other method of this room.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headwise.buffer import Buffer
from headwise.codes import Codes
from headwise.kv_cache import CacheMethod
from headwise.store import Full, Store, Turn, inside


@dataclass(frozen=True)
class Quantised(CacheMethod):
    """What another cache method keeps, held in 8 or 4 bits a value, decoded for one layer at a time.

    A prompt read in one pass is read exactly, and rounded after it. Later tokens are rounded before they are read, so
    that those of a draft read what they would read one by one. Reading takes time in proportion to what is kept.

    Fields:
        bits: 8, or 4.
        of: the method that says what is kept; None keeps everything.
    """

    bits: int = 8
    of: CacheMethod | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits}; allowed are 8 and 4.")

    def identity(self) -> dict[str, Any]:
        """The method's name and fields, with those of the method inside it."""
        inner = None if self.of is None else self.of.identity()
        return {**super().identity(), "fields": {"bits": self.bits, "of": inner}}

    def store(self, reserve: int = 0) -> Store:
        """The other method's store, whose keys and values are coded between two turns."""
        return _Coded(Full(reserve) if self.of is None else self.of.store(reserve), Codes(self.bits))


class _Coded(Store):
    """Buffers of a store are written in code; its attributes k and v [B, H, slots, d] are decoded for each turn.

    Only slots that a turn has changed are coded again, so that what is rounded once stays as it is.
    """

    undoes = False

    def __init__(self, inner: Store, codec: Codes) -> None:
        super().__init__()
        self.inner, self.codec = inner, codec
        self.codes: dict[str, tuple[Tensor, ...]] = {}
        self._freeze({})

    @property
    def one_by_one(self) -> int:
        """What the store inside says."""
        return self.inner.one_by_one

    def openings(self, length: int) -> range:
        """All of a prompt at most, as its keys are coded once it has been read."""
        return range(length, length + 1) if length in self.inner.openings(length) else range(0)

    def read(self, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        """What the store inside gives."""
        if k.shape[3] % 2 or v.shape[3] % 2:
            raise ValueError(
                f"Keys of {k.shape[3]} and values of {v.shape[3]} channels cannot be coded; allowed are even."
            )
        if turn.past:
            k, v = (self.codec.decode(self.codec.encode(one)) for one in (k, v))
        thawed = self._thaw()
        z = self.inner.attend(q, k, v, turn)
        self._freeze(thawed)
        return z

    def remember(self, k: Tensor, v: Tensor, turn: Turn) -> None:
        """Take in new tokens as the store inside does."""
        thawed = self._thaw()
        self.inner.remember(k, v, turn)
        self._freeze(thawed)

    def _thaw(self) -> dict[str, Tensor]:
        thawed = {name: self.codec.decode(parts) for name, parts in self.codes.items()}
        for name, value in thawed.items():
            setattr(self.inner, name, value.clone())
        return thawed

    def _freeze(self, thawed: dict[str, Tensor]) -> None:
        for value in vars(self.inner).values():
            for one in inside(value):
                if isinstance(one, Buffer):
                    one.write_in(self.codec)
        for name in ("k", "v"):
            value, old = getattr(self.inner, name, None), thawed.get(name)
            if not isinstance(value, Tensor):
                self.codes.pop(name, None)
                continue
            if old is None or old.shape != value.shape:
                self.codes[name] = self.codec.encode(value)
            elif len(changed := (value != old).flatten(0, 1).any(0).any(1).nonzero()[:, 0]):
                for room, part in zip(self.codes[name], self.codec.encode(value[:, :, changed]), strict=True):
                    room[:, :, changed] = part
            setattr(self.inner, name, None)

    def record(self) -> None:
        """From now on turns can be taken back."""
        self.inner.record()

    def settle(self) -> None:
        """From now on turns stay."""
        self.inner.settle()

    def crop(self, tokens: int) -> None:
        """Take the last tokens back, as the store inside does."""
        thawed = self._thaw()
        self.inner.crop(tokens)
        self._freeze(thawed)

    def pick(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.inner.pick(rows)
        self.codes = {name: tuple(one.index_select(0, rows) for one in parts) for name, parts in self.codes.items()}

    def clear(self) -> None:
        """Hold nothing."""
        self.inner.clear()
        self.codes = {}

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that are held."""
        for parts in self.codes.values():
            yield from parts
        yield from self.inner.tensors()

    def offloaded(self) -> Iterator[Tensor]:
        """Those of them that were sent to host memory."""
        return self.inner.offloaded()
