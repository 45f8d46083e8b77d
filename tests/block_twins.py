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


def parts(start: int, stop: int, single: int, size: int) -> list[list[int]]:
    """The tokens of a turn in parts that look together, counted from its end."""
    if stop - start <= single:
        return [[at] for at in range(start, stop)]
    found, end = [], stop
    while end > start:
        found.append(list(range(max(start, end - size), end)))
        end -= size
    return found[::-1]


def moved(rotate, x: Tensor, by: list[int]) -> Tensor:
    """Vectors [T, d], each as if it stood so many positions later."""
    return rotate(x[None, None], torch.tensor(by))[0, 0] if by else x


def infllm(method, rotate) -> Policy:
    """InfLLM: each far key is carried to the one far distance from each query that reads it."""
    far = method.recent + method.block

    def fit(q: Tensor, k: Tensor, marks: list[list[list[int]]], together: list[int]) -> list[float]:
        """How well each block fits the queries that look together."""
        groups, fits = len(q) // len(k), []
        for mark in marks:
            total = 0.0
            for head in range(len(q)):
                there = mark[head // groups]
                for p in together:
                    keys = moved(rotate, k[head // groups, there], [p - far - j for j in there])
                    total += float(q[head, p] @ keys.mean(0)) / len(together)
            fits.append(total)
        return fits

    def policy(q: Tensor, k: Tensor, v: Tensor, turns: list[tuple[int, int]], scale: float) -> Tensor:
        heads, length = k.shape[:2]
        groups = len(q) // heads
        z, received, marks = q.new_zeros(*q.shape[:2], v.shape[-1]), torch.zeros(heads, length), []
        for together in (part for turn in turns for part in parts(*turn, method.single, method.chunk)):
            while method.sink + (len(marks) + 1) * method.block <= together[0] - method.recent + 1:
                low = method.sink + len(marks) * method.block
                got = received[:, low : low + method.block].topk(method.representatives).indices + low
                marks.append(got.tolist())
            near = method.sink + len(marks) * method.block if marks else 0
            fits = fit(q, k, marks, together)
            chosen = sorted(range(len(marks)), key=lambda m: -fits[m])[: method.blocks]
            away = list(range(method.sink)) if marks else []
            away += [method.sink + m * method.block + i for m in chosen for i in range(method.block)]
            for head in range(len(q)):
                for p in together:
                    local, mine = list(range(near, p + 1)), k[head // groups]
                    keys = torch.cat([moved(rotate, mine[away], [p - far - j for j in away]), mine[local]])
                    z[head, p] = softmaxed(q[head, p], keys, v[head // groups, away + local], scale)
                    received[head // groups, local] += (mine[local] @ q[head, p] * scale).softmax(0)
        return z

    return policy


def longheads(method, rotate) -> Policy:
    """LongHeads: each query head's chunks are carried to where they touch."""
    size = method.chunk

    def known(q: Tensor, k: Tensor, v: Tensor, number: int, scale: float) -> Tensor:
        there = slice(number * size, (number + 1) * size)
        said = torch.stack([softmaxed(one, k[there], v[there], scale) for one in q[there]]).mean(0)
        local = moved(rotate, k[there], [-number * size] * size)
        return softmaxed(said, local, local, len(said) ** -0.5)

    def policy(q: Tensor, k: Tensor, v: Tensor, turns: list[tuple[int, int]], scale: float) -> Tensor:
        z, groups, n = q.new_zeros(*q.shape[:2], v.shape[-1]), len(q) // len(k), method.chunks - 1
        looking = [part for turn in turns for part in parts(*turn, method.single, method.together)]
        for head in range(len(q)):
            mine, values = k[head // groups], v[head // groups]
            keys = [known(q[head], mine, values, m, scale) for m in range(q.shape[1] // size)]
            for together in looking:
                own = together[0] // size
                ask = moved(rotate, q[head, together], [-p for p in together]).mean(0)
                fits = {m: torch.inf if m in (0, own - 1) else float(ask @ keys[m]) for m in range(own)}
                chosen = sorted(sorted(fits, key=lambda m: -fits[m])[:n])
                for p in together:
                    read = [m * size + i for m in chosen for i in range(size)] + list(range(own * size, p + 1))
                    places = range(len(read))
                    laid = moved(rotate, mine[read], [place - j for place, j in zip(places, read, strict=True)])
                    query = moved(rotate, q[head, [p]], [len(read) - 1 - p])[0]
                    z[head, p] = softmaxed(query, laid, values[read], scale)
        return z

    return policy
