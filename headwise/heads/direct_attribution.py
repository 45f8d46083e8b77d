"""Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small. Wang, Variengien, Conmy,
Shlegeris and Steinhardt, 2022. arXiv:2211.00593

What they call direct logit attribution.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headwise.direct import direct_attribution, predicts, toward_answer
from headwise.method import HeadMethod
from headwise.score import Score
from headwise.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.task import Batch


@dataclass(frozen=True)
class DirectAttribution(HeadMethod):
    """What a head itself writes to the logit of the answer above that of the foil, past all layers behind it.

    The last norm divides as it does in the run. Without a foil, the answer stands above the mean over all tokens.
    """

    evidence: ClassVar[str] = "read"
    needs: ClassVar[str] = "ioi"

    def score(self, model: "PreTrainedModel", batch: "Batch") -> Score:
        """One number per head, in logits. Raises ValueError for a model that does not predict next tokens."""
        weights = Weights(model)
        predicts(model, "heads.direct_attribution")
        return Score.of_heads(self, model, batch, direct_attribution(weights, batch, toward_answer(weights, batch)))
