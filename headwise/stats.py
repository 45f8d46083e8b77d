"""Intervals, null tests and corrections, all from a seeded generator so that they can be made again."""

import math

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


def sign_test(differences: Floats) -> float:
    """One-sided sign test: how often would fair coins give this many differences above 0? Those of 0 are left out.

    Args:
        differences: [n] paired differences; the claim is that more than half of them are above 0.

    Returns:
        the exact p of the binomial distribution; 1 where all are 0.
    """
    differences = np.asarray(differences, dtype=np.float64)
    above, n = int((differences > 0).sum()), int((differences != 0).sum())
    return sum(math.comb(n, hits) for hits in range(above, n + 1)) / 2**n


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


def auc(values: Floats, positive: Floats) -> float:
    """How often a positive has the larger value than a negative, ties counting half; NaN without both."""
    where = np.asarray(positive, dtype=bool)
    many, few = int(where.sum()), int((~where).sum())
    if not many or not few:
        return float("nan")
    return float((ranks(values)[where].sum() - many * (many + 1) / 2) / (many * few))


def spearman(a: Floats, b: Floats) -> float:
    """Spearman's rank correlation; NaN when one side is constant."""
    x, y = ranks(a), ranks(b)
    if x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def foretold(values: Floats, target: Floats, ridge: float = 1e-3) -> tuple[Floats, Floats]:
    """What ridge regression on the first half of the rows says of the second half.

    Args:
        values: [rows, D]. target: [rows, C].
        ridge: against the mean square of the centred values.

    Returns:
        what is said and what is true, [rows of the second half, C] each.
    """
    half = len(values) // 2
    values, target = np.asarray(values, dtype=np.float64), np.asarray(target, dtype=np.float64)
    centre, middle = values[:half].mean(0), target[:half].mean(0)
    given = values[:half] - centre
    gram = given.T @ given
    gram += ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    weight = np.linalg.solve(gram, given.T @ (target[:half] - middle))
    return (values[half:] - centre) @ weight + middle, target[half:]


def explained(said: Floats, target: Floats) -> float:
    """R squared: the share of the target's variance that is said, all columns together; below 0 for worse than none."""
    return float(1 - ((said - target) ** 2).sum() / ((target - target.mean(0)) ** 2).sum())


def binomial_interval(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a proportion."""
    if n == 0:
        return float("nan"), float("nan")
    share, spread = hits / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * np.sqrt(share * (1 - share) / n + spread / (4 * n))
    return float(middle - half), float(middle + half)
