"""Towards Better Understanding of In-Context Learning Ability from In-Context Uncertainty Quantification. Liu et al.,
2024. arXiv:2405.15115

Row s047 of the mission.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headwise.data.regressions import Examples, Foretold, gaussian, nats
from headwise.lesson import Shape, generator
from headwise.task import Batch


@dataclass(frozen=True)
class UncertainRegression(Examples):
    """Examples of a linear function with noise that is as strong in one prompt as it likes: what is y, how sure is it?

    x is N(0, I), the weights of a prompt N(0, I), and the standard deviation of its noise uniform. A model says a mean
    and the logarithm of a variance. Splits: "other weights" (three times as large), "other noise" (twice as strong as
    the strongest), "other inputs" (channels of unlike sizes), "longer" (twice the examples), and "new tasks" (weights
    that are not of the pool).

    Fields:
        dim: channels of x.
        length: examples in a prompt.
        least, most: standard deviation of the noise.
        tasks: size of the pool of weights that prompts are drawn from; 0 for new ones in every prompt.
        apart: whether x and y have positions of their own.
    """

    row: ClassVar[str] = "s047"
    kind: ClassVar[str] = "uncertain regression"
    amount: ClassVar[str] = "least"
    tests: ClassVar[tuple[str, ...]] = ("other weights", "other noise", "other inputs", "longer", "new tasks")
    # So many strengths of noise stand for all of them in what Bayes says.
    grid: ClassVar[int] = 24

    dim: int = 5
    length: int = 20
    least: float = 0.1
    most: float = 0.9
    tasks: int = 0
    apart: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most <= self.least:
            raise ValueError(f"Noise from {self.least} to {self.most} has no range; the second must be the larger.")

    @property
    def shape(self) -> Shape:
        """Two numbers out, a mean and the logarithm of a variance."""
        return super().shape._replace(outputs=2)

    @property
    def pool(self) -> Tensor:
        """[tasks, dim] the weights that prompts are drawn from."""
        return torch.randn(self.tasks, self.dim, generator=generator(self.world, 0x47))

    def examples(self, n: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden: the standard deviation of the noise, [n]."""
        length = 2 * self.length if self.split == "longer" else self.length
        x = torch.randn(n, length, self.dim, generator=draw)
        w = torch.randn(n, self.dim, generator=draw)
        if self.tasks and self.split != "new tasks":
            w = self.pool[torch.randint(self.tasks, (n,), generator=draw)]
        noise = self.least + (self.most - self.least) * torch.rand(n, generator=draw)
        if self.split == "other weights":
            w = 3 * w
        elif self.split == "other noise":
            noise = torch.full((n,), 2 * self.most)
        elif self.split == "other inputs":
            x = x * torch.linspace(0.5, 1.5, self.dim)
        y = (x @ w[..., None])[..., 0] + noise[:, None] * torch.randn(n, length, generator=draw)
        return x, y, noise

    def families(self, x: Tensor, y: Tensor) -> tuple[list[Foretold], list[float]]:
        """One for each strength of noise (and each task of a pool), as they were drawn in training."""
        steps = (torch.arange(self.grid, dtype=torch.float64) + 0.5) / self.grid
        noises = (self.least + (self.most - self.least) * steps).square()
        if not self.tasks:
            found = [gaussian(x, y, noise) for noise in noises]
        else:
            y = y.double()
            means = (x.double() @ self.pool.double().T).unbind(-1)
            found = [
                (mean, noise.expand_as(y), -nats(mean, noise.expand_as(y), y)) for mean in means for noise in noises
            ]
        return found, [1 / len(found)] * len(found)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Nats, mean over the answers of a prompt."""
        return nats(logits[..., 0], spread(logits), batch.answer).mean(-1)

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The squared error of the mean, and the variance that is said."""
        return {
            "squared_error": (logits[..., 0] - batch.answer).square().mean(-1),
            "variance": spread(logits).mean(-1),
        }

    def lines(self) -> dict[str, float]:
        """Nats over 2,000 prompts: of a mean of 0 with one variance for all, and of Bayes' mean and variance."""
        batch = self.make(None, 2000, seed=0x50)
        answer = batch.answer.double()
        mean, variance, _ = self.bayes(batch)
        zero, whole = torch.zeros_like(answer), answer.square().mean().expand_as(answer)
        return {"chance": float(nats(zero, whole, answer).mean()), "Bayes": float(nats(mean, variance, answer).mean())}


def spread(logits: Tensor) -> Tensor:
    """The variance that a model says, between e**-8 and e**8."""
    return logits[..., 1].clamp(-8, 8).exp()
