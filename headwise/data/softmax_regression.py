"""The Closeness of In-Context Learning and Weight Shifting for Softmax Regression. Li et al., 2023. arXiv:2304.13276

Row s081 of the mission. Softmax regression looks for the x that minimises half the squared distance of
f(x) = exp(A x) / sum exp(A x) from b.
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from headwise.data.regressions import QueryLast, joined
from headwise.lesson import generator
from headwise.task import Batch


def objective(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Half the squared distance of softmax(A x) from b: a [..., n, d], b [..., n], x [..., d] -> [...]."""
    return 0.5 * ((a @ x[..., None])[..., 0].softmax(-1) - b).square().sum(-1)


def gradient(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Of the objective by x, [..., d]: A' (diag f - f f') (f - b)."""
    f = (a @ x[..., None])[..., 0].softmax(-1)
    apart = f - b
    inner = f * (apart - (f * apart).sum(-1, keepdim=True))
    return (a.mT @ inner[..., None])[..., 0]


def shift(a: Tensor, x: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """What a step of x does to the data: f(x + by) - f(x) [..., n], and the bound half |A| |by| on its length [...]."""
    moved = ((a @ (x + by)[..., None])[..., 0]).softmax(-1) - ((a @ x[..., None])[..., 0]).softmax(-1)
    return moved, 0.5 * torch.linalg.matrix_norm(a, 2) * by.norm(dim=-1)


@dataclass(frozen=True)
class SoftmaxRegression(QueryLast):
    """Rows of A with their entries of b, one a position, then another row: what would its entry be?

    b is softmax(A x) for a hidden x, times the number of rows, so that 1 is the mean. The query's entry is taken with
    the same denominator, and the query hides from itself.

    Fields:
        dim: channels of a row.
        length: rows in a prompt.
        spread: standard deviation of the entries of A x.
    """

    row: ClassVar[str] = "s081"
    kind: ClassVar[str] = "softmax regression"
    amount: ClassVar[str] = "spread"

    dim: int = 10
    length: int = 20
    spread: float = 0.5

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """Spans: "examples", "query"."""
        a = torch.randn(n, self.length + 1, self.dim, generator=draw)
        x = torch.randn(n, self.dim, generator=draw) * self.spread * self.dim**-0.5
        return joined(a, self.entries(a, x))

    def entries(self, a: Tensor, x: Tensor) -> Tensor:
        """[B, length + 1] entries for all rows a [B, length + 1, d], the query last, by weights x [B, d]."""
        logits = (a @ x[..., None])[..., 0]
        return (logits - logits[:, :-1].logsumexp(-1, keepdim=True)).exp() * self.length

    def stepped(self, batch: Batch, size: float) -> Tensor:
        """[B] what x says at the query after one step of gradient descent of this size from 0."""
        whole = batch.inputs["inputs_embeds"]
        a, b = whole[..., :-1], whole[:, :-1, -1] / self.length
        x = -size * gradient(a[:, :-1], b, torch.zeros_like(a[:, 0]))
        return self.entries(a, x)[:, -1]

    @property
    def step(self) -> float:
        """The size of one step that is best over 4,000 prompts."""
        return _best_step(self.dim, self.length, self.spread)

    def lines(self) -> dict[str, float]:
        """Squared errors over 4,000 prompts: always saying 1, one best step of gradient descent, and x itself."""
        batch = self.make(None, 4000, seed=0x5081)
        answer = batch.answer[:, 0]
        return {
            "chance": float((1 - answer).square().mean()),
            "one step": float((self.stepped(batch, self.step) - answer).square().mean()),
            "perfect": 0.0,
        }


@cache
def _best_step(dim: int, length: int, spread: float) -> float:
    lesson = SoftmaxRegression(dim=dim, length=length, spread=spread)
    batch = lesson.draw(4000, generator(0x5081, 1))
    low, high = 0.0, 4.0 * length**2
    for _ in range(40):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        a, b = (float((lesson.stepped(batch, s) - batch.answer[:, 0]).square().mean()) for s in (left, right))
        low, high = (low, right) if a < b else (left, high)
    return (low + high) / 2
