"""How Does Attention Work in Vision Transformers? A Visual Analytics Attempt. Li et al., 2023. arXiv:2303.13731

Row s112 of the mission.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from headwise.pattern import PatternMethod
from headwise.tap import per_row
from headwise.task import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DistanceProfile(PatternMethod):
    """Mean spatial distance, in patches, between the patch that looks and the patches it looks at.

    Attention to the class token is left out. `profile` gives attention strength ring by ring.
    """

    row: ClassVar[str] = "s112"
    needs: ClassVar[str] = "digits_images"

    def read(self, pattern: Tensor, batch: Batch) -> Tensor:
        """Pattern [b, H, T, T] -> [b, H] in patches. Raises ValueError for text, or patches that form no square."""
        between, far = _patches(pattern, batch)
        return (between * far).sum(-1).mean(-1)

    def profile(self, model: "PreTrainedModel", batch: Batch) -> dict[int, Tensor]:
        """{layer: [H, rings]} mean attention to one patch of each ring; ring r holds patches r to r + 1 steps away."""

        def rings(pattern: Tensor) -> Tensor:
            between, far = _patches(pattern, batch)
            number = far.floor().long()
            members = torch.nn.functional.one_hot(number).to(between.dtype)
            strength = torch.einsum("bhqk,qkr->bhr", between, members)
            return strength / members.sum((0, 1)).clamp_min(1)

        return {layer: value.mean(0) for layer, value in per_row(model, batch, "pattern", rings).items()}


def _patches(pattern: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Attention between patches, each row summing to 1, and their distances [T, T]."""
    if "pixel_values" not in batch.inputs:
        raise ValueError(f"Text has no square of patches; this batch holds {', '.join(batch.inputs)}.")
    side = int(pattern.shape[-1] ** 0.5)
    extra = pattern.shape[-1] - side * side
    if side < 2 or extra > 8:
        raise ValueError(f"{pattern.shape[-1]} columns are no square of patches with a few special tokens before it.")
    between = pattern[:, :, extra:, extra:].float()
    place = torch.arange(side * side, device=pattern.device)
    down, across = (place // side).float(), (place % side).float()
    far = ((down[:, None] - down) ** 2 + (across[:, None] - across) ** 2).sqrt()
    return between / between.sum(-1, keepdim=True).clamp_min(1e-12), far
