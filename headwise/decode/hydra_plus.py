"""Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding. Ankner et al., 2024. arXiv:2402.05109

Hydra++, the recipe that the paper tunes: deeper heads, one attention layer more in front of them, a softer lesson.
"""

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from headwise.draft_heads import DraftHeads, HeadsMethod, HydraHeads, Lesson


@dataclass(frozen=True)
class HydraPlus(HeadsMethod):
    """Hydra with deeper heads, a prefix layer that attends over the latest states, and a softer lesson.

    Fields:
        path: folder of trained heads.
        tree: branches at each depth; as many heads as depths.
        layers: residual blocks of each head.
        reach: latest states that the prefix layer sees.
    """

    row: ClassVar[str] = "s101"
    path: str = ""
    tree: tuple[int, ...] = (3, 2, 1, 1)
    layers: int = 4
    reach: int = 64

    def untrained(self, model: PreTrainedModel) -> DraftHeads:
        """Heads that pass the state on unchanged."""
        return HydraPlusHeads(self, model, self.layers, prefix=True, reach=self.reach)


class HydraPlusHeads(HydraHeads):
    """Hydra's heads with another lesson."""

    lesson = Lesson(soft=True)
