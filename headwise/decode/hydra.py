"""Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding. Ankner et al., 2024. arXiv:2402.05109"""

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from headwise.draft_heads import DraftHeads, HeadsMethod, HydraHeads


@dataclass(frozen=True)
class Hydra(HeadsMethod):
    """Medusa's heads, each of which also reads the tokens guessed before its own.

    Fields:
        path: folder of trained heads.
        tree: branches at each depth; as many heads as depths.
        layers: residual blocks of each head, the first of which joins state and tokens.
    """

    row: ClassVar[str] = "s101"
    path: str = ""
    tree: tuple[int, ...] = (3, 2, 1, 1)
    layers: int = 1

    def untrained(self, model: PreTrainedModel) -> DraftHeads:
        """Heads that pass the state on unchanged."""
        return HydraHeads(self, model, self.layers, prefix=False, reach=1)
