"""Functions to be learned from examples in the prompt: how examples are laid out, and what the best predictor says."""

from math import log, pi
from typing import ClassVar

import torch
from torch import Tensor

from headwise.lesson import Lesson, Shape
from headwise.task import Batch

# Of each y: mean, variance, and log density of the one that came, [B, n] each.
Foretold = tuple[Tensor, Tensor, Tensor]


class Regression(Lesson):
    """Base of the lessons whose answers are numbers. Each has the fields `dim`, channels of x, and `length`, examples.

    Class attributes:
        kind: what the lesson is called in errors.
        amount: the field that must be above 0.
    """

    kind: ClassVar[str] = "regression"
    amount: ClassVar[str] = "noise"

    dim: int
    length: int

    def __post_init__(self) -> None:
        super().__post_init__()
        amount = getattr(self, self.amount)
        if self.dim < 1 or self.length < 2 or amount <= 0:
            raise ValueError(
                f"dim={self.dim}, length={self.length}, {self.amount}={amount} is no {self.kind}; allowed are "
                f"1 channel, 2 examples and a {self.amount} above 0, or more."
            )

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Squared error, mean over the answers of a prompt."""
        return squared(logits, batch)

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """None but the loss."""
        return {}


class QueryLast(Regression):
    """Base of the regressions in which only the last x of a prompt is asked about; see `joined`."""

    @property
    def shape(self) -> Shape:
        """Vectors of x and y, one number out."""
        return Shape(self.length + 1, 1, input_size=self.dim + 1)

    def cells(self, batch: Batch) -> dict[str, Tensor]:
        """From the query: "examples"."""
        last = torch.zeros(1, self.length + 1, self.length + 1, dtype=torch.bool)
        last[:, -1, :-1] = True
        return {"examples": last}

    def config(self, **options: object) -> dict[str, object]:
        """One layer of softmax attention and nothing else, each head as wide as the input."""
        fit = {"layers": 1, "heads": 2, "width": self.dim + 1, "head_dim": self.dim + 1, "read_in": False}
        return super().config(**(fit | {"pos": "none", "norm": "none", "residual": False} | options))


class Examples(Regression):
    """Base of the regressions in which every y of a prompt is asked for, each from the examples before it.

    Besides `dim` and `length`, each has the field `apart`: x and y have positions of their own, as in the papers; else
    a position holds an x and the example before it, so that nothing needs to be copied and no positions are needed.
    """

    apart: bool

    @property
    def shape(self) -> Shape:
        """Vectors of x and y, one number out."""
        if self.apart:
            return Shape(2 * self.length, 1, input_size=self.dim + 1)
        return Shape(self.length, 1, input_size=2 * self.dim + 1)

    def examples(self, n: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs [n, length, dim], y [n, length], and what is hidden from the model, [n, ...]."""
        raise TypeError(f"{type(self).__name__} does not say how its examples are drawn.")

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """An answer for every example."""
        x, y, _ = self.examples(n, draw)
        return self.lay(x, y)

    def lay(self, x: Tensor, y: Tensor) -> Batch:
        """These examples as a prompt."""
        return interleaved(x, y) if self.apart else stacked(x, y)

    def cells(self, batch: Batch) -> dict[str, Tensor]:
        """From every x to the y before it: "examples"; and where they are apart, from every y to its x: "own x"."""
        columns = torch.arange(batch.inputs["inputs_embeds"].shape[1])
        back = columns[:, None] - columns
        if not self.apart:
            return {"examples": ((back >= 0) & (columns > 0))[None]}
        is_y = columns % 2 == 1
        own = (back == 1) & is_y[:, None]
        return {"examples": ((back > 0) & ~is_y[:, None] & is_y)[None], "own x": own[None]}

    def families(self, x: Tensor, y: Tensor) -> "tuple[list[Foretold], list[float]]":
        """What Bayes says for each family of functions that a prompt may be of, and how often each is drawn."""
        raise TypeError(f"{type(self).__name__} does not say what Bayes says.")

    def bayes(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance [B, n] of every y, and the weight of each family [families, B, n], in float64."""
        return mixture(*self.families(*pairs(batch)))

    def lines(self) -> dict[str, float]:
        """Losses over 2,000 prompts: of always saying 0, and of Bayes by the variance that it foretells."""
        batch = self.make(None, 2000, seed=0x50)
        return {"chance": float(batch.answer.square().mean()), "Bayes": float(self.bayes(batch)[1].mean())}

    def config(self, **options: object) -> dict[str, object]:
        """Blocks with MLPs; rotary positions where x and y are apart, else none."""
        fit = {"layers": 3, "heads": 4, "width": 64, "mlp": 128, "pos": "rope" if self.apart else "none"}
        return super().config(**(fit | options))


def joined(x: Tensor, y: Tensor) -> Batch:
    """Each example is one position (x, y), the query the last, (x, 0); nobody looks at it, itself included.

    Args:
        x: [B, n + 1, d], the query last. y: [B, n + 1].

    Returns:
        inputs [B, n + 1, d + 1]; `answer` [B, 1] is the y of the query. Spans: "examples", "query".
    """
    n = x.shape[1] - 1
    seen = torch.cat([y[:, :-1], torch.zeros_like(y[:, :1])], 1)
    mask = torch.ones(len(x), n + 1, dtype=torch.long)
    mask[:, -1] = 0
    at = torch.full((len(x), 1), n)
    return Batch(
        {"inputs_embeds": torch.cat([x, seen[..., None]], -1), "attention_mask": mask},
        at=at,
        answer=y[:, -1:],
        spans={"examples": torch.tensor([0, n]).expand(len(x), 2), "query": torch.cat([at, at + 1], 1)},
    )


def interleaved(x: Tensor, y: Tensor, about: "dict | None" = None) -> Batch:
    """Positions x, y, x, y, ...; at every x its y is to be told from the examples before it.

    Args:
        x: [B, n, d]. y: [B, n].

    Returns:
        inputs [B, 2n, d + 1]: x fills the first d channels, y the last; `at` and `answer` [B, n].
    """
    rows, n, d = x.shape
    whole = torch.zeros(rows, 2 * n, d + 1)
    whole[:, 0::2, :d] = x
    whole[:, 1::2, d] = y
    return Batch(
        {"inputs_embeds": whole}, at=torch.arange(0, 2 * n, 2).expand(rows, n), answer=y, about=dict(about or {})
    )


def stacked(x: Tensor, y: Tensor, said: "Tensor | None" = None) -> Batch:
    """Position i holds x_i and the example before it; its y is to be told from what has been seen so far.

    Args:
        x: [B, n, d]. y: [B, n], the answers.
        said: [B, n, c] what is seen of each y, by default the number itself.

    Returns:
        inputs [B, n, 2d + c]: x_i, x_(i-1), y_(i-1), the last two 0 at the first position; `at` and `answer` [B, n].
    """
    before = torch.cat([x, y[..., None] if said is None else said], -1)[:, :-1]
    before = torch.cat([torch.zeros_like(before[:, :1]), before], 1)
    at = torch.arange(x.shape[1]).expand(len(x), -1)
    return Batch({"inputs_embeds": torch.cat([x, before], -1)}, at=at, answer=y)


def pairs(batch: Batch) -> tuple[Tensor, Tensor]:
    """Inputs x [B, n, d] and y [B, n] of interleaved or stacked examples."""
    whole, n = batch.inputs["inputs_embeds"], batch.answer.shape[1]
    x = whole[:, 0::2, :-1] if whole.shape[1] == 2 * n else whole[..., : whole.shape[-1] // 2]
    return x, batch.answer


def squared(logits: Tensor, batch: Batch) -> Tensor:
    """Squared error, mean over the answers of a prompt: logits [B, P, 1 or more] -> [B]."""
    return (logits[..., 0] - batch.answer).square().mean(-1)


def gaussian(
    x: Tensor,
    y: Tensor,
    noise: "float | Tensor",
    mean: "Tensor | None" = None,
    cov: "Tensor | None" = None,
) -> Foretold:
    """What Bayes says of each y from the examples before it, where y = w.x + noise and w is Gaussian.

    Args:
        x: [B, n, d]. y: [B, n]. noise: variance, above 0; a number, or [B].
        mean: [d] of the prior, by default 0. cov: [d, d], by default the identity.

    Returns:
        mean, variance (noise included) and log density of the y that came, [B, n] each, in float64.
    """
    rows, n, d = x.shape
    x, y = x.double(), y.double()
    noise = torch.as_tensor(noise, dtype=torch.float64)
    w = torch.zeros(rows, d, dtype=torch.float64) if mean is None else mean.double().expand(rows, d).clone()
    spread = (torch.eye(d, dtype=torch.float64) if cov is None else cov.double()).expand(rows, d, d).clone()
    means, variances = [], []
    for i in range(n):
        at = x[:, i]
        moved = (spread @ at[..., None])[..., 0]
        variance = (moved * at).sum(-1) + noise
        guess = (w * at).sum(-1)
        means.append(guess)
        variances.append(variance)
        gain = moved / variance[:, None]
        w = w + gain * (y[:, i] - guess)[:, None]
        spread = spread - gain[:, :, None] * moved[:, None]
    mu, var = torch.stack(means, 1), torch.stack(variances, 1)
    return mu, var, -nats(mu, var, y)


def nats(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    """Of y under a Gaussian, elementwise: the negative log density."""
    return 0.5 * ((y - mean).square() / variance + variance.log() + log(2 * pi))


def mixture(parts: "list[Foretold]", prior: "list[float] | Tensor") -> tuple[Tensor, Tensor, Tensor]:
    """Bayes over several families of functions, each weighed by how well it foretold the examples so far.

    Args:
        parts: what `gaussian` said for each family.
        prior: [families] how often each is drawn.

    Returns:
        mean and variance [B, n], and the weights of the families [families, B, n] at each position.
    """
    mu, var, density = (torch.stack([part[i] for part in parts]) for i in range(3))
    before = torch.cat([torch.zeros_like(density[..., :1]), density.cumsum(-1)[..., :-1]], -1)
    weight = (before + torch.as_tensor(prior, dtype=torch.float64).log()[:, None, None]).softmax(0)
    mean = (weight * mu).sum(0)
    return mean, (weight * (var + mu.square())).sum(0) - mean.square(), weight
