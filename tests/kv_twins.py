"""Naive twins of cache policies: the plain model in one pass over the whole text, with the policy written as a mask."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from headwise.anatomy import anatomy
from headwise.listen import listen

Visible = Callable[[int, int], Tensor]


def masked_logits(model, ids: Tensor, attention_mask: Tensor | None, visible: Callable[[str, Tensor, Tensor], Tensor]):
    """Logits [B, T, V] of one pass in which a KV head sees only what visible(unit, p, c) [B or 1, T, T] allows."""
    body = anatomy(model)
    columns = torch.arange(ids.shape[1])

    def handler(scores: Tensor, place) -> Tensor:
        number = place.site.layer
        groups = body.heads(number) // body.kv_heads(number)
        new = scores.clone()
        for index in range(body.kv_heads(number)):
            seen = visible(f"L{number}.G{index}", columns[:, None], columns[None, :])
            seen = seen | torch.eye(len(columns), dtype=torch.bool)
            heads = slice(index * groups, (index + 1) * groups)
            new[:, heads] = scores[:, heads].masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)
        return new

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(listen(model, [(site, handler) for site in body.resolve("scores")]))
        positions = None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp_min(0)
        return model(input_ids=ids, attention_mask=attention_mask, position_ids=positions).logits


def cached_logits(model, ids: Tensor, attention_mask: Tensor | None, cache, turns: list[int]) -> Tensor:
    """Logits [B, T, V] of the same text, read through a cache in turns of so many tokens."""
    assert sum(turns) == ids.shape[1]
    out, start = [], 0
    positions = None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        for length in turns:
            stop = start + length
            mask = None if attention_mask is None else attention_mask[:, :stop]
            here = None if positions is None else positions[:, start:stop]
            out.append(model(ids[:, start:stop], attention_mask=mask, position_ids=here, past_key_values=cache).logits)
            start = stop
    return torch.cat(out, 1)


def streaming(sink: int, recent: int, pads: Tensor) -> Callable[[str, Tensor, Tensor], Tensor]:
    """Sinks and recent tokens of every row; pads [B]."""

    def visible(_: str, query: Tensor, key: Tensor) -> Tensor:
        first = pads[:, None, None]
        return (key >= first) & ((key < first + sink) | (key > query - recent))

    return visible
