"""Scaling Laws in Patchification: An Image Is Worth 50,176 Tokens And More. Wang et al., 2025. arXiv:2502.03738

Row s097 of the mission. On 1,297 images of digits in place of a million photographs: that smaller patches overfit more
is possible here.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from headwise.lab import PatchSize
from headwise.replicate import Outcome, Replication, settle
from headwise.stats import sign_flip


@dataclass(frozen=True)
class PatchSizeReplication(Replication):
    """Test loss of vision transformers on patches of 4, 2 and 1 pixels, five paired seeds."""

    row: ClassVar[str] = "s097"
    claim: ClassVar[str] = "The smaller the patches of a vision transformer, the lower its loss, down to single pixels."
    paper: ClassVar[str] = "consistent gains down to 1 x 1 pixels on ImageNet, up to 50,176 tokens and 84.6 %"

    changed: ClassVar[str] = (
        "a first run of 600 updates left single pixels at a loss of 1.2 that was still falling; then 2,000 updates, "
        "by which they were learned by heart (1.01 at best, 1.23 at the end); since then images are moved by up to a "
        "pixel, with 3,000 updates. Thresholds are as they were."
    )

    level: ClassVar[float] = 0.05

    def run(self, seed: int = 0) -> Outcome:
        """Every size with five seeds."""
        lab = PatchSize(full=self.full)
        found = lab.run([seed + one for one in lab.seeds])
        loss, accuracy, trained, best = {}, {}, {}, {}
        for name in found.names:
            tapes = [found.tape(name, one) for one in found.seeds]
            loss[name] = [tape.last("loss", "test") for tape in tapes]
            best[name] = [min(tape.curve("loss", "test")[1]) for tape in tapes]
            accuracy[name] = [tape.last("accuracy", "test") for tape in tapes]
            trained[name] = [tape.last("loss") for tape in tapes]
        steps = list(zip(found.names, found.names[1:], strict=False))
        p = {f"{b} below {a}": sign_flip(np.array(loss[a]) - np.array(loss[b])) for a, b in steps}
        means = {name: float(np.mean(values)) for name, values in loss.items()}
        right = {name: float(np.mean(values)) for name, values in accuracy.items()}
        lowest = {name: float(np.mean(values)) for name, values in best.items()}
        tokens = np.log([(8 / patch) ** 2 for patch in lab.patches])
        slope = float(np.polyfit(tokens, np.log(list(means.values())), 1)[0])
        checks = {
            f"test loss falls from size to size (paired sign flips, p < {self.level})": max(p.values()) < self.level,
            "test accuracy rises from size to size": list(right.values()) == sorted(right.values()),
            "so it is with the best test loss of each run, as if training had been stopped in time": list(
                lowest.values()
            )
            == sorted(lowest.values(), reverse=True),
        }
        measured = (
            f"test loss (accuracy), mean of {len(found.seeds)} seeds: "
            + ", ".join(f"{name} {means[name]:.3f} ({right[name]:.3f})" for name in means)
            + "; best of each run "
            + ", ".join(f"{value:.3f}" for value in lowest.values())
            + f"; loss goes with tokens to the power {slope:+.2f}; p "
            + ", ".join(f"{value:.3f}" for value in p.values())
        )
        baseline = "guessing: loss 2.303, accuracy 0.100"
        numbers = {"loss": loss, "best": best, "accuracy": accuracy, "training loss": trained, "p": p, "power": slope}
        return settle(measured, baseline, checks, numbers)
