"""Thinking Sparks!: Emergent Attention Heads in Reasoning Models During Post Training. Park et al., 2025.
arXiv:2509.25758

Row s125 of the mission.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import polars as pl

from headwise.anatomy import anatomy
from headwise.method import HeadMethod, load
from headwise.models import open_model
from headwise.score import Score, provenance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.task import Batch


@dataclass(frozen=True)
class Emergence(HeadMethod):
    """How much more of a skill each head has than in an earlier checkpoint of the same architecture.

    Fields:
        before: the earlier checkpoint, a folder or hub id; with two models at hand use `between`.
        method: the detector or effect whose difference is taken.
    """

    before: str = ""
    method: str = "heads.induction"

    row: ClassVar[str] = "s125"
    evidence: ClassVar[str] = "grown"

    def score(self, model: "PreTrainedModel", batch: "Batch") -> Score:
        """One difference per head, after minus before. Raises ValueError without an earlier checkpoint."""
        if not self.before:
            raise ValueError(
                "Emergence compares two checkpoints; say which came first: Emergence(before='path or hub id')."
            )
        device = str(model.device)
        return self.between(open_model(self.before, str(model.dtype).removeprefix("torch."), device)[0], model, batch)

    def between(self, before: "PreTrainedModel", after: "PreTrainedModel", batch: "Batch") -> Score:
        """The same for two open models. Intervals are wide: each end takes the far end of the other checkpoint.

        Raises:
            ValueError: the two do not have the same heads.
        """
        if anatomy(before).units() != anatomy(after).units():
            raise ValueError(
                f"The checkpoints have {len(anatomy(before).units())} and {len(anatomy(after).units())} heads; "
                "emergence needs one architecture."
            )
        detector = load(self.method)()
        if not isinstance(detector, HeadMethod):
            raise ValueError(f"{self.method!r} gives no number per head; use a method of the heads room.")
        old, new = detector.score(before, batch), detector.score(after, batch)
        if old.table["unit"].to_list() != new.table["unit"].to_list():
            raise ValueError(f"{self.method} gives other units for the two checkpoints; they cannot be compared.")
        table = new.table.with_columns(
            value=pl.col("value") - old.table["value"],
            low=pl.col("low") - old.table["high"],
            high=pl.col("high") - old.table["low"],
        )
        about = provenance(self, after, batch) | {"before": provenance(detector, before, batch)["fingerprint"]}
        return Score(f"emergence_of_{old.name}", table, new.kind, self.evidence, about)
