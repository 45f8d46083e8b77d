"""Attention with scores and pattern in the open, the naive twin of every fused implementation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

See = Callable[[str, Tensor], Tensor]


def attend_openly(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, see: See, options: dict
) -> tuple[Tensor, Tensor]:
    """Attention with scores and pattern in the open, the naive twin of every fused implementation.

    Args:
        query: [B, H, Tq, d]; key [B, Hkv, Tk, d]; value [B, Hkv, Tk, dv].
        mask: additive or boolean, [B or 1, 1 or H, Tq, Tk].
        see: called with ("scores", scores) and ("pattern", pattern); what it returns takes their place.
        options: what the model passes along: scaling, softcap, position_bias, s_aux, sinks, dropout, is_causal.

    A module that mixes values otherwise gives its own scores, [B, H, Tq, Tk], by a method `open_scores`.

    Returns:
        z [B, Tq, H, dv] and pattern [B, H, Tq, Tk].
    """
    batch, heads, length, size = query.shape
    kv_heads, width = key.shape[1:3]
    scaling = options.get("scaling")
    # The query heads of one KV head stand below each other, so that keys and values are never copied.
    scores = query.reshape(batch, kv_heads, -1, size) @ key.transpose(2, 3)
    scores = (scores * (size**-0.5 if scaling is None else scaling)).view(batch, heads, length, width)
    if hasattr(module, "open_scores"):
        scores = module.open_scores(query, key, mask, scaling)
    if options.get("softcap") is not None:
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    if options.get("position_bias") is not None:
        scores = scores + options["position_bias"]
    seen = _masked(scores, mask, module, options)
    scores = see("scores", seen)
    # Only an intervention leaves a query with nothing to see; it then takes nothing.
    blind = scores.isneginf().all(-1, keepdim=True) if scores is not seen else None
    if blind is not None:
        scores = scores.masked_fill(blind, 0)
    # A sink is one more score that takes its share of the softmax: one a head, or (inkling) one a query.
    given = (options.get("s_aux"), options.get("sinks"), getattr(module, "sinks", None))
    sinks = next((one for one in given if one is not None), None)
    if sinks is not None:
        column = sinks if sinks.ndim == 4 else sinks.reshape(1, -1, 1, 1)
        scores = torch.cat([scores, column.expand(batch, heads, length, 1).to(scores.dtype)], -1)
    pattern = scores.softmax(-1, dtype=torch.float32)[..., :width].to(value.dtype)
    if blind is not None:
        pattern = pattern.masked_fill(blind, 0)
    if module.training and options.get("dropout"):
        pattern = nn.functional.dropout(pattern, options["dropout"])
    pattern = see("pattern", pattern)
    z = pattern.reshape(batch, kv_heads, -1, width) @ value
    return z.view(batch, heads, length, -1).transpose(1, 2).contiguous(), pattern


def _masked(scores: Tensor, mask: Tensor | None, module: nn.Module, options: dict) -> Tensor:
    lowest = torch.finfo(scores.dtype).min
    length, keys = scores.shape[-2:]
    if mask is None:
        causal = options.get("is_causal")
        if length > 1 and (getattr(module, "is_causal", False) if causal is None else causal):
            seen = torch.ones(length, keys, dtype=torch.bool, device=scores.device).tril(keys - length)
            return scores.masked_fill(~seen, lowest)
        return scores
    mask = mask[..., :keys]
    return scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
