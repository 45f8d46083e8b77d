"""Never Train from Scratch: Fair Comparison of Long-Sequence Models Requires Data-Driven Priors. Amos et al., 2023.
arXiv:2310.02980

Row s027 of the mission. As in `headwise.lab.SelfPretraining`.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from headwise.lab import SelfPretraining
from headwise.replicate import Outcome, Replication, settle

TASKS = ("pixels", "list operations")


@dataclass(frozen=True)
class SelfPretrainingReplication(Replication):
    """Accuracy on unseen inputs of attention and recurrence, from scratch and pretrained on the task's own inputs."""

    row: ClassVar[str] = "s027"
    claim: ClassVar[str] = (
        "Once both are pretrained on the inputs of the task itself, transformers come close to the recurrent models "
        "that seemed far better from scratch."
    )
    paper: ClassVar[str] = "transformers match S4 on Long Range Arena when pretrained; large gaps from scratch"

    least_gain: ClassVar[float] = 0.02
    most_left: ClassVar[float] = 1 / 3

    def run(self, seed: int = 0) -> Outcome:
        """Three seeds of every condition."""
        lab = SelfPretraining(full=self.full)
        found = lab.run([seed + one for one in lab.seeds])
        right = {name: [found.tape(name, one).last("accuracy", "test") for one in found.seeds] for name in found.names}
        mean = {name: float(np.mean(values)) for name, values in right.items()}
        gains = {task: mean[f"{task}, attention, pretrained"] - mean[f"{task}, attention, scratch"] for task in TASKS}
        gaps = {
            task: {
                start: mean[f"{task}, recurrence, {start}"] - mean[f"{task}, attention, {start}"]
                for start in ("scratch", "pretrained")
            }
            for task in TASKS
        }
        checks = {
            f"pretraining on the task's inputs gains attention at least {self.least_gain} on both tasks": min(
                gains.values()
            )
            >= self.least_gain,
            "from scratch the recurrence is better than attention on both tasks": all(
                gap["scratch"] > 0 for gap in gaps.values()
            ),
            "pretrained, at most a third of the distance from scratch is left on both tasks": all(
                abs(gap["pretrained"]) <= self.most_left * abs(gap["scratch"]) for gap in gaps.values()
            ),
        }
        measured = f"accuracy on unseen inputs, mean of {len(found.seeds)} seeds, scratch and pretrained: " + "; ".join(
            f"{task}, {mixer} {mean[f'{task}, {mixer}, scratch']:.3f} and {mean[f'{task}, {mixer}, pretrained']:.3f}"
            for task in TASKS
            for mixer in ("attention", "recurrence")
        )
        baseline = "guessing: 0.10; models from scratch have as many updates as the others have in all"
        return settle(measured, baseline, checks, {"accuracy": right, "gains": gains, "gaps": gaps})
