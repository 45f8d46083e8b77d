"""Interpreting GPT: the logit lens. nostalgebraist, 2020."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from headwise.direct import predicts
from headwise.reader import FeatureMethod, Map, Reader, layers_of
from headwise.task import Batch


@dataclass(frozen=True)
class LogitLens(FeatureMethod):
    """Reads the residual stream behind each layer by the model's own last norm and unembedding, as if it were the last.

    In early layers this is seldom readable: on SmolLM2-135M-Instruct not before about layer 23 of 30.

    Fields:
        layers: which; all by default.
    """

    layers: tuple[int, ...] = ()

    needs: ClassVar[str] = ""

    def fit(self, model: PreTrainedModel, batches: Sequence[Batch]) -> Reader:
        """One map a layer, "L5", that changes nothing; prompts are not used.

        Raises:
            ValueError: a layer that the model does not have, or a model that predicts no next token.
        """
        predicts(model, "A logit lens")
        maps = {f"L{n}": Map(f"L{n}.resid_post") for n in layers_of(model, self.layers)}
        return Reader.of(self, model, [], maps, ends="logits")
