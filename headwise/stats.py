"""Intervals, null tests and corrections, all from a seeded generator so that they can be made again."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def interval(rows: Floats, draws: int = 1000, level: float = 0.95, seed: int = 0) -> tuple[Floats, Floats]:
    """Bootstrap interval of the mean over the first axis.

    Args:
        rows: [n, ...] one value per prompt.

    Returns:
        low and high, each of shape [...]; NaN where n < 2.
    """
    rows = np.asarray(rows, dtype=np.float64)
    if len(rows) < 2:
        return np.full(rows.shape[1:], np.nan), np.full(rows.shape[1:], np.nan)
    counts = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=draws)
    means = np.tensordot(counts / len(rows), rows, axes=1)
    tail = (1 - level) / 2
    return np.quantile(means, tail, axis=0), np.quantile(means, 1 - tail, axis=0)


def sign_flip(differences: Floats, draws: int = 10_000, seed: int = 0) -> float:
    """One-sided paired permutation test: how often would random signs give a mean difference this large?

    Args:
        differences: [n] paired differences, one a prompt; the claim is that their mean is above 0.

    Returns:
        p in (0, 1]; the smallest value it can take is 1 / (draws + 1).
    """
    differences = np.asarray(differences, dtype=np.float64)
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(draws, len(differences)))
    hits = int((signs @ differences >= differences.sum() - 1e-12).sum())
    return (1 + hits) / (1 + draws)


def holm(p: list[float]) -> list[float]:
    """Holm's step-down correction (Holm, 1979). Returns adjusted p-values in the given order."""
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    running = 0.0
    for rank, place in enumerate(order):
        running = max(running, (len(p) - rank) * p[place])
        adjusted[place] = min(1.0, running)
    return adjusted.tolist()


def ranks(values: Floats) -> Floats:
    """Ranks from 1, ties sharing their mean rank."""
    values = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return ((last - counts + 1 + last) / 2)[inverse]


def spearman(a: Floats, b: Floats) -> float:
    """Spearman's rank correlation; NaN when one side is constant."""
    x, y = ranks(a), ranks(b)
    if x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def binomial_interval(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a proportion."""
    if n == 0:
        return float("nan"), float("nan")
    share, spread = hits / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * np.sqrt(share * (1 - share) / n + spread / (4 * n))
    return float(middle - half), float(middle + half)
