"""Are Sixteen Heads Really Better than One? Michel, Levy and Neubig, 2019. arXiv:1905.10650"""

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from headwise.do import replacement
from headwise.method import HeadMethod
from headwise.scan import effects
from headwise.score import Score
from headwise.task import Batch, metric


@dataclass(frozen=True)
class Ablation(HeadMethod):
    """What the metric loses when a head is replaced by zero, by its mean, or by its value on another prompt (exact).

    Fields:
        value: "zero", "mean" or "resample". Zero takes early heads off what the model knows; say which one you used.
        metric: a name of `headwise.task.METRICS`; the score is clean minus ablated, in the metric's units.
        units: the heads and sublayers to take away; empty for every head.
        share_prefix: False runs the naive twin, a full forward pass a head.
        variants: heads taken away side by side, as rows of one batch.
        dtype: "bfloat16" rounds differences from the unchanged run: faster, for ranking heads.
    """

    value: str = "mean"
    metric: str = "logprob"
    units: tuple[str, ...] = ()
    share_prefix: bool = True
    variants: int = 1
    dtype: str = "float32"

    evidence: ClassVar[str] = "needed"
    needs: ClassVar[str] = "induction"

    def score(self, model: PreTrainedModel, batch: Batch) -> Score:
        """One effect per unit. Raises ValueError on an unknown value, metric or unit."""
        found = effects(
            model,
            batch,
            list(self.units) or None,
            replacement(self.value),
            metric(self.metric),
            share_prefix=self.share_prefix,
            variants=self.variants,
            dtype=self.dtype,
            label=f"ablation ({self.value})",
        )
        return Score.of_units(
            self, model, batch, {u: found.of(u) for u in found.changed}, name=f"ablation_{self.value}"
        )
