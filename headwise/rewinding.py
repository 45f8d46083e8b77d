"""How a cache forgets the tokens of a draft that were refused, whatever it is made of.

A cache that holds every key and follows any mask keeps the rows of a batch *apart*: rows accept different numbers of
tokens, and where one accepts fewer, the columns that are left over are masked for it from then on. All other caches
(rings, chosen keys, sliding layers) must drop the same number of columns in every row, so rows go *together*: what a
row knows beyond the shortest one is read once more.
"""

import inspect
import sys

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from headwise.kv_cache import KVCache, KVLayer
from headwise.store import Full


def follows_masks(model: PreTrainedModel, cache: Cache) -> bool:
    """Whether every layer holds all keys and looks where a mask tells it to, by positions that are given to it.

    Ask once something has been read.
    """
    if not isinstance(cache, DynamicCache | KVCache) or getattr(cache, "offloading", False):
        return False
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    windows = getattr(config, "sliding_window", None) if kinds is None else set(kinds) - {"full_attention"}
    implementation = config._attn_implementation or ""
    return (
        not windows
        and not getattr(config, "alibi", False)
        and "flash" not in implementation
        and "flex" not in implementation
        and "position_ids" in inspect.signature(model.forward).parameters
        and all(_holds_all(layer) for layer in cache.layers)
    )


def _holds_all(layer: CacheLayerMixin) -> bool:
    if isinstance(layer, KVLayer):
        return bool(layer.parts) and all(type(part.store) is Full for part in layer.parts)
    return type(layer) is DynamicLayer


def end_recording(cache: Cache) -> None:
    """Turns stay from now on; transformers' own layers would hold more with each of them, and have no call for it."""
    for layer in cache.layers:
        if isinstance(layer, KVLayer):
            layer.end_past_recording()
        elif getattr(layer, "record_past", False):
            layer.record_past = False


def turn_limit(cache: Cache) -> int:
    """Tokens that one pass may read so that the cache takes them for single ones, not for a prompt."""
    parts = (part for layer in cache.layers if isinstance(layer, KVLayer) for part in layer.parts)
    return min([sys.maxsize, *(part.store.one_by_one for part in parts)])


def keep_columns(cache: Cache, past: int, columns: Tensor) -> None:
    """Of the columns read last, let those named stand first: columns [B, m] count from `past`.

    Only for caches that follow masks; the columns behind are for `crop`.
    """
    for layer in cache.layers:
        if isinstance(layer, KVLayer):
            rooms = [one for part in layer.parts for one in (part.store.kept.k, part.store.kept.v)]
        else:
            rooms = [layer.keys, layer.values]
        for room in rooms:
            index = (past + columns.to(room.device))[:, None, :, None]
            index = index.expand(-1, room.shape[1], -1, room.shape[3])
            room[:, :, past : past + columns.shape[1]] = room.gather(2, index)


def tree_mask(
    seen: Tensor, fed: list[int], parents: "list[list[int] | None]", width: int, dtype: torch.dtype
) -> Tensor:
    """Who sees whom when trees are read: additive [B, 1, width, past + width].

    Args:
        seen: [B, past] which of the columns before exist. fed: tokens of each row before its tree, read in order.
        parents: of each row's tree, or None where what follows is a chain. width: columns of the pass.
    """
    rows, past = seen.shape
    new = torch.ones(width, width, dtype=torch.bool).tril().repeat(rows, 1, 1)
    for row, one in enumerate(parents):
        for index, parent in enumerate(one or ()):
            column = fed[row] + index
            new[row, column] = new[row, fed[row] + parent] if parent >= 0 else new[row, fed[row] - 1]
            new[row, column, column] = True
    whole = torch.cat([seen.bool()[:, None].expand(-1, width, -1), new.to(seen.device)], 2)[:, None]
    return torch.zeros(whole.shape, dtype=dtype, device=seen.device).masked_fill_(~whole, torch.finfo(dtype).min)
