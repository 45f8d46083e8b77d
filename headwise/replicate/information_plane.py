"""Opening the Black Box of Deep Neural Networks via Information. Shwartz-Ziv and Tishby, 2017. arXiv:1703.00810

Row s159 of the mission. Networks of the paper's widths on all 4,096 inputs of a rule like the paper's, with Adam as in
the authors' code. ReLU and a second grid of bins stand beside it, after the objection of Saxe et al., 2018.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from headwise.information import bottleneck
from headwise.lab import InformationPlane
from headwise.lab.information_plane import Floats, Plane
from headwise.replicate import Outcome, Replication, settle

BETAS = (1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)


def fall(kept: Floats) -> Floats:
    """[E, S] -> [S] how far the last value is below the largest, in bits."""
    return kept.max(0) - kept[-1]


def turn(found: Plane, layer: int) -> Floats:
    """[S] the first epoch at which the gradient of a layer spreads more than it drifts and does so from then on."""
    ratio = found.drift[1:, :, layer] / found.spread[1:, :, layer]
    late = np.maximum.accumulate(ratio[::-1], 0)[::-1] < 1
    return np.where(late.any(0), found.epochs[1:][late.argmax(0)], np.inf)


@dataclass(frozen=True)
class InformationPlaneReplication(Replication):
    """Tanh and ReLU networks, five seeds each: compression of the last hidden layers, drift, processing, the bound."""

    row: ClassVar[str] = "s159"
    claim: ClassVar[str] = (
        "Layers first learn what the label needs and then forget input, once the gradient drifts no more."
    )
    paper: ClassVar[str] = (
        "most epochs are compression; it begins when the error is small and the gradient turns from drift to "
        "diffusion; converged layers lie near the bound (critique by Saxe et al.: not with ReLU)"
    )

    seeds: ClassVar[tuple[int, ...]] = (5, 6, 7, 8, 9)
    least_fall: ClassVar[float] = 0.5
    decade: ClassVar[float] = 10.0
    slack: ClassVar[float] = 0.1
    near: ClassVar[float] = 0.1

    def run(self, seed: int = 0) -> Outcome:
        """Both activations; ten times the epochs when `full`."""
        lab = InformationPlane(epochs=20_000 if self.full else 2000)
        seeds = tuple(seed + one for one in self.seeds)
        planes = {act: replace(lab, act=act).train(seeds) for act in ("tanh", "relu")}
        bound = bottleneck(lab.lesson.every()[1].numpy(), BETAS)
        tanh, last = planes["tanh"], len(lab.hidden) - 1
        falls = {act: [fall(one.kept[..., at]) for at in (last - 1, last)] for act, one in planes.items()}
        ranged = {act: [fall(one.ranged[..., at]) for at in (last - 1, last)] for act, one in planes.items()}
        peaks = tanh.epochs[tanh.kept[..., last].argmax(0)].clip(1)
        turns = turn(tanh, last)
        decades = np.abs(np.log10(turns.clip(1)) - np.log10(peaks))
        rises = np.diff(tanh.kept[-1], axis=1).max(), np.diff(tanh.told[-1], axis=1).max()
        short = np.interp(tanh.kept[-1], *np.array([(0.0, 0.0), *bound]).T) - tanh.told[-1]
        checks = {
            f"with tanh the last two hidden layers forget at least {self.least_fall} bits, mean of the seeds": min(
                float(one.mean()) for one in falls["tanh"]
            )
            >= self.least_fall,
            "the last hidden layer's gradient turns from drift to diffusion within a decade of epochs of the peak of "
            "I(X;T), median of the seeds": np.median(decades) <= np.log10(self.decade),
            f"later layers say no more of input or label than earlier ones, within {self.slack} bits": max(rises)
            <= self.slack,
            f"with ReLU the last two hidden layers forget less than {self.least_fall} bits": max(
                float(one.mean()) for one in falls["relu"]
            )
            < self.least_fall,
            f"converged hidden layers say at most {self.near} bits less of the label than the bound": float(
                short[:, : last + 1].mean()
            )
            <= self.near,
        }

        def pair(values: list[Floats]) -> str:
            return " and ".join(f"{one.mean():.2f}" for one in values)

        measured = (
            f"bits forgotten by the last two hidden layers: tanh {pair(falls['tanh'])}, ReLU {pair(falls['relu'])} on "
            f"a fixed grid; tanh {pair(ranged['tanh'])}, ReLU {pair(ranged['relu'])} on as many bins over the range of "
            f"each epoch. With tanh I(X;T) of the last layer peaks at epoch {np.median(peaks):.0f}, its gradient turns "
            f"at {np.median(turns):.0f} (medians of {len(seeds)} seeds); largest rise from layer to layer "
            f"{max(rises):.2f} bits; {short[:, : last + 1].mean():.2f} bits below the bound"
        )
        accuracy = {act: one.accuracy[-1].mean(0).tolist() for act, one in planes.items()}
        baseline = (
            f"exact values of a deterministic network are 12 bits at every layer and epoch: what falls is what a grid "
            f"of {lab.bins} bins sees; accuracy on held-out inputs {accuracy['tanh'][1]:.2f} (tanh), "
            f"{accuracy['relu'][1]:.2f} (ReLU)"
        )
        numbers = {
            "bound": bound,
            "accuracy": accuracy,
            "peaks": peaks.tolist(),
            "turns": turns.tolist(),
            "planes": {act: {"epochs": one.epochs.tolist(), **self._mean(one)} for act, one in planes.items()},
        }
        return settle(measured, baseline, checks, numbers)

    @staticmethod
    def _mean(found: Plane) -> dict[str, list]:
        """Means over seeds, by epoch and layer."""
        some = {name: getattr(found, name).mean(1).round(4) for name in ("kept", "told", "ranged")}
        ratio = (found.drift[1:] / found.spread[1:]).mean(1).round(4)
        return {name: value.tolist() for name, value in some.items()} | {"drift to spread": ratio.tolist()}
