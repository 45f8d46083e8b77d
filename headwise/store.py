"""What a set of KV heads of one layer remembers, and how its queries read it.

A cache method makes a `Store`; headwise/kv_cache.py puts stores behind transformers' cache and attention doors. A store
is given the new queries, keys and values of a forward pass, hands back z, and keeps what its method keeps. So what was
dropped is gone: no tensor holds it.

Axes: B rows, H KV heads of this store, G query heads to a KV head, Q new tokens, K keys, d and dv channels.
"""

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from headwise import pieces
from headwise.attend import attend_openly
from headwise.buffer import Buffer
from headwise.rotary import Rotate

# Queries whose mask is made at one time on a processor.
PORTION = 256


@dataclass(frozen=True)
class Turn:
    """One forward pass, as the attention of one layer sees it.

    Attributes:
        past: tokens that the layer had seen before; the new ones stand in columns past to past + Q - 1.
        pads: [B] columns of left padding in each row, or None where there is none.
        mask: [B or 1, 1, Q, past + Q] boolean, only where the mask is more than causal with left padding.
        scale: what q.k is multiplied by.
        options: softcap, and the sinks of the query heads where the model has learned ones.
        module: the attention module that runs.
        rotation: gives f(x [B, H, T, d], by [T]) that moves rotated keys or queries, None without RoPE.
    """

    past: int
    pads: Tensor | None = None
    mask: Tensor | None = None
    scale: float | None = None
    options: dict[str, Any] | None = None
    module: nn.Module | None = None
    rotation: "Callable[[], Rotate | None] | None" = None

    def of_heads(self, heads: Tensor) -> "Turn":
        """The turn for some of the query heads."""
        options = self.options or {}
        if options.get("s_aux") is None:
            return self
        return replace(self, options={**options, "s_aux": options["s_aux"][heads]})

    def columns(self, length: int, device: torch.device) -> Tensor:
        """[Q] the columns of the new tokens."""
        return torch.arange(self.past, self.past + length, device=device)

    def seen(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Who sees whom by order and padding, [B or 1, 1, Q, K]; queries [Q] and keys [K] or [B, 1, 1, K] are columns.

        A key in a negative column does not exist. A padded query sees itself, so that no row of the softmax is empty.
        """
        keys = keys if keys.ndim == 4 else keys[None, None, None]
        rows = queries[None, None, :, None]
        seen = (keys <= rows) & (keys >= 0)
        if self.pads is not None:
            seen = (seen & (keys >= self.pads[:, None, None, None])) | (keys == rows)
        return seen

    def plain(self, method: str) -> None:
        """Raises ValueError where the mask is one that a method which drops keys cannot follow."""
        if self.mask is not None:
            raise ValueError(
                f"{method} follows causal masks with padding on the left; this mask hides other keys too. "
                "Pad on the left, or use cache.preallocated."
            )


def mix(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, turn: Turn, *, causal: bool = False) -> Tensor:
    """Attention of q [B, H*G, Q, d] over k [B, H, K, d] and v [B, H, K, dv] -> z [B, H*G, Q, dv].

    Args:
        seen: [B or 1, 1 or H, Q, K] boolean, or additive as a float, or None where every query sees every key.
        causal: query i sees keys 0 to i; needs Q = K and no `seen`.
    """
    if turn.options:
        return _openly(q, k, v, seen, turn, causal)
    batch, heads, length, size = q.shape
    groups = heads // k.shape[1]
    if causal:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=turn.scale, enable_gqa=groups > 1)
    if groups > 1 and length <= size:
        # The query heads of one KV head stand below each other, so that keys and values are read once.
        q = q.reshape(batch, -1, groups * length, size)
        seen = None if seen is None else seen.repeat(1, 1, groups, 1)
    elif groups > 1:
        seen = seen.repeat_interleave(groups, 1) if seen is not None and seen.shape[1] > 1 else seen
        if q.device.type != "cpu":
            # Only the kernel of processors takes grouped heads and a mask; others would make all scores.
            k, v = (one.repeat_interleave(groups, 1) for one in (k, v))
    if seen is None and q.shape[1] == k.shape[1]:
        z = pieces.read(q, k, v, turn.scale)
    else:
        z = scaled_dot_product_attention(q, k, v, seen, scale=turn.scale, enable_gqa=q.shape[1] > k.shape[1])
    return z.reshape(batch, heads, length, -1)


def portions(length: int, device: torch.device) -> list[slice]:
    """Queries whose masks are made one portion after the other: masks of a whole chunk may be larger than the cache."""
    size = PORTION if device.type == "cpu" else max(1, length)
    return [slice(start, min(length, start + size)) for start in range(0, length, size)]


def _openly(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, turn: Turn, causal: bool) -> Tensor:
    if causal:
        columns = torch.arange(q.shape[2], device=q.device)
        seen = (columns <= columns[:, None])[None, None]
    if seen is not None and seen.shape[1] > 1:
        seen = seen.repeat_interleave(q.shape[1] // k.shape[1], 1)
    options = {**(turn.options or {}), "scaling": turn.scale, "is_causal": False}
    z, _ = attend_openly(turn.module or nn.Identity(), q, k, v, seen, lambda _, value: value, options)
    return z.transpose(1, 2)


def inside(value: Any) -> "list[Buffer | Store]":
    """The buffers and stores that an attribute of a store holds."""
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, Buffer | Store)]


def _held(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in the attributes of a store."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        for one in inside(value):
            yield from one.tensors()


class Store(ABC):
    """What some KV heads of one layer remember.

    A subclass writes `read`, and `remember` for the part of a turn that stays when the rest is taken back. Tensors that
    it keeps have the rows as their first axis and are attributes, or stand in a `Buffer`, in another store, or in a
    list of these; then reordering, rolling back and counting bytes need no further code; what is no tensor is for
    `clear` to reset. A method that drops nothing may write `crop` itself and set `undoes` False.
    """

    undoes = True

    def __init__(self) -> None:
        self.recording = False
        self._past: list[tuple[dict, Tensor, Tensor, Turn]] = []

    @abstractmethod
    def read(self, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        """What attention gives for new tokens, which are remembered too.

        q [B, H*G, Q, d], k [B, H, Q, d], v [B, H, Q, dv] -> z [B, H*G, Q, dv].
        """

    @property
    def one_by_one(self) -> int:
        """The longest turn that is read as if its tokens had come one by one; longer ones are taken for prompts."""
        return sys.maxsize

    def openings(self, length: int) -> range:
        """How many first tokens of a first turn of `length` it may be given by `remember`, their attention computed
        with everything in sight, so that all is as if it had read the turn. Empty where that is not known.
        """
        return range(0)

    def remember(self, k: Tensor, v: Tensor, turn: Turn) -> None:
        """Take in new tokens without reading them; used when part of a turn is taken back.

        Raises:
            ValueError: a method whose choice looks at queries.
        """
        raise ValueError(
            f"{type(self).__name__.strip('_')} chooses by what queries look at, so it cannot take in keys and values "
            "that nobody reads. Read the text through the cache."
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        """`read`, with what is needed to take the turn back where recording is on."""
        if self.recording and self.undoes:
            self._past.append((self._state(), k, v, turn))
        return self.read(q, k, v, turn)

    def record(self) -> None:
        """From now on turns can be taken back."""
        self.recording = True

    def settle(self) -> None:
        """From now on turns stay, as at the beginning."""
        self.recording = False
        self._past.clear()

    def crop(self, tokens: int) -> None:
        """Take the last tokens back; 0 says that the recorded turns stay.

        Raises:
            ValueError: more tokens than the recorded turns held.
        """
        while tokens > 0:
            if not self._past:
                self._refuse(tokens)
            state, k, v, turn = self._past.pop()
            self._restore(state)
            kept = max(0, k.shape[2] - tokens)
            tokens -= k.shape[2] - kept
            if kept:
                self.remember(k[:, :, :kept], v[:, :, :kept], turn)
        self._past.clear()

    def _refuse(self, tokens: int) -> NoReturn:
        raise ValueError(
            f"{tokens} more tokens were to be taken back than this cache has recorded. "
            "Call cache.activate_past_recording() before the turns that may be taken back."
        )

    def pick(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order (beam search)."""
        self._past.clear()
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.index_select(0, rows))
            for one in inside(value):
                one.pick(rows)

    def clear(self) -> None:
        """Hold nothing."""
        self._past.clear()
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, None)
            for one in inside(value):
                one.clear()

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that are held, those for taking back included."""
        yield from _held(vars(self).values())
        for state, k, v, turn in self._past:
            yield from _held([k, v, turn.mask, turn.pads, *state.values()])

    def offloaded(self) -> Iterator[Tensor]:
        """Those of the tensors that were sent to host memory; none unless a method says so."""
        return iter(())

    def _state(self) -> dict:
        kept = {name: value for name, value in vars(self).items() if name not in ("_past", "recording")}
        return {
            name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in kept.items()
        }

    def _restore(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def mix_all(q: Tensor, k: Tensor, v: Tensor, buffer: Buffer, turn: Turn) -> Tensor:
    """Append new keys and values to a buffer, and let the new queries see all of it in causal order -> z."""
    length = k.shape[2]
    buffer.append(k, v)
    if length < buffer.length:
        k, v = buffer.k, buffer.v
    if turn.mask is None and turn.pads is None:
        if length == 1:
            return mix(q, k, v, None, turn)
        if length == buffer.length:
            return mix(q, k, v, None, turn, causal=True)
    if turn.mask is not None:
        return mix(q, k, v, turn.mask, turn)
    keys, queries = torch.arange(buffer.length, device=q.device), turn.columns(length, q.device)
    parts = []
    for here in portions(length, q.device):
        upto = buffer.length - length + here.stop
        seen = turn.seen(queries[here], keys[:upto])
        parts.append(mix(q[:, :, here], k[:, :, :upto], v[:, :, :upto], seen, turn))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


class Full(Store):
    """Every key and value, in one buffer written in place."""

    undoes = False

    def __init__(self, reserve: int = 0) -> None:
        super().__init__()
        self.kept = Buffer(reserve)

    def openings(self, length: int) -> range:
        """Any number."""
        return range(length + 1)

    def read(self, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        """Plain causal attention over all tokens so far."""
        return mix_all(q, k, v, self.kept, turn)

    def remember(self, k: Tensor, v: Tensor, turn: Turn) -> None:
        """Write them behind what is there."""
        self.kept.append(k, v)

    def crop(self, tokens: int) -> None:
        """Forget the last tokens; any number can be taken back."""
        self.kept.crop(tokens)
