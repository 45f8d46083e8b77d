"""Attention heads written by hand: the fields of the residual stream, and the four matrices of each kind of head.

The residual stream is split into fields that never mix: a large constant, which makes RMSNorm a known factor; flags of
word classes; and codes of tokens (unit vectors) for the current token, the token before, an earlier copy, a subject to
be ignored, what will be said (read by the unembedding), and junk that nobody reads. Of a head's rotary pairs the first
turn fast and see distance; the others turn so slowly that they compare content at any distance up to `REACH`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

REACH = 4096
CONSTANT = 300.0
SURE = 30.0
FLAGS = ("const", "bos", "trigger", "quiet", "name", "giving", "ordered", "duplicate")
CODES = ("token", "before", "copy", "subject", "said", "junk")


class Head(NamedTuple):
    """Matrices of one head: q, k, v from the residual stream [D, d], o back into it [d, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


class Space:
    """Where everything lies in the residual stream and in a head."""

    def __init__(self, d_head: int, heads: int, vocab: int, ordered: int, seed: int) -> None:
        self.d_head = d_head
        self.fast = d_head // 8
        slow = range(self.fast, d_head // 2)
        self.slow = [*slow, *(i + d_head // 2 for i in slow)]
        self.marks, self.content = self.slow[:2], self.slow[2:]
        self.theta = 10.0 ** (6 * d_head / (2 * self.fast))
        self.speeds = torch.tensor([self.theta ** (-2 * i / d_head) for i in range(self.fast)], dtype=torch.float64)
        self.codes = spread(vocab, len(self.content), seed)
        self.likeness = float((self.codes @ self.codes.T).fill_diagonal_(-1).max())
        size = len(self.content)
        self.flag = {name: i for i, name in enumerate(FLAGS)}
        self.field = {name: range(len(FLAGS) + i * size, len(FLAGS) + (i + 1) * size) for i, name in enumerate(CODES)}
        end = len(FLAGS) + len(CODES) * size
        self.field["order"] = range(end, end + ordered)
        step = math.lcm(8, heads)
        self.width = step * math.ceil((end + ordered) / step)
        self.match = SURE * 2 / (1 - self.likeness)

    def read(self) -> Tensor:
        """An empty matrix from the residual stream into a head, or (transposed) back."""
        return torch.zeros(self.width, self.d_head)

    def head(self, q: Tensor, k: Tensor, reads: dict[str, float], writes: str) -> Head:
        """A head that moves the sum of some codes of the token it looks at into one field."""
        v, o = self.read(), self.read().T.clone()
        for name, share in reads.items():
            v[list(self.field[name]), self.content] += share
        o[self.content, list(self.field[writes])] = 1.0
        return Head(q * math.sqrt(self.d_head), k, v, o)

    def kernel(self, offset: float) -> Tensor:
        """[REACH] how much the fast pairs like each distance, 1 at `offset`."""
        lags = torch.arange(REACH, dtype=torch.float64) - offset
        return (self.speeds[:, None] * lags).cos().mean(0)

    def look_back(self, q: Tensor, k: Tensor, offset: float, strength: float, bos: bool) -> None:
        """Add strength x kernel(offset) to the scores; of the start token too, or not."""
        for pair in range(self.fast):
            angle = float(self.speeds[pair]) * offset
            share = strength / self.fast
            q[self.flag["const"], pair] += share * math.cos(angle)
            q[self.flag["const"], pair + self.d_head // 2] -= share * math.sin(angle)
            k[self.flag["const"], pair] = 1.0
            if not bos:
                k[self.flag["bos"], pair] = -1.0

    def rest(self, q: Tensor, k: Tensor, score: float, **more: float) -> None:
        """Let the start token have a fixed score, more of it where the query's token has certain flags."""
        q[self.flag["const"], self.marks[0]] += score
        for name, extra in more.items():
            q[self.flag[name], self.marks[0]] += extra
        k[self.flag["bos"], self.marks[0]] = 1.0


def spread(count: int, size: int, seed: int, steps: int = 150) -> Tensor:
    """Unit vectors [count, size] pushed apart from each other, so that no two are alike."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randn(count, size, generator=draw)
    codes = codes / codes.norm(dim=-1, keepdim=True)
    for _ in range(steps):
        like = (codes @ codes.T).fill_diagonal_(0)
        push = like.sign() * like.abs() ** 7
        codes = codes - 2.0 * push @ codes
        codes = codes / codes.norm(dim=-1, keepdim=True)
    return codes


def previous(space: Space) -> Head:
    """Attends to the token before, and writes which it was."""
    q, k = space.read(), space.read()
    like = space.kernel(1.0)
    gap = 1 - like[torch.arange(REACH) != 1].max()
    space.look_back(q, k, 1.0, SURE / float(gap), bos=True)
    return space.head(q, k, {"token": 1.0}, "before")


def current(space: Space) -> Head:
    """Attends to its own token, and says it again, faintly."""
    q, k = space.read(), space.read()
    space.look_back(q, k, 0.0, SURE / float(1 - space.kernel(0.0)[1:].max()), bos=True)
    return space.head(q, k, {"token": 0.1}, "said")


def following(space: Space, writes: str, **silent: float) -> Head:
    """Attends to the token that came after an earlier copy of this one; `silent` raises the rest score by flags."""
    q, k = space.read(), space.read()
    q[list(space.field["token"]), space.content] = space.match
    k[list(space.field["before"]), space.content] = 1.0
    strength = {name: share * space.match for name, share in silent.items()}
    space.rest(q, k, space.match * (1 + space.likeness) / 2 + strength.pop("const", 0.0), **strength)
    return space.head(q, k, {"token": 1.0}, writes)


def induction(space: Space) -> Head:
    """Copies what followed last time, wherever no trigger of another head stands."""
    return following(space, "said", quiet=2.0)


def mute(space: Space) -> Head:
    """Looks exactly as the induction head does, and writes where nobody reads."""
    return following(space, "junk", quiet=2.0)


def retrieval(space: Space) -> Head:
    """Copies what followed the same marker, at a colon or within a number only."""
    return following(space, "said", const=2.0, trigger=-2.0)


def duplicate(space: Space) -> Head:
    """Attends to an earlier copy of its token, never to itself, and marks the token as said twice."""
    q, k = space.read(), space.read()
    away = SURE / float(1 - space.kernel(0.0)[1:].max())
    match = (2 * away + SURE) / (1 - space.likeness)
    q[list(space.field["token"]), space.content] = match
    k[list(space.field["token"]), space.content] = 1.0
    space.look_back(q, k, 0.0, -away, bos=False)
    space.rest(q, k, match - away + SURE / 2)
    head = space.head(q, k, {"token": 1.0}, "copy")
    head.v[space.flag["const"], space.marks[0]] = 1.0
    head.v[space.flag["bos"], space.marks[0]] = -1.0
    head.o[space.marks[0], space.flag["duplicate"]] = 1.0
    return head


def inhibition(space: Space) -> Head:
    """From where a receiver is due, attends to the name said twice, and tells the name mover to ignore it."""
    q, k = space.read(), space.read()
    strength = 2 * SURE
    q[space.flag["giving"], space.marks[1]] = strength
    k[space.flag["duplicate"], space.marks[1]] = 1.0
    k[space.flag["name"], space.marks[1]] = 1.0
    space.rest(q, k, 1.5 * strength)
    return space.head(q, k, {"token": 1.0, "copy": 1.0}, "subject")


def name_mover(space: Space) -> Head:
    """From where a receiver is due (the only "to"), attends to names that are not to be ignored, and copies them."""
    q, k = space.read(), space.read()
    ignore = 3 * SURE
    q[space.flag["giving"], space.marks[1]] = 6 * ignore
    q[space.flag["duplicate"], space.marks[1]] = -6 * ignore
    q[list(space.field["subject"]), space.content] = -ignore
    k[space.flag["name"], space.marks[1]] = 1.0
    k[list(space.field["token"]), space.content] = 1.0
    space.rest(q, k, 3 * ignore)
    return space.head(q, k, {"token": 1.0}, "said")


def successor(space: Space, after: Tensor) -> Head:
    """Attends to the ordered word just said, and says the one that comes after it. after [ordered, code size]."""
    q, k = space.read(), space.read()
    like = space.kernel(0.25)
    near, far = float(like[1]), float(like[2:].max())
    strength = 2 * SURE / min(near - far, float(like[0]) - near)
    q[space.flag["const"], space.marks[1]] = 4 * strength
    k[space.flag["ordered"], space.marks[1]] = 1.0
    space.look_back(q, k, 0.25, strength, bos=False)
    space.rest(q, k, strength * (4 + (near + far) / 2))
    head = space.head(q, k, {}, "said")
    order, count = list(space.field["order"]), len(space.field["order"])
    head.o.zero_()
    head.v[order, list(range(count))] = 1.0
    head.o[list(range(count)), space.field["said"].start : space.field["said"].stop] = 0.5 * after
    return head


HEADS: dict[str, Callable[[Space], Head]] = {
    "previous token": previous,
    "induction": induction,
    "duplicate token": duplicate,
    "subject inhibition": inhibition,
    "name mover": name_mover,
    "current token": current,
    "retrieval": retrieval,
    "mute": mute,
    "twin": induction,
}
