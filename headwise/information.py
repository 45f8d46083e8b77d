"""Information in bits: of tables, of values in bins, and the most that a summary of given size can say.

Bins are a choice. A deterministic network keeps all of its input; that it says less is true of what is left when its
values are rounded to a grid, and depends on the grid. Whoever uses `cells` says which.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def entropy(p: Floats) -> Floats:
    """Of distributions along the last axis, which need not be normalised: [..., n] -> [...]."""
    p = np.asarray(p, dtype=np.float64)
    p = p / p.sum(-1, keepdims=True)
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(-1)


def mutual(joint: Floats) -> float:
    """Of the two axes of a table of probabilities or counts [n, m]."""
    joint = np.asarray(joint, dtype=np.float64)
    return float(entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint.ravel()))


def cells(values: Floats, width: "float | Floats") -> NDArray[np.int64]:
    """Which cell of a grid each row of values [n, units] is in, as numbers [n] from 0; `width` of a bin, or of each."""
    bins = np.floor(np.asarray(values, dtype=np.float64) / width).astype(np.int64)
    # One number a row: sums of odd random multiples modulo 2^64, alike for different rows with a chance of n^2 / 2^64.
    odd = np.random.default_rng(0).integers(1, 2**63, bins.shape[1], dtype=np.int64) | 1
    return np.unique((bins * odd).sum(1), return_inverse=True)[1]


def plane(cell: NDArray[np.int64], likely: Floats) -> tuple[float, float]:
    """What a summary says of inputs that come equally often, and what it says of their label.

    Args:
        cell: [n] the value of the summary for each input. likely: [n] probability of label 1 for each input.

    Returns:
        I(X;T), which is the entropy of T because T follows from X, and I(T;Y).
    """
    counts = np.bincount(cell).astype(np.float64)
    ones = np.bincount(cell, weights=likely)
    return float(entropy(counts)), mutual(np.stack([ones, counts - ones], 1))


def bottleneck(
    likely: Floats, betas: "tuple[float, ...]", clusters: int = 8, rounds: int = 100
) -> list[tuple[float, float]]:
    """Points (I(X;T), I(T;Y)) of the information bottleneck's bound, by Blahut and Arimoto's alternation.

    Args:
        likely: [n] probability of label 1 for each of n equally frequent inputs.
        betas: what a bit about the label is worth in bits about the input, one point each.
        clusters: values of T; `rounds` of the alternation for each point, from the largest beta down.
    """
    given = np.stack([likely, 1 - likely], 1).clip(1e-12)
    inside = (given * np.log(given)).sum(1, keepdims=True)
    order = np.argsort(np.argsort(likely, kind="stable"), kind="stable")
    share = np.full((len(likely), clusters), 1e-3)
    share[np.arange(len(likely)), order * clusters // len(likely)] = 1
    share /= share.sum(1, keepdims=True)
    found = {}
    for beta in sorted(betas, reverse=True):
        for _ in range(rounds):
            size = share.mean(0).clip(1e-300)
            says = (share.T @ given / len(likely) / size[:, None]).clip(1e-12)
            apart = inside - given @ np.log(says).T
            share = np.log(size) - beta * apart
            share = np.exp(share - share.max(1, keepdims=True))
            share /= share.sum(1, keepdims=True)
        table = share / len(likely)
        found[beta] = (mutual(table), mutual(table.T @ given))
    return [found[beta] for beta in betas]
