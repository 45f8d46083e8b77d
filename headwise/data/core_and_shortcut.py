"""On the Foundations of Shortcut Learning. Hermann et al., 2023. arXiv:2310.16228

Row s039 of the mission.
"""

from dataclasses import dataclass
from functools import cache
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from headwise.lesson import Lesson, Shape, generator
from headwise.task import Batch

REACH, GRID = 3.0, 61  # the latent plane that is looked at: from -3 to 3 in both directions, 61 steps


@dataclass(frozen=True)
class CoreAndShortcut(Lesson):
    """Two hidden numbers tell of a class: the core tells more of it, the shortcut may be easier to find in the input.

    Given class -1 or 1, each number is Gaussian with variance 1 around a mean of the class's sign. Each is written
    along a direction of its own, the shortcut `amplified` times larger; or it goes through random layers first. Bayes
    weighs both numbers by their means, however they are written.

    Fields:
        core, shortcut: how often the sign of the number is that of the class.
        amplified: length of the shortcut in the input, against the core.
        nested: random tanh layers that the core goes through before it is written.
        dim: channels of an input, in `parts` positions.
    """

    row: ClassVar[str] = "s039"

    core: float = 0.9
    shortcut: float = 0.85
    amplified: float = 1.0
    nested: int = 0
    dim: int = 100
    parts: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.5 < self.shortcut <= self.core < 1 or self.amplified <= 0 or self.nested < 0:
            raise ValueError(
                f"A shortcut of {self.shortcut} beside a core of {self.core}, {self.amplified} times as long, is none; "
                "allowed are 0.5 < shortcut <= core < 1 and a length above 0."
            )
        if self.dim < 2 or self.dim % self.parts:
            raise ValueError(f"{self.dim} channels do not go into {self.parts} positions; use a multiple, 2 or more.")

    @property
    def shape(self) -> Shape:
        """Vectors, two classes; the answer is due at the last position."""
        return Shape(self.parts, 2, input_size=self.dim // self.parts)

    @property
    def means(self) -> Tensor:
        """[2] of core and shortcut, given class 1."""
        return torch.special.ndtri(torch.tensor([self.core, self.shortcut]))

    def latents(self, n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Core and shortcut [n, 2], and classes 0 or 1 [n]."""
        label = torch.randint(2, (n,), generator=draw)
        return torch.randn(n, 2, generator=draw) + (2 * label - 1)[:, None] * self.means, label

    def write(self, latents: Tensor) -> Tensor:
        """The inputs [..., dim] that stand for core and shortcut [..., 2]."""
        ways, layers = _directions(self.dim, self.nested, self.world)
        core = latents[..., :1] * ways[0]
        for layer in layers:
            core = torch.tanh(core @ layer)
        return core + self.amplified * latents[..., 1:] * ways[1]

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """Inputs [n, parts, dim / parts]."""
        latents, label = self.latents(n, draw)
        x = self.write(latents).view(n, self.parts, -1)
        return Batch({"inputs_embeds": x}, at=torch.full((n, 1), self.parts - 1), answer=label[:, None])

    def plane(self) -> Tensor:
        """[GRID ** 2, 2] cores and shortcuts, evenly spread."""
        line = torch.arange(-(GRID // 2), GRID // 2 + 1) * (2 * REACH / (GRID - 1))
        return torch.cartesian_prod(line, line)

    def bias(self, said: Tensor) -> Tensor:
        """How much more a model leans on the shortcut than Bayes does: 0 for Bayes, about 0.6 for the shortcut alone.

        Leaning is the share of the plane in which the decision is that of the shortcut's sign, minus the share in which
        it is that of the core's.

        Args:
            said: [..., GRID ** 2] above 0 where the model says class 1.
        """
        plane = self.plane()

        def leaning(decision: Tensor) -> Tensor:
            signs = (decision > 0)[..., None] == (plane > 0)
            share = signs[..., (plane != 0).all(-1), :].double().mean(-2)
            return share[..., 1] - share[..., 0]

        return leaning(said) - leaning(plane @ self.means)

    def lines(self) -> dict[str, float]:
        """Cross-entropy in nats of guessing, and of Bayes (by Monte Carlo)."""
        latents, label = self.latents(200_000, generator(0, 39))
        sure = 2 * latents @ self.means * (2 * label - 1)
        return {"chance": log(2), "Bayes": float(torch.nn.functional.softplus(-sure).mean())}


@cache
def _directions(dim: int, nested: int, world: int) -> tuple[Tensor, list[Tensor]]:
    """Two orthogonal unit vectors [2, dim], and random layers [dim, dim] that keep lengths for small values."""
    draw = generator(world, 39)
    ways = torch.linalg.qr(torch.randn(dim, 2, generator=draw)).Q.T
    return ways, [torch.linalg.qr(torch.randn(dim, dim, generator=draw)).Q * 2 for _ in range(nested)]
