"""In-Context Learning through the Bayesian Prism. Panwar et al., 2023. arXiv:2306.04891

Row s062 of the mission.
"""

from dataclasses import dataclass, field
from math import pi
from typing import ClassVar

import torch
from torch import Tensor

from headwise.data.regressions import Examples, Foretold, gaussian


@dataclass(frozen=True)
class FourierSeries(Examples):
    """Examples of a sum of waves around a circle: what is y? Some frequencies come more often than others.

    x is the cosine and the sine of an angle.
    A prompt has the first 1, 2, ... or all frequencies (or the last so many), equally likely, each with a cosine and a
    sine of random sizes; the expected square of y is 1.

    Fields:
        frequencies: how many there are.
        rising: whether high frequencies come more often than low ones.
        length: examples in a prompt.
        noise: variance of what is added to y.
        apart: whether x and y have positions of their own.
        dim: channels of x, always 2.
    """

    row: ClassVar[str] = "s062"
    kind: ClassVar[str] = "Fourier series"

    frequencies: int = 4
    rising: bool = False
    length: int = 20
    noise: float = 0.01
    apart: bool = False
    dim: int = field(default=2, init=False)

    def waves(self, x: Tensor) -> Tensor:
        """[..., 2 * frequencies] cosines, then sines, of x [..., 2]."""
        angles = torch.atan2(x[..., 1:], x[..., :1]) * torch.arange(1, self.frequencies + 1)
        return torch.cat([angles.cos(), angles.sin()], -1)

    def sizes(self) -> Tensor:
        """[frequencies, frequencies] variance of each coefficient in functions of 1, 2, ... frequencies."""
        found = torch.ones(self.frequencies, self.frequencies).tril() / torch.arange(1, self.frequencies + 1)[:, None]
        return found.flip(1) if self.rising else found

    def profile(self) -> Tensor:
        """[frequencies] the share of each in the power of the functions that are drawn."""
        return self.sizes().mean(0)

    def examples(self, n: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden: how many frequencies a prompt has, less one, [n]."""
        x = around(2 * torch.rand(n, self.length, generator=draw) - 1)
        many = torch.randint(self.frequencies, (n,), generator=draw)
        w = torch.randn(n, 2 * self.frequencies, generator=draw) * self.sizes()[many].sqrt().repeat(1, 2)
        noise = self.noise**0.5 * torch.randn(n, self.length, generator=draw)
        return x, (self.waves(x) @ w[..., None])[..., 0] + noise, many

    def families(self, x: Tensor, y: Tensor) -> tuple[list[Foretold], list[float]]:
        """One for each number of frequencies."""
        seen = self.waves(x)
        found = [gaussian(seen, y, self.noise, cov=torch.diag(size.repeat(2))) for size in self.sizes()]
        return found, [1 / len(found)] * len(found)

    def config(self, **options: object) -> dict[str, object]:
        """With wider MLPs, which must make waves, and without norms, behind which waves are hard to learn."""
        return super().config(**({"mlp": 256, "act": "gelu", "norm": "none"} | options))


def around(share: Tensor) -> Tensor:
    """[..., 2] cosine and sine of angles, given as shares of half a turn."""
    return torch.stack([(pi * share).cos(), (pi * share).sin()], -1)


def grid(points: int) -> Tensor:
    """[points, 2] evenly around the circle."""
    return around(2 * torch.arange(points) / points - 1)


def power(values: Tensor, frequencies: int) -> Tensor:
    """[..., frequencies] power of the frequencies 1, 2, ... in a function known on `grid` [..., points]."""
    points = values.shape[-1]
    return 2 * (torch.fft.rfft(values.double())[..., 1 : frequencies + 1].abs() / points).square()
