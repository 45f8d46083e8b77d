"""Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads. Cai et al., 2024.
arXiv:2401.10774
"""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from headwise.draft_heads import DraftHeads, HeadsMethod, res_blocks


@dataclass(frozen=True)
class Medusa(HeadsMethod):
    """Several heads on the last hidden state guess tokens further ahead, none knowing what others guess.

    Unlike in the paper all heads share the model's own unembedding, which stays as it is.

    Fields:
        path: folder of trained heads.
        tree: branches at each depth; as many heads as depths.
        layers: residual blocks of each head, each with weights of its own.
    """

    path: str = ""
    tree: tuple[int, ...] = (3, 2, 1, 1)
    layers: int = 1

    def untrained(self, model: PreTrainedModel) -> DraftHeads:
        """Heads that pass the state on unchanged."""
        return MedusaHeads(self, model)


class MedusaHeads(DraftHeads):
    """Head i is residual blocks on the state, whatever the tokens since."""

    def __init__(self, method: Medusa, model: PreTrainedModel) -> None:
        super().__init__(method, model, len(method.tree))
        self.blocks = nn.ModuleList(res_blocks(self.width, method.layers) for _ in range(self.count))

    def step(self, i: int, start: Tensor, tokens: Tensor) -> Tensor:
        """The tokens have no say."""
        return self.blocks[i - 1](start)
