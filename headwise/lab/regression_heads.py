"""In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of Multi-Head Softmax
Attention. He et al., 2025. arXiv:2503.12734

Row s094 of the mission. Scaled down: 5,000 steps with a larger learning rate that decays, in place of 500,000, and
20,000 for four heads. The valley is flat: products of KQ and OV are as in the paper long before each of the two is, and
four heads have more ways to share them.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.comparison import Condition
from headwise.data import LinearRegression
from headwise.experiment import Experiment
from headwise.tiny import TinyConfig
from headwise.training import Training
from headwise.weights import Weights


class Circuits(NamedTuple):
    """What the heads of one layer of attention do to x and y.

    Attributes:
        kq: [H, d, d] what a query x and a key x give as score; `by_y`: [H, d] what a key's y adds to it.
        ov: [H, d + 1] what each channel of a value adds to the output; the last is that of y.
    """

    kq: Tensor
    by_y: Tensor
    ov: Tensor

    @property
    def omega(self) -> Tensor:
        """[H] mean of the diagonal of KQ."""
        return self.kq.diagonal(dim1=1, dim2=2).mean(-1)

    @property
    def mu(self) -> Tensor:
        """[H] what y adds to the output."""
        return self.ov[:, -1]

    @property
    def uneven(self) -> float:
        """Energy of KQ that is not omega times the identity, against that which is."""
        even = self.omega[:, None, None] * torch.eye(self.kq.shape[-1])
        return float(((self.kq - even).square().sum() + self.by_y.square().sum()) / even.square().sum())

    @property
    def sum(self) -> float:
        """Sum of mu over heads, against the largest."""
        return float(self.mu.sum().abs() / self.mu.abs().max())

    @property
    def leak(self) -> float:
        """The largest weight of x in OV, against the largest mu."""
        return float(self.ov[:, :-1].abs().max() / self.mu.abs().max())


def circuits(model: PreTrainedModel) -> Circuits:
    """KQ and OV of every head of a one-layer model of this experiment, as the model uses them: scaled, read out."""
    weights = Weights(model)
    heads = range(weights.heads(0))
    kq = torch.stack([weights.qk(0, i).full() for i in heads]) * model.config.head_dim**-0.5
    out = model.get_output_embeddings().weight.detach()[0]
    ov = torch.stack([weights.ov(0, i).full() @ out for i in heads])
    return Circuits(kq[:, :-1, :-1], kq[:, :-1, -1], ov)


@dataclass(frozen=True)
class RegressionHeads(Experiment):
    """Trains one layer of 1, 2 and 4 heads on linear regression: the heads pair up to gradient descent.

    Fields:
        heads: how many, one condition each.
        length: examples in a prompt.
    """

    row: ClassVar[str] = "s094"
    goal: ClassVar[tuple[str, str, float]] = ("loss", "below", 0.26)
    seeds: ClassVar[tuple[int, ...]] = (5,)

    heads: tuple[int, ...] = (1, 2, 4)
    length: int = 40

    def conditions(self) -> dict[str, Condition]:
        """One a number of heads."""
        lesson = LinearRegression(length=self.length)
        return {
            f"{count} head{'s' if count > 1 else ''}": Condition(
                TinyConfig(**lesson.config(heads=count)), lesson, self._training(count)
            )
            for count in self.heads
        }

    def _training(self, heads: int) -> Training:
        return Training(
            steps=500_000 if self.full else 5000 if heads < 4 else 20_000,
            batch=256,
            lr=1e-3 if self.full else 1e-2,
            decay="none" if self.full else "cosine",
            measure_every=200,
            rows=512,
            checkpoint_every=2000,
        )
