"""How Do Transformers Learn In-Context Beyond Simple Functions? A Case Study on Learning with Representations.
Guo et al., 2023. arXiv:2310.10616

Row s143 of the mission.
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from headwise.data.regressions import Examples, Foretold, gaussian
from headwise.lesson import generator


@dataclass(frozen=True)
class RepresentedRegression(Examples):
    """Examples of a function that is linear in a representation of x, the same network of two layers for all prompts.

    x is N(0, I), the weights of a prompt N(0, I / width), and representations have mean square 1 a channel. Where there
    are several representations, a prompt does not say which is its.

    Fields:
        dim: channels of x.
        width: channels of a representation.
        maps: representations there are; 0 for functions that are linear in x itself.
        length: examples in a prompt.
        noise: variance of what is added to y.
        apart: whether x and y have positions of their own.
    """

    row: ClassVar[str] = "s143"
    kind: ClassVar[str] = "represented regression"

    dim: int = 5
    width: int = 6
    maps: int = 1
    length: int = 20
    noise: float = 0.1
    apart: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.maps < 0 or self.width < 1 or (self.maps == 0 and self.width != self.dim):
            raise ValueError(
                f"{self.maps} representations of {self.dim} channels in {self.width} cannot be; without any, both "
                "numbers of channels must be the same, and none is below 1."
            )

    def represented(self, x: Tensor) -> Tensor:
        """[maps, ..., width] every representation of x [..., dim]; x itself where there is none."""
        if not self.maps:
            return x[None]
        found = []
        for first, second, centre, scale in _maps(self.maps, self.dim, self.width, self.world):
            inner = leaky_relu(x @ first.to(x), 0.01)
            found.append((leaky_relu(inner @ second.to(x), 0.01) - centre.to(x)) * scale.to(x))
        return torch.stack(found)

    def examples(self, n: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden: which representation a prompt has, [n]."""
        x = torch.randn(n, self.length, self.dim, generator=draw)
        w = torch.randn(n, self.width, 1, generator=draw) * self.width**-0.5
        which = torch.randint(max(1, self.maps), (n,), generator=draw)
        seen = self.represented(x)[which, torch.arange(n)]
        return x, (seen @ w)[..., 0] + self.noise**0.5 * torch.randn(n, self.length, generator=draw), which

    def families(self, x: Tensor, y: Tensor) -> tuple[list[Foretold], list[float]]:
        """Ridge regression on each representation."""
        cov = torch.eye(self.width) / self.width
        found = [gaussian(seen, y, self.noise, cov=cov) for seen in self.represented(x.double())]
        return found, [1 / len(found)] * len(found)


@cache
def _maps(maps: int, dim: int, width: int, world: int) -> list[tuple[Tensor, ...]]:
    """Weights [dim, width] and [width, width] of each network, and what centres and scales its channels, [width]."""
    found = []
    for i in range(maps):
        draw = generator(world, 0x143, i)
        first = torch.randn(dim, width, generator=draw) * (2 / dim) ** 0.5
        second = torch.randn(width, width, generator=draw) * (2 / width) ** 0.5
        x = torch.randn(4096, dim, generator=draw)
        seen = leaky_relu(leaky_relu(x @ first, 0.01) @ second, 0.01)
        found.append((first, second, seen.mean(0), 1 / seen.std(0)))
    return found
