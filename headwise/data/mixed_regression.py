"""In-Context Learning through the Bayesian Prism. Panwar et al., 2023. arXiv:2306.04891

Row s062 of the mission.
"""

from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from headwise.data.regressions import Examples, Foretold, gaussian

KINDS = ("dense", "sparse", "left", "right")


@dataclass(frozen=True)
class MixedRegression(Examples):
    """Examples of a linear function of one of several kinds, which the prompt does not name: what is y?

    x is N(0, I), and the weights of a prompt are N(0, I) ("dense"), the same with all but a few set to 0 ("sparse"), or
    N(0, I) with the first moved down ("left") or up ("right"). All kinds come equally often.

    Fields:
        kinds: of the functions.
        dim: channels of x.
        length: examples in a prompt.
        few: weights of a sparse function that are not 0.
        centre: how far the first weight is moved.
        noise: variance of what is added to y.
        apart: whether x and y have positions of their own.
    """

    row: ClassVar[str] = "s062"
    kind: ClassVar[str] = "mixed regression"

    kinds: tuple[str, ...] = ("dense", "sparse")
    dim: int = 5
    length: int = 12
    few: int = 1
    centre: float = 3.0
    noise: float = 0.1
    apart: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.kinds:
            if name not in KINDS:
                raise ValueError(f"{name!r} is no kind of linear function here; known are {', '.join(KINDS)}.")
        if not self.kinds or not 1 <= self.few <= self.dim:
            raise ValueError(
                f"{len(self.kinds)} kinds with {self.few} of {self.dim} weights are nothing to draw from; at least one "
                "kind and one weight are needed."
            )

    def examples(self, n: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden: which of the kinds a prompt is of, [n]."""
        x = torch.randn(n, self.length, self.dim, generator=draw)
        w = torch.randn(n, self.dim, generator=draw)
        kept = torch.rand(n, self.dim, generator=draw).argsort(-1) < self.few
        kind = torch.randint(len(self.kinds), (n,), generator=draw)
        for i, name in enumerate(self.kinds):
            rows = kind == i
            if name == "sparse":
                w[rows] *= kept[rows]
            elif name in ("left", "right"):
                w[rows, 0] += self.centre if name == "right" else -self.centre
        noise = self.noise**0.5 * torch.randn(n, self.length, generator=draw)
        return x, (x @ w[..., None])[..., 0] + noise, kind

    def families(self, x: Tensor, y: Tensor) -> tuple[list[Foretold], list[float]]:
        """One for each kind, and for sparse functions one for each choice of weights."""
        found, prior = [], []
        for name in self.kinds:
            priors = self._priors(name)
            found += [gaussian(x, y, self.noise, mean, cov) for mean, cov in priors]
            prior += [1 / len(self.kinds) / len(priors)] * len(priors)
        return found, prior

    def _priors(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Means and covariances of the weights, equally likely."""
        mean, whole = torch.zeros(self.dim), torch.ones(self.dim)
        if name == "sparse":
            masks = [torch.isin(torch.arange(self.dim), torch.tensor(c)) for c in self._choices()]
            return [(mean, torch.diag(mask.float())) for mask in masks]
        if name != "dense":
            mean[0] = self.centre if name == "right" else -self.centre
        return [(mean, torch.diag(whole))]

    def _choices(self) -> list[tuple[int, ...]]:
        return list(combinations(range(self.dim), self.few))

    def only(self, kind: str) -> "MixedRegression":
        """The same with one kind of functions alone: what Bayes would say who takes every prompt for one of these."""
        return replace(self, kinds=(kind,))

    def likely(self, weights: Tensor) -> Tensor:
        """[kinds, B, n] how likely each kind is, from the weights of the families that `bayes` tells."""
        sizes = [len(self._priors(name)) for name in self.kinds]
        return torch.stack([part.sum(0) for part in weights.split(sizes)])
