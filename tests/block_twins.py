"""Naive twins of the caches that choose what is read: one pass over the whole text, one query at a time, no store."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

# z [H*G, T, dv] of one row without padding: q [H*G, T, d], k [H, T, d], v [H, T, dv], turns [(from, to)], scale
Policy = Callable[[Tensor, Tensor, Tensor, list[tuple[int, int]], float], Tensor]
NAME = "headwise_test_twin"


@contextmanager
def attending(model, policy: Policy, pads: list[int], turns: list[int]) -> Iterator[None]:
    """The model with its attention replaced by the policy, row by row; its own attention comes back."""

    def attention(module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any):
        z = query.new_zeros(*query.shape[:3], value.shape[-1])
        for row, pad in enumerate(pads):
            edges, start = [], 0
            for length in turns:
                edges.append((max(0, start - pad), max(0, start + length - pad)))
                start += length
            edges = [edge for edge in edges if edge[0] < edge[1]]
            z[row, :, pad:] = policy(query[row, :, pad:], key[row, :, pad:], value[row, :, pad:], edges, scaling)
        return z.transpose(1, 2), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def twin_logits(model, ids: Tensor, pads: list[int], turns: list[int], policy: Policy) -> Tensor:
    """Logits [B, T, V] of one pass with the policy as attention."""
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]).long()
    with torch.no_grad(), attending(model, policy, pads, turns):
        return model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits


def softmaxed(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One query [d] over keys [K, d] and values [K, dv]."""
    return (k @ q * scale).softmax(0) @ v


def pages(method) -> Policy:
    """LServe's pages, with bounds taken from the keys themselves at each choice."""

    def choose(q: Tensor, k: Tensor, at: int) -> set[int]:
        own, scores = at // method.page, {}
        for page in range(own):
            part = k[page * method.page : (page + 1) * method.page].split(method.piece)
            bound = [torch.maximum(one * piece.amin(0), one * piece.amax(0)).sum() for one in q for piece in part]
            scores[page] = torch.inf if page == 0 else float(max(bound))
        return set(sorted(scores, key=lambda page: -scores[page])[: method.budget // method.page - 1])

    def policy(q: Tensor, k: Tensor, v: Tensor, turns: list[tuple[int, int]], scale: float) -> Tensor:
        z, groups = q.new_zeros(*q.shape[:2], v.shape[-1]), len(q) // len(k)
        for head in range(len(k)):
            mine, chosen = slice(head * groups, (head + 1) * groups), None
            for start, stop in turns:
                dense = stop - start > method.single
                chosen = None if dense else chosen
                for at in range(start, stop):
                    columns = list(range(at + 1))
                    if not dense and at + 1 > method.budget:
                        if chosen is None or at % method.interval == 0:
                            chosen = choose(q[mine, at], k[head], at)
                        columns = [
                            c for c in columns if c // method.page in chosen or c // method.page == at // method.page
                        ]
                    for one in range(mine.start, mine.stop):
                        z[one, at] = softmaxed(q[one, at], k[head, columns], v[head, columns], scale)
        return z

    return policy
