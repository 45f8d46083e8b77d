"""On the Foundations of Shortcut Learning. Hermann et al., 2023. arXiv:2310.16228

Row s039 of the mission. Networks with hidden layers are trained side by side, on 3,200 examples as in the paper; linear
models are fitted to the optimum on the same examples; small transformers read fresh inputs, each in four positions.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.comparison import Condition
from headwise.data import CoreAndShortcut
from headwise.experiment import Experiment
from headwise.lesson import generator
from headwise.replicas import Replicas
from headwise.tiny import TinyConfig
from headwise.training import Training


@dataclass(frozen=True)
class ShortcutFeatures(Experiment):
    """Trains models on a core and a shortcut, the shortcut more and more amplified.

    Fields:
        ratios: amplifications of the shortcut; one condition a ratio for transformers.
        examples: that linear models are fitted to and networks are trained on, for `steps` with batches of `batch`, by
            gradient descent with a momentum of 0.9. Their inputs have one mean length at every ratio.
        hidden: width of their hidden layers. `lr`: their learning rate, which decays to 0.
    """

    row: ClassVar[str] = "s039"
    goal: ClassVar[tuple[str, str, float]] = ("accuracy", "above", 0.9)

    ratios: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    examples: int = 3200
    steps: int = 1500
    batch: int = 128
    hidden: int = 64
    lr: float = 0.2

    def lessons(self, nested: int = 0) -> list[CoreAndShortcut]:
        """One a ratio."""
        return [CoreAndShortcut(amplified=ratio, nested=nested) for ratio in self.ratios]

    def conditions(self) -> dict[str, Condition]:
        """A transformer a ratio; the first has core and shortcut of one length."""
        training = Training(
            steps=5000 if self.full else 500, batch=128, lr=1e-3, decay="cosine", measure_every=100, rows=1024
        )
        return {
            f"amplified {lesson.amplified:g} times": Condition(
                TinyConfig(**lesson.config(heads=4, width=32, mlp=64, pos="learned")), lesson, training
            )
            for lesson in self.lessons()
        }

    def networks(self, depth: int, act: str, seeds: "tuple[int, ...]", nested: int = 0) -> Tensor:
        """[ratios, seeds] bias of networks with `depth` hidden layers; with 0, of linear ones that are not done."""
        lessons, count = self.lessons(nested), len(seeds)
        drawn = [lessons[0].latents(self.examples, generator(seed, 390)) for seed in seeds]
        latents, label = (torch.stack(part) for part in zip(*drawn, strict=True))
        lengths = [(2 / (1 + lesson.amplified**2)) ** 0.5 for lesson in lessons]
        x = torch.cat([lesson.write(latents) * by for lesson, by in zip(lessons, lengths, strict=True)])
        y = label.repeat(len(lessons), 1)
        nets = Replicas((x.shape[-1], *[self.hidden] * depth, 2), act, [*seeds] * len(lessons))
        optimiser = torch.optim.SGD(nets.parameters(), lr=self.lr, momentum=0.9)
        draw = generator(seeds[0], 391)
        for step in range(self.steps):
            rows = torch.randint(self.examples, (self.batch,), generator=draw)
            said = nets(x[:, rows])
            loss = torch.nn.functional.cross_entropy(said.flatten(0, 1), y[:, rows].flatten(), reduction="sum")
            optimiser.zero_grad()
            (loss / self.batch).backward()
            for group in optimiser.param_groups:
                group["lr"] = self.lr * (1 - step / self.steps)
            optimiser.step()
        with torch.no_grad():
            planes = [lesson.write(lesson.plane()) * by for lesson, by in zip(lessons, lengths, strict=True)]
            said = nets(torch.cat([plane.expand(count, -1, -1) for plane in planes]))
        return lessons[0].bias(said[..., 1] - said[..., 0]).view(len(lessons), count)

    def linear(self, seeds: "tuple[int, ...]") -> Tensor:
        """[ratios, seeds] bias of linear models at the optimum of their loss, which gradient descent comes to late."""
        found = []
        for lesson in self.lessons():
            plane = lesson.write(lesson.plane()).double()
            for seed in seeds:
                latents, label = lesson.latents(self.examples, generator(seed, 390))
                weights = fitted(lesson.write(latents), label)
                found.append(lesson.bias(plane @ weights[:-1] + weights[-1]))
        return torch.stack(found).view(len(self.ratios), len(seeds))

    def kernel(self, seed: int, act: str = "relu", examples: int = 1000, ridge: float = 1.0) -> Tensor:
        """[ratios] bias of regression with the tangent kernel of an endless hidden layer, or of a linear model."""
        found = []
        for lesson in self.lessons():
            latents, label = lesson.latents(examples, generator(seed, 390))
            x, y = lesson.write(latents).double(), (2 * label - 1).double()
            inside = tangent(x, x, act) + ridge * torch.eye(examples, dtype=torch.float64)
            weights = torch.linalg.solve(inside, y)
            found.append(lesson.bias(tangent(lesson.write(lesson.plane()).double(), x, act) @ weights))
        return torch.stack(found)


def fitted(x: Tensor, label: Tensor) -> Tensor:
    """Weights [d + 1] of logistic regression at the optimum, its bias last: x [n, d], classes 0 or 1 [n].

    Raises:
        ValueError: no optimum was found; a plane that separates the classes has none.
    """
    rows = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    rows = rows * (2 * label.double() - 1)[:, None]
    weights = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weights], max_iter=1000, tolerance_grad=1e-10, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def cost() -> Tensor:
        optimiser.zero_grad()
        loss = -torch.nn.functional.logsigmoid(rows @ weights).mean()
        loss.backward()
        return loss

    optimiser.step(cost)
    cost()
    if weights.grad is None or weights.grad.abs().max() > 1e-6 or (rows @ weights.detach() > 0).all():
        raise ValueError("No optimum was found for these classes; use more examples, so that no plane separates them.")
    return weights.detach()


def tangent(x: Tensor, other: Tensor, act: str = "relu") -> Tensor:
    """The neural tangent kernel [n, m] of inputs [n, d] and [m, d]: one endless ReLU layer, or "linear"."""
    product = x @ other.T
    if act == "linear":
        return product
    size = x.norm(dim=1)[:, None] * other.norm(dim=1)
    cosine = (product / size.clamp(min=1e-12)).clamp(-1, 1)
    angle = torch.arccos(cosine)
    rest = torch.pi - angle
    return (size * (torch.sin(angle) + rest * cosine) + product * rest) / (2 * torch.pi)


@torch.no_grad()
def bias(model: PreTrainedModel, lesson: CoreAndShortcut) -> float:
    """The shortcut bias of a transformer that was trained on this lesson."""
    x = lesson.write(lesson.plane())
    said = model(inputs_embeds=x.view(len(x), lesson.parts, -1)).logits[:, -1]
    return float(lesson.bias(said[:, 1] - said[:, 0]))
