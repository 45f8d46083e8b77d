"""In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of Multi-Head Softmax
Attention. He et al., 2025. arXiv:2503.12734

Row s094 of the mission.
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from headwise.data.regressions import QueryLast, gaussian, joined
from headwise.lesson import generator
from headwise.task import Batch


@dataclass(frozen=True)
class LinearRegression(QueryLast):
    """Examples of a linear function with noise, one a position, then an x: what is its y?

    x is N(0, I), the weights of a prompt are N(0, I / dim), and the query hides from itself.

    Fields:
        dim: channels of x.
        length: examples in a prompt.
        noise: variance of what is added to y.
    """

    row: ClassVar[str] = "s094"

    dim: int = 5
    length: int = 40
    noise: float = 0.1

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """Spans: "examples", "query"."""
        return joined(*self.examples(n, draw))

    def examples(self, n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs [n, length + 1, dim] and y [n, length + 1], the query last."""
        x = torch.randn(n, self.length + 1, self.dim, generator=draw)
        w = torch.randn(n, self.dim, 1, generator=draw) * self.dim**-0.5
        return x, (x @ w)[..., 0] + self.noise**0.5 * torch.randn(n, self.length + 1, generator=draw)

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """What known predictors say at the query, [B] each.

        "gradient descent": one step from 0 on the examples; "debiased gradient descent": the same with the mean of x
        taken away, as two heads of opposite sign do it; each with its best step for this length. "Bayes": ridge.
        """
        whole = batch.inputs["inputs_embeds"]
        x, y, query = whole[:, :-1, :-1], whole[:, :-1, -1:], whole[:, -1, :-1]
        slope, plain = ((y * seen).mean(1) for seen in (x - x.mean(1, keepdim=True), x))
        target = torch.cat([whole[..., -1][:, :-1], batch.answer], 1)
        bayes = gaussian(whole[..., :-1], target, self.noise, cov=torch.eye(self.dim) / self.dim)[0][:, -1]
        step, debiased = self.steps
        return {
            "gradient descent": step * (plain * query).sum(-1),
            "debiased gradient descent": debiased * (slope * query).sum(-1),
            "Bayes": bayes.float(),
        }

    @property
    def steps(self) -> tuple[float, float]:
        """The best step of gradient descent and of debiased gradient descent at this length, exact."""
        n, extra = self.length, self.dim * (1 + self.noise)
        return n / (n + 1 + extra), n / (n + extra)

    def lines(self) -> dict[str, float]:
        """Squared errors, noise included: exact but for Bayes, which is the mean over 20,000 prompts."""
        n, extra, top = self.length, self.dim * (1 + self.noise), 1 + self.noise
        return {
            "chance": top,
            "gradient descent": top - n / (n + 1 + extra),
            "debiased gradient descent": top - (n - 1) / (n + extra),
            "Bayes": _bayes(self.dim, self.length, self.noise),
        }


@cache
def _bayes(dim: int, length: int, noise: float) -> float:
    """The mean variance that Bayes foretells is its error, with far less scatter than the errors themselves."""
    x, y = LinearRegression(dim=dim, length=length, noise=noise).examples(20_000, generator(0x5094))
    return float(gaussian(x, y, noise, cov=torch.eye(dim) / dim)[1][:, -1].mean())
