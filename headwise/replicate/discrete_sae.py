"""Sparse Autoencoders Enable Scalable and Reliable Circuit Identification in Language Models. O'Neill and Bui, 2024.
arXiv:2405.12522

Row s103 of the mission. Which heads matter for indirect objects is measured exactly, one head at a time, on prompts
that the autoencoder does not see. Scores come from ten prompts and their corrupt twins. The control swaps prompt and
twin in every other pair, so that "positive" means nothing. Seconds are of processor time, on one thread.
"""

import time
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from headwise.data import IOI
from headwise.heads import Attribution, DiscreteSAE
from headwise.models import open_model
from headwise.replicate import Outcome, Replication, settle
from headwise.scan import effects
from headwise.score import Score
from headwise.stats import auc
from headwise.task import Batch, logit_diff


def swapped(batch: Batch) -> Batch:
    """The batch with clean and corrupt prompt exchanged in every other row."""
    odd = (torch.arange(len(batch)) % 2 == 1)[:, None]

    def mixed(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.where(odd, other[name], value) for name, value in one.items()}

    return replace(batch, inputs=mixed(batch.inputs, batch.corrupt), corrupt=mixed(batch.corrupt, batch.inputs))


@dataclass(frozen=True)
class DiscreteSAECircuits(Replication):
    """Ranks all heads of the default model by their codes and by attribution patching, against exact ablation."""

    row: ClassVar[str] = "s103"
    claim: ClassVar[str] = "Codes of a sparse autoencoder on ten prompts tell the heads of a circuit, in seconds."
    paper: ClassVar[str] = "higher precision and recall than the state of the art on three tasks; seconds, not hours"

    changed: ClassVar[str] = (
        "seconds were those of the clock of a busy machine, and are those of processor time; no threshold was moved"
    )

    share: ClassVar[float] = 0.1
    least_auc: ClassVar[float] = 0.8
    most_control: ClassVar[float] = 0.6
    most_seconds: ClassVar[float] = 10.0
    faster: ClassVar[float] = 50.0

    def run(self, seed: int = 0) -> Outcome:
        """AUC of both rankings for the tenth of heads whose loss costs most, and seconds of each."""
        model, tokenizer = open_model("default")
        few = IOI().make(tokenizer, 10, seed)
        truth = IOI().make(tokenizer, 32 if self.full else 12, seed + 1)
        started = time.process_time()
        exact = effects(model, truth, None, "resample", logit_diff, label="s103 exact")
        # The sweep of as many prompts as the autoencoder has.
        sweep = (time.process_time() - started) * len(few) / len(truth)
        loss = np.array([float(exact.of(unit).mean()) for unit in exact.changed])
        positive = loss >= np.quantile(loss, 1 - self.share)
        units = list(exact.changed)

        def judged(score: Score) -> float:
            return auc(np.array([score[unit] for unit in units]), positive)

        started = time.process_time()
        scores = [DiscreteSAE(seed=seed).score(model, few)]
        seconds = time.process_time() - started
        scores += [DiscreteSAE(seed=seed + i).score(model, few) for i in (1, 2)]
        found = [judged(score) for score in scores]
        control = [judged(DiscreteSAE(seed=seed + i).score(model, swapped(few))) for i in range(3)]
        rival = judged(Attribution(metric="logit_diff").score(model, few))
        return self._judge(found, control, rival, seconds, sweep, len(units))

    def _judge(
        self, found: list[float], control: list[float], rival: float, seconds: float, sweep: float, heads: int
    ) -> Outcome:
        mean = float(np.mean(found))
        checks = {
            f"AUC for the {self.share:.0%} of heads that matter most is at least {self.least_auc}": mean
            >= self.least_auc,
            f"with swapped labels it is at most {self.most_control}": float(np.mean(control)) <= self.most_control,
            "it is at least that of attribution patching on the same prompts": mean >= rival,
            f"all heads are scored in {self.most_seconds:.0f} seconds": seconds <= self.most_seconds,
            f"that is {self.faster:.0f} times faster than exact ablation": sweep >= self.faster * seconds,
        }
        measured = (
            f"AUC {mean:.2f} (three seeds, standard deviation {np.std(found):.3f}); {seconds:.1f} s for {heads} heads "
            f"on 10 pairs of prompts, {sweep / seconds:.0f} times faster than exact ablation"
        )
        baseline = f"swapped labels {np.mean(control):.2f}; attribution patching {rival:.2f}; ablation {sweep:.0f} s"
        numbers = {"auc": found, "control": control, "attribution": rival, "seconds": seconds, "sweep": sweep}
        return settle(measured, baseline, checks, numbers)
