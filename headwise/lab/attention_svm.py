"""Transformers as Support Vector Machines. Tarzanagh et al., 2023. arXiv:2308.16898

Row s054 of the mission. The problem that attention solves while it is trained: with a fixed readout v, the weights W of
softmax(X W z) grow without bound, in the direction that separates one token of each prompt from the others by the
largest margin. All seeds are trained at once, without a network.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headwise.method import Method

Floats = NDArray[np.float64]


class Problem(NamedTuple):
    """Prompts of every seed: x [S, n, T, d] tokens, z [S, n, d] queries (the first tokens), v [S, d], sign [S, n]."""

    x: Floats
    z: Floats
    v: Floats
    sign: Floats

    @property
    def scores(self) -> Floats:
        """[S, n, T] how much each token would help, if attention went to it alone."""
        return self.sign[..., None] * np.einsum("sntd,sd->snt", self.x, self.v)

    def attention(self, w: Floats) -> Floats:
        """[S, n, T] softmax(X W z) of weights w [S, d, d]."""
        logits = np.einsum("sntd,sde,sne->snt", self.x, w, self.z)
        raised = np.exp(logits - logits.max(-1, keepdims=True))
        return raised / raised.sum(-1, keepdims=True)

    def loss(self, w: Floats) -> Floats:
        """[S] mean logistic loss."""
        return np.logaddexp(0, -(self.attention(w) * self.scores).sum(-1)).mean(-1)

    def gradient(self, w: Floats) -> Floats:
        """[S, d, d] of that loss."""
        p, scores = self.attention(w), self.scores
        margin = (p * scores).sum(-1)
        slope = -1 / (1 + np.exp(margin)) / margin.shape[1]
        pull = p * (scores - margin[..., None])
        # It adds up to 0 over tokens. Where one token has nearly all attention its own term is a difference of almost
        # equal numbers, and would be noise; the others are exact.
        top = p.argmax(-1)[..., None]
        np.put_along_axis(pull, top, 0, -1)
        np.put_along_axis(pull, top, -pull.sum(-1, keepdims=True), -1)
        return np.einsum("snt,sntd,sne->sde", slope[..., None] * pull, self.x, self.z)

    def margins(self, seed: int, tokens: NDArray[np.intp]) -> Floats:
        """[n (T - 1), d * d] rows a with a . W = how far the chosen token of a prompt stands above each other."""
        x, z = self.x[seed], self.z[seed]
        rows = []
        for i, best in enumerate(tokens):
            apart = np.delete(x[i, best] - x[i], best, axis=0)
            rows.append(np.einsum("td,e->tde", apart, z[i]).reshape(len(apart), -1))
        return np.concatenate(rows)


def nonnegative(matrix: Floats, target: Floats) -> Floats:
    """The y >= 0 with the smallest |matrix y - target| (Lawson and Hanson's active set)."""
    y, inside = np.zeros(matrix.shape[1]), np.zeros(matrix.shape[1], dtype=bool)
    for _ in range(10 * len(y)):
        pull = matrix.T @ (target - matrix @ y)
        if inside.all() or pull[~inside].max() <= 1e-11:
            break
        inside[np.where(inside, -np.inf, pull).argmax()] = True
        while True:
            free = np.zeros_like(y)
            free[inside] = np.linalg.lstsq(matrix[:, inside], target, rcond=None)[0]
            out = inside & (free <= 0)
            if not out.any():
                break
            y = y + (y[out] / (y[out] - free[out])).min() * (free - y)
            inside &= y > 1e-14
        y = free
    return y


def nearest(rows: Floats, bounds: Floats, to: Floats) -> Floats:
    """The w nearest to `to` with rows @ w >= bounds. Raises ValueError where there is none, or none was found."""
    bounds = bounds - rows @ to
    if (bounds <= 0).all():
        return to
    whole = np.vstack([rows.T, bounds[None]])
    target = np.zeros(len(whole))
    target[-1] = 1
    rest = whole @ nonnegative(whole, target) - target
    if -rest[-1] < 1e-9:
        raise ValueError("No weights of attention separate these tokens; use fewer prompts or more channels.")
    way = -rest[:-1] / rest[-1]
    short = (bounds - rows @ way).max()
    if short > 1e-6 * (1 + np.abs(bounds).max()):
        raise ValueError(f"Margins were not kept: one is {short:.1e} short; use fewer prompts or more channels.")
    return to + way


def hard_margin(
    rows: Floats, norm: str = "frobenius", rounds: int = 5000, weight: float = 0.3, tolerance: float = 1e-3
) -> Floats:
    """The [d, d] weights of the smallest norm with every margin at least 1.

    Args:
        rows: what `Problem.margins` gives.
        norm: "frobenius", exact; or "nuclear" (the sum of singular values), by at most `rounds` alternating steps.
        weight: of a step of the alternation; it decides how soon it is done, not where.
        tolerance: how much smaller a nuclear norm may still be, as a share of the one that was found. The bound is
            proved by the dual problem.

    Raises:
        ValueError: another norm, tokens that cannot be separated, or the tolerance is not met after all rounds.
    """
    size = round(rows.shape[1] ** 0.5)
    w = nearest(rows, np.ones(len(rows)), np.zeros(rows.shape[1]))
    if norm == "frobenius":
        return w.reshape(size, size)
    if norm != "nuclear":
        raise ValueError(f"{norm!r} is no norm here; allowed are frobenius and nuclear.")
    off, gap = np.zeros_like(w), np.inf
    for _ in range(rounds):
        left, values, right = np.linalg.svd((w - off).reshape(size, size))
        low = ((left * np.maximum(values - weight, 0)) @ right).ravel()
        w = nearest(rows, np.ones(len(rows)), low + off)
        off = off + low - w
        gap = _gap(w.reshape(size, size), off.reshape(size, size))
        if gap <= tolerance:
            return w.reshape(size, size)
    raise ValueError(
        f"The least nuclear norm is known to a share of {gap:.1e} after {rounds} rounds, where {tolerance:.1e} was "
        "asked; allow more rounds or a larger tolerance."
    )


def _gap(w: Floats, off: Floats) -> float:
    """By which share of w's nuclear norm the least one may be smaller, at most.

    What was added to come from low + off to w is rows' y with y >= 0, and y is 0 where a margin is above 1; so the sum
    of y is <w, -off>. Divided by the largest singular value of off, y is a point of the dual problem, and its sum is
    below every nuclear norm that keeps the margins.
    """
    largest = np.linalg.norm(off, 2)
    if largest == 0:
        return 1.0
    return float(1 + (w * off).sum() / largest / np.linalg.norm(w, "nuc"))


def cosine(a: Floats, b: Floats) -> float:
    """Of two matrices as vectors."""
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


@dataclass(frozen=True)
class AttentionSVM(Method):
    """Trains attention weights by gradient descent, and finds the max-margin weights that they should point to.

    Fields:
        prompts, tokens, dim: of a problem; tokens are Gaussian and of unit length.
        steps, lr: of gradient descent on W, each step of length lr; in the paper it has 2000 steps.
        factor_lr: the same for keys and queries; their product grows as the square of the way that they went.
        spread: standard deviation of the entries that keys and queries start with.
    """

    row: ClassVar[str] = "s054"

    prompts: int = 6
    tokens: int = 8
    dim: int = 10
    steps: int = 6000
    lr: float = 0.1
    factor_lr: float = 0.02
    spread: float = 0.01

    def problem(self, seeds: int, seed: int = 0) -> Problem:
        """Problems of this many seeds."""
        draw = np.random.default_rng(seed)
        x = draw.standard_normal((seeds, self.prompts, self.tokens, self.dim))
        x /= np.linalg.norm(x, axis=-1, keepdims=True)
        v = draw.standard_normal((seeds, self.dim))
        v /= np.linalg.norm(v, axis=-1, keepdims=True)
        sign = draw.choice((-1.0, 1.0), size=(seeds, self.prompts))
        return Problem(x, x[:, :, 0], v, sign)

    def train(self, problem: Problem) -> Floats:
        """[S, d, d] weights W after all steps, from 0."""
        w = np.zeros((len(problem.x), self.dim, self.dim))
        for _ in range(self.steps):
            w = w - self.lr * _unit(problem.gradient(w))
        return w

    def train_factors(self, problem: Problem, seed: int = 0) -> Floats:
        """[S, d, d] the product K Q' after all steps, where keys and queries are trained apart."""
        draw = np.random.default_rng([seed, 1])
        shape = (len(problem.x), self.dim, self.dim)
        k, q = (self.spread * draw.standard_normal(shape) for _ in range(2))
        for _ in range(self.steps):
            pull = problem.gradient(k @ q.transpose(0, 2, 1))
            on_k, on_q = pull @ q, pull.transpose(0, 2, 1) @ k
            both = _unit(np.concatenate([on_k, on_q], 1))
            k, q = k - self.factor_lr * both[:, : self.dim], q - self.factor_lr * both[:, self.dim :]
        return k @ q.transpose(0, 2, 1)


def _unit(pull: Floats) -> Floats:
    """Each matrix [S, ...] at length 1; one of zeros stays so, where attention has no way left to go.

    The largest entry is divided by first: squares of numbers such as 1e-200 would be 0.
    """
    largest = np.abs(pull).max((1, 2), keepdims=True)
    scaled = pull / np.where(largest > 0, largest, 1)
    length = np.linalg.norm(scaled, axis=(1, 2), keepdims=True)
    return scaled / np.where(length > 0, length, 1)
