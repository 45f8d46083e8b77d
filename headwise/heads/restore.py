"""Locating and Editing Factual Associations in GPT. Meng, Bau, Andonian and Belinkov, 2022. arXiv:2202.05262

Activation patching of one head at a time, from the clean run into the corrupt one: what is *enough* to bring the answer
back.
"""

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from headwise.method import HeadMethod
from headwise.scan import effects
from headwise.score import Score
from headwise.task import Batch, metric


@dataclass(frozen=True)
class Restore(HeadMethod):
    """What the metric gains when a head's clean value is put into the corrupt run (exact)."""

    metric: str = "logprob"
    units: tuple[str, ...] = ()
    share_prefix: bool = True
    variants: int = 1

    evidence: ClassVar[str] = "enough"
    needs: ClassVar[str] = "induction"

    def score(self, model: PreTrainedModel, batch: Batch) -> Score:
        """One effect per unit. Raises ValueError on an unknown metric or unit, or a batch without corrupt prompts."""
        found = effects(
            model,
            batch,
            list(self.units) or None,
            "restore",
            metric(self.metric),
            share_prefix=self.share_prefix,
            variants=self.variants,
            label="restore",
        )
        return Score.of_units(self, model, batch, {u: found.of(u) for u in found.changed})
