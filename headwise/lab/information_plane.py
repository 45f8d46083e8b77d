"""Opening the Black Box of Deep Neural Networks via Information. Shwartz-Ziv and Tishby, 2017. arXiv:1703.00810

Row s159 of the mission. With the objection of Saxe et al. (On the information bottleneck theory of deep learning,
2018) that what looks like compression are tanh units at their limits, seen through a fixed grid of bins.
"""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from headwise.data import SphereBits
from headwise.information import cells, plane
from headwise.lesson import generator
from headwise.method import Method
from headwise.progress import hidden
from headwise.replicas import Replicas

Floats = NDArray[np.floating]


class Plane(NamedTuple):
    """Where every layer was in the information plane, epoch by epoch. Layers are hidden ones, then the output.

    Attributes:
        epochs: [E] at which was measured.
        kept: [E, S, L] I(X;T) in bits, of values on a grid whose bins have one width throughout.
        told: [E, S, L] I(T;Y) on that grid.
        ranged: [E, S, L] I(X;T) with as many bins over the range of the layer at that epoch.
        drift, spread: [E, S, L] length of the mean gradient over the batches of an epoch, and of its standard
            deviation; NaN at epoch 0.
        accuracy: [E, S, 2] on the inputs that were trained on, and on the others.
    """

    epochs: Floats
    kept: Floats
    told: Floats
    ranged: Floats
    drift: Floats
    spread: Floats
    accuracy: Floats


@dataclass(frozen=True)
class InformationPlane(Method):
    """Trains small networks on all of a known distribution, and measures what each layer says of input and label.

    Fields:
        hidden: widths of the hidden layers. `act`: "tanh", "relu" or "linear".
        epochs, batch, lr: of Adam. `share`: of the inputs that is trained on.
        bins: from -1 to 1 (of the output, softmax: from 0 to 1). ReLU layers have bins of the same width, as many as
            they need.
        moments: how many epochs are measured, closer together early on.
        lesson: whose inputs and labels are learned.
    """

    row: ClassVar[str] = "s159"

    hidden: tuple[int, ...] = (10, 7, 5, 4, 3)
    act: str = "tanh"
    epochs: int = 2000
    batch: int = 512
    lr: float = 2e-3
    share: float = 0.85
    bins: int = 30
    moments: int = 50
    lesson: SphereBits = field(default_factory=SphereBits)

    def train(self, seeds: "tuple[int, ...]" = (5, 6, 7)) -> Plane:
        """One network a seed, side by side; each has its own weights, labels, held-out inputs and order."""
        inputs, likely = self.lesson.every()
        nets = Replicas((inputs.shape[1], *self.hidden, 2), self.act, seeds)
        draws = [generator(seed, 159) for seed in seeds]
        labels = torch.stack([(torch.rand(len(inputs), generator=draw) < likely).long() for draw in draws])
        orders = torch.stack([torch.randperm(len(inputs), generator=draw) for draw in draws])
        cut = round(self.share * len(inputs))
        optimiser = torch.optim.Adam(nets.parameters(), lr=self.lr, fused=True)
        due = np.unique(np.geomspace(1, self.epochs + 1, self.moments).round().astype(int) - 1)
        found: list[tuple[Floats, ...]] = []
        slopes: list[list[Tensor]] = []
        for epoch in tqdm(range(self.epochs + 1), desc=f"s159 {self.act}", disable=hidden(), leave=False):
            if epoch in due:
                found.append(self._look(nets, inputs, likely, labels, orders, cut, slopes))
            slopes = []
            known = torch.stack(
                [row[:cut][torch.randperm(cut, generator=d)] for row, d in zip(orders, draws, strict=True)]
            )
            for start in range(0, cut - self.batch + 1, self.batch):
                rows = known[:, start : start + self.batch]
                self._step(nets, optimiser, inputs[rows], labels.gather(1, rows))
                if epoch + 1 in due:
                    slopes.append(nets.slopes())
        return Plane(due, *(np.stack(part) for part in zip(*found, strict=True)))

    def _step(self, nets: Replicas, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        loss = torch.nn.functional.cross_entropy(nets(x).flatten(0, 1), y.flatten(), reduction="sum") / x.shape[1]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    @torch.no_grad()
    def _look(
        self,
        nets: Replicas,
        inputs: Tensor,
        likely: Tensor,
        labels: Tensor,
        orders: Tensor,
        cut: int,
        slopes: list[list[Tensor]],
    ) -> tuple[Floats, ...]:
        """One epoch's entries of `Plane`, in its order."""
        *values, logits = nets.layers(inputs)
        layers = [*values, logits.softmax(-1)]
        width = 2 / self.bins
        widths = [width] * len(values) + [width / 2]
        kept, told, ranged = (np.empty((len(labels), len(layers))) for _ in range(3))
        for at, (value, step) in enumerate(zip(layers, widths, strict=True)):
            for seed, one in enumerate(value.double().numpy()):
                # A unit at its limit of 1 is in the last bin, not behind it.
                inside = one if self.act != "tanh" and at < len(values) else one.clip(max=1 - 1e-9)
                kept[seed, at], told[seed, at] = plane(cells(inside, step), likely.numpy())
                reach = max(float(one.max() - one.min()), 1e-12)
                ranged[seed, at], _ = plane(cells(one - one.min(), reach * (1 + 1e-9) / self.bins), likely.numpy())
        right = (logits.argmax(-1) == labels).double().gather(1, orders)
        accuracy = torch.stack([right[:, :cut].mean(1), right[:, cut:].mean(1)], 1)
        drift = spread = np.full((len(labels), len(layers)), np.nan)
        if slopes:
            stacks = [torch.stack(part) for part in zip(*slopes, strict=True)]
            drift = torch.stack([one.mean(0).norm(dim=-1) for one in stacks], -1).numpy()
            spread = torch.stack([one.std(0).norm(dim=-1) for one in stacks], -1).numpy()
        return kept, told, ranged, drift, spread, accuracy.numpy()
