"""LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention. Yang et al., 2025. arXiv:2502.14866

Pages are scored by the rule of Quest (Tang et al., 2024, arXiv:2406.10774). LServe's other half, streaming heads, is
`streaming` or `duo` for the other KV heads of a plan.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from headwise.blocks import Bounds, columns_of
from headwise.kv_cache import CacheMethod
from headwise.store import Full, Store, Turn, mix

NONE = -(1 << 24)


@dataclass(frozen=True)
class Pages(CacheMethod):
    """All keys are kept, but a decoded token reads only the pages whose keys may fit its query best.

    A page's score is an upper bound of q.k over its keys, from the smallest and largest value of each channel; the
    queries that share a KV head share the choice, by the largest score among them. The first page and the newest are
    always read. Turns of more than `single` new tokens are prefill and read everything. A small budget wants small
    pages: of four needles in 2,000 tokens SmolLM2-135M finds two with 7 pages of 64, all with 28 of 16 in pieces of 4.

    Fields:
        budget: tokens read at most, a multiple of `page`, 3 pages or more.
        page: tokens of a page. piece: tokens that have bounds of their own; it divides `page`.
        interval: tokens between two choices; it divides `page`, so that a new page is always a new choice.
        single: turns up to this length choose for each token, as if the tokens had come one by one.
    """

    row: ClassVar[str] = "s123"
    budget: int = 1024
    page: int = 64
    piece: int = 16
    interval: int = 4
    single: int = 32

    def __post_init__(self) -> None:
        if min(self.page, self.piece, self.interval, self.single) < 1 or self.budget < 3 * self.page:
            raise ValueError(
                f"budget is {self.budget} with pages of {self.page}; allowed are 3 pages or more, and page, piece, "
                "interval and single from 1."
            )
        if self.page % self.piece or self.page % self.interval or self.budget % self.page:
            raise ValueError(
                f"A page of {self.page} tokens must be a multiple of piece {self.piece} and of interval "
                f"{self.interval}, and the budget {self.budget} a multiple of the page."
            )

    def store(self, reserve: int = 0) -> Store:
        """Keys, values and bounds of some KV heads."""
        return Paged(self, reserve)


class Paged(Full):
    """Keys and values of every token, their bounds, and the pages that were chosen last.

    Pages are counted from the first real token of each row, so that padding changes no choice. A choice is kept as long
    as the token that made it; where tokens were taken back beyond it, the next token chooses.

    Attributes:
        read_tokens: keys that each query head read for the newest token; read_bounds: pieces whose bounds it read.
    """

    def __init__(self, method: Pages, reserve: int = 0) -> None:
        super().__init__(reserve)
        self.method = method
        self.bounds = Bounds(method.piece)
        self.chosen: Tensor | None = None  # [B, N, H, pages] the last N choices; NONE where there are fewer pages
        self.chosen_at: list[int] = []  # the column of each choice
        self.read_tokens = self.read_bounds = 0

    @property
    def one_by_one(self) -> int:
        """What the method says."""
        return self.method.single

    def read(self, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        """Everything in prefill; the first page, the newest and the best for each token that is decoded."""
        turn.plain("A paged cache")
        length, end = k.shape[2], turn.past + k.shape[2]
        self.bounds.take(k, turn.past, turn.pads)
        if length > self.method.single or end - self.bounds.least <= self.method.budget:
            if length > self.method.single:
                self.chosen, self.chosen_at = None, []
            self.read_tokens, self.read_bounds = end, 0
            return super().read(q, k, v, turn)
        self.kept.append(k, v)
        return torch.cat([self._one(q[:, :, i : i + 1], turn.past + i, turn) for i in range(length)], 2)

    def openings(self, length: int) -> range:
        """All of a prompt, which reads everything; of a shorter turn it is not known what it would choose."""
        return range(length, length + 1) if length > self.method.single else range(0)

    def remember(self, k: Tensor, v: Tensor, turn: Turn) -> None:
        """Write them behind what is there, and their bounds."""
        self.bounds.take(k, turn.past, turn.pads)
        super().remember(k, v, turn)

    def _one(self, q: Tensor, column: int, turn: Turn) -> Tensor:
        """What one token reads: q [B, H*G, 1, d] -> z."""
        first, page = self.bounds.first[:, None, None], self.method.page
        own = (column - self.bounds.first) // page
        choice = self._choice(q, column, own)
        pages = torch.cat([choice, own[:, None, None].expand(-1, choice.shape[1], 1)], 2)
        columns = ((first + pages * page)[..., None] + torch.arange(page, device=q.device)).flatten(2)
        seen = ((columns >= first) & (columns <= column)) | (columns == column)
        self.read_tokens = columns.shape[2]
        k, v = columns_of(self.kept.k, columns), columns_of(self.kept.v, columns)
        return mix(q, k, v, seen[:, :, None], turn)

    def _choice(self, q: Tensor, column: int, own: Tensor) -> Tensor:
        """[B, H, pages] what this token reads beside its own page: chosen now where it is time, else as before."""
        if column < self.bounds.least + self.method.budget:
            # Everything, as a token that comes alone here would; it is no choice that later tokens could keep.
            return self._choose(q, column, own)
        self.read_bounds = 0
        if self.chosen is None:
            self.chosen, self.chosen_at = self._choose(q, column, own)[:, None], [column]
            return self.chosen[:, 0]
        last, due = self.chosen[:, -1], (column - self.bounds.first) % self.method.interval == 0
        if bool(due.any()) if self.bounds.padded else column % self.method.interval == 0:
            last = torch.where(due[:, None, None], self._choose(q, column, own), last)
            keep = min(len(self.chosen_at), 2 * self.method.single) if self.recording else 0
            start = len(self.chosen_at) - keep
            self.chosen = torch.cat([self.chosen[:, start:], last[:, None]], 1)
            self.chosen_at = [*self.chosen_at[start:], column]
        return last

    def _choose(self, q: Tensor, column: int, own: Tensor) -> Tensor:
        """[B, H, budget / page - 1] the first page and those with the largest bounds, before the own one."""
        method = self.method
        count, pages = method.budget // method.page - 1, max(0, (column - self.bounds.least) // method.page)
        self.read_bounds = pages * (method.page // method.piece)
        if not pages:
            return torch.full((len(own), self.kept.k.shape[1], count), NONE, device=q.device)
        scores = self.bounds.above(q, self.read_bounds).amax(2).unflatten(2, (pages, -1)).amax(3)
        numbers = torch.arange(pages, device=q.device)
        scores = scores.masked_fill(numbers == 0, torch.inf)
        scores = scores.masked_fill((numbers >= own[:, None])[:, None], -torch.inf)
        best = scores.topk(min(count, pages), sorted=False)
        chosen = best.indices.masked_fill(best.values == -torch.inf, NONE)
        return pad(chosen, (0, count - chosen.shape[2]), value=NONE)

    def crop(self, tokens: int) -> None:
        """Forget the last tokens, their bounds and the choices they made; any number can be taken back."""
        super().crop(tokens)
        if tokens > 0 and self.bounds.length:
            self.bounds.shrink(self.kept.k)
            held = sum(at < self.kept.length for at in self.chosen_at)
            self.chosen_at = self.chosen_at[:held]
            self.chosen = self.chosen[:, :held] if self.chosen is not None and held else None

    def clear(self) -> None:
        """Hold nothing."""
        super().clear()
        self.chosen_at = []
