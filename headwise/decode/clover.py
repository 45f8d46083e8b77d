"""Clover: Regressive Lightweight Speculative Decoding with Sequential Knowledge. Xiao et al., 2024. arXiv:2405.00263"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from headwise.draft_heads import TAIL, Context, DraftHeads, HeadsMethod, Lesson, res_blocks


@dataclass(frozen=True)
class Clover(HeadsMethod):
    """A state that takes in one guessed token after the other by attention, after layers that turn it towards guessing.

    Fields:
        path: folder of trained heads.
        tree: branches at each depth; as many guesses as depths.
        augment: layers of the augmenting block, over the latest states.
        reach: latest states that it sees.
        regressive: whether guessed tokens are taken in; without, it is its own control.
    """

    row: ClassVar[str] = "s116"
    path: str = ""
    tree: tuple[int, ...] = (3, 2, 1, 1)
    augment: int = 1
    reach: int = 64
    regressive: bool = True

    def untrained(self, model: PreTrainedModel) -> DraftHeads:
        """Heads that pass the state on unchanged."""
        return CloverHeads(self, model)


class CloverHeads(DraftHeads):
    """One attention decoder for all steps, and residual blocks of each guess's own."""

    lesson = Lesson(soft=True, hidden=10.0, decay=0.7)

    def __init__(self, method: Clover, model: PreTrainedModel) -> None:
        super().__init__(method, model, len(method.tree), method.reach)
        self.augment = Context(self.width, method.augment, method.reach) if method.augment else None
        self.attention = TokenAttention(self.width)
        self.blocks = nn.ModuleList(res_blocks(self.width, 1) for _ in range(self.count))

    def starts(self, states: Tensor, real: Tensor) -> Tensor:
        """States turned towards guessing."""
        return states if self.augment is None else states + self.augment(states, real)

    def step(self, i: int, start: Tensor, tokens: Tensor) -> Tensor:
        """The state after the tokens x(t+1) to x(t+i)."""
        state = start
        for place in range(i if self.method.regressive else 0):
            state = self.attention(state, tokens[..., TAIL + place, :])
        return self.blocks[i - 1](state)


class TokenAttention(nn.Module):
    """A state attends to one token: each head adds the token's value, by the cosine between query and key."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(2 * width, width)
        for module in (self.out, self.mix):
            nn.init.zeros_(module.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, state: Tensor, token: Tensor) -> Tensor:
        """From a state [..., D] and a token [..., D] to a state [..., D]."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f, x in ((self.q, state), (self.k, token), (self.v, token)))
        state = state + self.out((cosine_similarity(q, k, dim=-1)[..., None] * v).flatten(-2))
        return state + nn.functional.silu(self.mix(torch.cat([self.norm(state), token], -1)))
