"""Keys of a prompt that are chosen once it is read: the store of methods that drop what attention looks at least.

A forward pass of at least `window` new tokens is a prompt, or a chunk of one. Its own attention is exact over all that
is held; then its last `window` queries say which of the earlier tokens stay. Chunks and further prompts are
chosen from again, so that what is left does not grow with their number. Tokens of shorter passes (generated ones, and
those that speculation checks) are kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, pad

from headwise.attend import attend_openly
from headwise.buffer import Buffer
from headwise.store import Store, Turn, mix_all

# Votes [B, H, P] for earlier tokens, minus infinity where there is none, and how many [B] each head may keep on
# average -> [B, H, P] whether a token stays.
Choose = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Budget:
    """How much stays of a prompt.

    Attributes:
        window: most recent tokens, which always stay and whose queries choose.
        capacity: tokens a KV head keeps, the window among them.
        share: share of all tokens of a row that is kept instead, where it is not 0.
        kernel: earlier tokens over which votes are averaged, so that neighbours stay together.

    Raises:
        ValueError: a field outside its range.
    """

    window: int
    capacity: int
    share: float
    kernel: int

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"window is {self.window}; allowed is 2 or more, for one token alone is not a prompt.")
        if not self.share and self.capacity <= self.window:
            raise ValueError(f"capacity is {self.capacity}; allowed is more than the window, which is {self.window}.")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; allowed is 0 to 1.")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel is {self.kernel}; allowed are 1, 3, 5 and so on.")

    def beside_window(self, tokens: Tensor) -> Tensor:
        """[B] earlier tokens that a head keeps on average where rows have had so many tokens [B]."""
        most = (self.share * tokens).ceil().long() if self.share else torch.full_like(tokens, self.capacity)
        return (most - self.window).clamp_min(0)


class Kept(Buffer):
    """A buffer in which row b begins at slot holes[b], where rows differ in length."""

    def __init__(self, reserve: int = 0) -> None:
        super().__init__(reserve)
        self.holes: Tensor | None = None

    def local(self, turn: Turn) -> Turn:
        """The turn in slots of this buffer instead of columns of the text."""
        first = self.holes
        if turn.pads is not None:
            begun = (turn.pads - turn.past + self.length).clamp_min(0)
            first = begun if first is None else first.maximum(begun)
        return replace(turn, past=self.length, pads=first)

    def pick(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        super().pick(rows)
        self.holes = None if self.holes is None else self.holes.index_select(0, rows)

    def clear(self) -> None:
        """Hold nothing."""
        super().clear()
        self.holes = None

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that are held."""
        yield from super().tensors()
        yield from () if self.holes is None else (self.holes,)


class Compressed(Store):
    """A prompt's chosen tokens and all later ones.

    Args:
        budget: how much stays.
        choose: which of the earlier tokens stay.
        apart: every KV head has a buffer of its own length; else they all keep equally many, in one buffer.
        reserve: final length where it is known, else 0.
    """

    def __init__(self, budget: Budget, choose: Choose, *, apart: bool, reserve: int = 0) -> None:
        super().__init__()
        self.budget, self.choose, self.apart, self.reserve = budget, choose, apart, reserve
        self.kept: list[Kept] = []
        self.behind = 0  # tokens since the last choice
        self.queries: Tensor | None = None  # only in what is recorded

    @property
    def one_by_one(self) -> int:
        """A turn as long as the window is a prompt."""
        return self.budget.window - 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        """`read`; only before a choice is there more to record than how many tokens came."""
        if self.recording and k.shape[2] >= self.budget.window:
            self._past.append(({**self._state(), "queries": q}, k, v, turn))
        return self.read(q, k, v, turn)

    def read(self, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        """Causal attention over what is kept and what is new; a prompt is compressed after it."""
        turn.plain("A cache that compresses prompts")
        length, groups = k.shape[2], q.shape[1] // k.shape[1]
        if not self.kept:
            self.kept = [Kept() for _ in range(k.shape[1] if self.apart else 1)]
        parts, votes = [], []
        for kept, mine, heads in self._heads(k.shape[1], groups):
            local = kept.local(turn).of_heads(torch.arange(q.shape[1], device=q.device)[heads])
            parts.append(mix_all(q[:, heads], k[:, mine], v[:, mine], kept, local))
            if length >= self.budget.window:
                votes.append(self._votes(q[:, heads, -self.budget.window :], kept, local))
        if votes:
            self._compress(votes, k.shape[1], turn, turn.past + length)
        else:
            self.behind += length
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _heads(self, count: int, groups: int) -> "list[tuple[Kept, slice, slice]]":
        if not self.apart:
            return [(self.kept[0], slice(None), slice(None))]
        return [(self.kept[i], slice(i, i + 1), slice(i * groups, (i + 1) * groups)) for i in range(count)]

    def _votes(self, q: Tensor, kept: Kept, turn: Turn) -> Tensor:
        """[B, H, P] attention of the window's queries to each earlier token, mean over query heads and neighbours."""
        window, device = q.shape[2], q.device
        earlier = kept.length - window
        seen = turn.seen(torch.arange(earlier, kept.length, device=device), torch.arange(kept.length, device=device))
        found: list[Tensor] = []

        def see(kind: str, value: Tensor) -> Tensor:
            if kind == "pattern":
                found.append(value[..., :earlier].float())
            return value

        options = {**(turn.options or {}), "scaling": turn.scale, "is_causal": False}
        attend_openly(turn.module or nn.Identity(), q, kept.k, kept.v, seen, see, options)
        rows, heads = kept.k.shape[:2]
        votes = found[0].sum(2).view(rows, heads, -1, earlier).mean(2)
        if earlier:
            votes = avg_pool1d(votes, self.budget.kernel, 1, self.budget.kernel // 2)
        if turn.pads is not None:
            empty = torch.arange(earlier, device=device) < turn.pads[:, None]
            votes = votes.masked_fill(empty[:, None], -torch.inf)
        return votes

    def _compress(self, votes: list[Tensor], heads: int, turn: Turn, tokens: int) -> None:
        earlier = [one.shape[2] for one in votes]
        joint = torch.cat([pad(one, (max(earlier) - one.shape[2], 0), value=-torch.inf) for one in votes], 1)
        had = torch.full((joint.shape[0],), tokens, device=joint.device)
        had = had if turn.pads is None else had - turn.pads
        stays = self.choose(joint, self.budget.beside_window(had)) & (joint > -torch.inf)
        for (kept, mine, _), size in zip(self._heads(heads, 1), earlier, strict=True):
            self._keep(kept, stays[:, mine, max(earlier) - size :], turn, tokens)
        self.behind = 0

    def _keep(self, kept: Kept, stays: Tensor, turn: Turn, tokens: int) -> None:
        """Leave in one buffer only what stays [B, H, P] and the window, in order, each row at the right."""
        window = self.budget.window
        real = torch.arange(tokens - window, tokens, device=stays.device)
        real = real >= (0 if turn.pads is None else turn.pads[:, None, None])
        stays = torch.cat([stays, real.expand(*stays.shape[:2], -1)], 2)
        counts = stays.sum(2)
        width = max(1, int(counts.max()))
        if int(counts.min()) == kept.length:
            return
        order = stays.byte().argsort(dim=2, stable=True)[..., -width:, None]
        k, v = (one.gather(2, order.expand(-1, -1, -1, one.shape[3])) for one in (kept.k, kept.v))
        kept.clear()
        kept.reserve = width + self.reserve - tokens if self.reserve > tokens else 0
        kept.append(k, v)
        kept.holes = None if int(counts.min()) == width else width - counts[:, 0]

    def crop(self, tokens: int) -> None:
        """Take the last tokens back: those since the last choice always, earlier ones where they were recorded."""
        while tokens > self.behind and self._past:
            tokens -= self.behind
            state, k, v, turn = self._past.pop()
            self._restore(state)
            q, self.queries = self.queries, None
            left = max(0, k.shape[2] - tokens)
            tokens -= k.shape[2] - left
            if left and q is not None:
                self.read(q[:, :, :left], k[:, :, :left], v[:, :, :left], turn)
                tokens = 0
        if tokens > self.behind:
            self._refuse(tokens)
        for kept in self.kept:
            kept.crop(tokens)
        self.behind -= tokens
        self._past.clear()

    def clear(self) -> None:
        """Hold nothing."""
        super().clear()
        self.kept, self.behind = [], 0
