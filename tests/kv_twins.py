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


def compensated_logits(
    model, ids: Tensor, pads: Tensor, turns: list[int], sink: int, recent: int, share: float, layers: set[int]
) -> Tensor:
    """RazorAttention, naively: the score of a dropped token is the mean score of all that were dropped for its query.

    So together they weigh as N times the token with the mean key, and bring in the mean value.
    """
    length = ids.shape[1]
    rows, columns = torch.arange(length)[None, :, None], torch.arange(length)[None, None]
    past = torch.repeat_interleave(torch.tensor([sum(turns[:i]) for i in range(len(turns))]), torch.tensor(turns))
    kept = torch.tensor([max(recent, int(share * int(n))) for n in past])
    first = pads[:, None, None]
    gone = (columns < (past - kept)[None, :, None]) & (columns >= first + sink) & (rows >= first)

    def handler(scores: Tensor, place) -> Tensor:
        away = gone[:, None].expand_as(scores)
        plain = scores.masked_fill(~away, 0)
        mean = plain.sum(-1, keepdim=True) / away.sum(-1, keepdim=True).clamp_min(1)
        return torch.where(away, mean, scores)

    with ExitStack() as stack, torch.no_grad():
        sites = [site for site in anatomy(model).resolve("scores") if site.layer in layers]
        stack.enter_context(listen(model, [(site, handler) for site in sites]))
        mask = (torch.arange(length) >= pads[:, None]).long()
        return model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits


def chosen(model, ids: Tensor, window: int, capacity: int, kernel: int, safeguard: float | None) -> dict:
    """{KV head: columns of one prompt [1, T] that stay}, by SnapKV, or with a safeguard by Ada-KV; in plain loops."""
    body, patterns = anatomy(model), {}

    def keep(pattern: Tensor, place) -> None:
        patterns[place.site.layer] = pattern

    with listen(model, [(site, keep) for site in body.resolve("pattern")]), torch.no_grad():
        model(input_ids=ids)
    length, out = ids.shape[1], {}
    most = capacity - window
    for layer, pattern in patterns.items():
        groups = body.heads(layer) // body.kv_heads(layer)
        votes = {}
        for g in range(body.kv_heads(layer)):
            looked = pattern[0, g * groups : (g + 1) * groups, -window:, : length - window].sum(1).mean(0).tolist()
            half = kernel // 2
            padded = [0.0] * half + looked + [0.0] * half
            votes[g] = [sum(padded[i : i + kernel]) / kernel for i in range(len(looked))]
        counts = dict.fromkeys(votes, most)
        if safeguard is not None:
            sure = int(safeguard * most)
            best = sorted(((vote, g) for g, all_ in votes.items() for vote in all_), reverse=True)
            winners = [g for _, g in best[: len(votes) * (most - sure)]]
            counts = {g: sure + winners.count(g) for g in votes}
        for g, mine in votes.items():
            top = sorted(range(len(mine)), key=lambda i: -mine[i])[: counts[g]]
            out[f"L{layer}.G{g}"] = {*top, *range(length - window, length)}
    return out


def after_prompt(kept: dict, prompt: int) -> Callable[[str, Tensor, Tensor], Tensor]:
    """Queries behind the prompt see what was kept of it, and everything since."""

    def visible(unit: str, query: Tensor, key: Tensor) -> Tensor:
        stays = torch.zeros(key.shape[-1], dtype=torch.bool)
        stays[list(kept.get(unit, range(prompt)))] = True
        return ((key <= query) & ((query < prompt) | (key >= prompt) | stays))[None]

    return visible
