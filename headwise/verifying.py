"""The base of the decode room, and the one loop that checks what drafters propose."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from headwise.drafting import Drafter, Stats
from headwise.method import Method

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Decoded:
    """What a decode method generated.

    Attributes:
        ids: [B, T] prompts and what follows; where a row ended earlier than others it is padded on the right.
        stats: what became of the drafts.
    """

    ids: Tensor
    stats: Stats


@dataclass(frozen=True)
class DecodeMethod(Method):
    """Base of the decode room: which token comes next."""

    def generate(
        self, model: PreTrainedModel, ids: Tensor, streamer: "BaseStreamer | None" = None, **options: Any
    ) -> Decoded:
        """Generate from ids [B, T], padded on the left; `options` are those of `model.generate`.

        A method that drafts derives from `DraftMethod` and writes `drafter` instead.
        """
        raise TypeError(f"{type(self).__name__} does not say how it generates.")


@dataclass(frozen=True)
class DraftMethod(DecodeMethod):
    """Base of methods that propose tokens for the model to check; what comes out is the model's own."""

    def drafter(self, model: PreTrainedModel) -> Drafter:
        """A drafter for this model. Raises ValueError where it does not fit the model (width, vocabulary)."""
        raise TypeError(f"{type(self).__name__} does not say how it drafts.")
