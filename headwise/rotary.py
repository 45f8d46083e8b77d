"""Moving keys and queries that are rotated already: RoPE turns by differences, so a key can be carried elsewhere.

Su et al., 2021. arXiv:2104.09864
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.anatomy import anatomy

Rotate = Callable[[Tensor, Tensor], Tensor]


def rotation(model: PreTrainedModel) -> Rotate | None:
    """How this model's rotated queries and keys are moved by some positions, with the model's own functions.

    Returns:
        f(x [B, H, T, d], by [T] or [B, H, T]) -> [B, H, T, d] as if x stood `by` positions later; None for models whose
        positions are not rotary, or not the same in every layer.
    """
    turning = [module for module in model.modules() if hasattr(module, "inv_freq") and hasattr(module, "rope_type")]
    apply = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if len(turning) != 1 or apply is None:
        return None
    rotary = turning[0]

    def rotate(x: Tensor, by: Tensor) -> Tensor:
        batch, heads, length, _ = x.shape
        places = by.expand(batch, heads, length).reshape(batch * heads, length)
        cos, sin = (part / rotary.attention_scaling for part in rotary(x.float(), places))
        flat = x.reshape(batch * heads, 1, length, -1)
        moved, _ = apply(flat.float(), flat.float(), cos, sin)
        return moved.view_as(x).to(x.dtype)

    return rotate if _composes(rotate, model) else None


def _composes(rotate: Rotate, model: PreTrainedModel) -> bool:
    """Whether a key carried 5 and then -5 positions is itself again: a check that the functions found do rotate."""
    body = anatomy(model)
    draw, by = torch.Generator(model.device).manual_seed(0), torch.full((3,), 5, device=model.device)
    for size in {body.layer(number).head_dim for number in body.layers}:
        x = torch.randn(1, 1, 3, size, device=model.device, generator=draw)
        try:
            if not torch.allclose(rotate(rotate(x, by), -by), x, atol=1e-4):
                return False
        except (TypeError, ValueError, RuntimeError):
            return False
    return True
