"""Ways to generate side by side, on the user's own model: seconds, tokens a pass, and whether the texts are the same.

Contestants take turns on every request, so that what slows the machine slows all of them.
"""

import json
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from headwise.attach import treated
from headwise.data.layout import pad_id
from headwise.data.repeated_tokens import RepeatedTokens
from headwise.decode.head_copying import HeadCopying
from headwise.drafting import Stats
from headwise.heads.induction import Induction
from headwise.kv_cache import CacheMethod
from headwise.method import load
from headwise.packing import Packed
from headwise.progress import hidden
from headwise.task import pad_left
from headwise.verifying import DraftMethod

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headwise.data.requests import Request

HEADS = 6


@dataclass(frozen=True)
class Way:
    """One way to generate.

    Attributes:
        method: drafts; None generates as transformers does, with its own `options`.
        options: further options of `model.generate`, such as prompt_lookup_num_tokens.
        treatments: what KV heads keep, as of a plan; None leaves the cache as it is.
        packed: weights laid out for products of a few tokens, to multiply by; None uses the model's own.
    """

    method: DraftMethod | None = None
    options: Mapping[str, Any] | None = None
    treatments: "CacheMethod | Mapping[str, CacheMethod] | None" = None
    packed: Packed | None = None


@dataclass(frozen=True)
class Speed:
    """What one way to generate did with some requests.

    Attributes:
        name: of the way; requests: how many; rows: of a batch.
        tokens: generated for all requests in one round, the padding of ended rows left out.
        seconds: for all requests, median over rounds; rounds: of each round.
        faster: how many times as fast as the first contestant, median over rounds; each: the same request by request
            (batch by batch), from medians over rounds.
        same: share of requests whose text is that of the first contestant.
        per_pass: tokens that a text gained in a forward pass, the first one left out.
        acceptance: share of drafted tokens accepted, None without drafts; why: why drafts ended; sources: by drafter.
    """

    name: str
    requests: int
    rows: int
    tokens: int
    seconds: float
    rounds: list[float]
    faster: float
    each: list[float]
    same: float
    per_pass: float
    acceptance: float | None
    why: dict[str, int]
    sources: dict[str, list[int]]

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second, prompts read included."""
        return self.tokens / self.seconds


def named_draft(text: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> DraftMethod:
    """A method from words: "copyspec:gamma=5", "hydra:path=FOLDER", "either:first=(copyspec),second=(head_copying)".

    Where head copying has no heads, those of this model with the highest induction score are taken.

    Raises:
        ValueError: no such method or field, a method that does not draft, or a value of another kind.
    """
    name, _, rest = text.partition(":")
    kind = load(name if "." in name else f"decode.{name}")
    if not issubclass(kind, DraftMethod):
        raise ValueError(f"{name} does not draft; `headwise ls decode` shows the room, copyspec is one that does.")
    words = {one.name for one in fields(kind) if isinstance(one.default, str)}
    known, given = [one.name for one in fields(kind)], {}
    for part in _parts(rest):
        key, equals, value = (one.strip() for one in part.partition("="))
        if not equals or key not in known:
            raise ValueError(
                f"{text!r}: {part!r} is no field; allowed are {', '.join(known) or 'none'}, as name=value."
            )
        if key in words:
            given[key] = value
        else:
            inner = value.startswith("(")
            given[key] = named_draft(value[1:-1], model, tokenizer) if inner else _value(text, key, value)
    missing = [one.name for one in fields(kind) if one.default is MISSING and one.name not in given]
    if missing:
        raise ValueError(f"{name} needs {missing[0]}, such as {name}:{missing[0]}=(copyspec).")
    return with_heads(kind(**given), model, tokenizer)


def _parts(text: str) -> list[str]:
    """Cut at commas that stand in no bracket."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return [part for part in parts if part]


def _value(text: str, key: str, value: str) -> Any:
    try:
        found = json.loads(value)
    except ValueError as problem:
        raise ValueError(f"{text!r}: the value of {key} is {value!r}, which is no number.") from problem
    return tuple(found) if isinstance(found, list) else found


def with_heads(
    method: DraftMethod, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", count: int = HEADS
) -> DraftMethod:
    """The method, with the model's best induction heads where it is one that asks heads and names none."""
    if isinstance(method, HeadCopying) and not method.heads:
        batch = RepeatedTokens(length=50).make(tokenizer, 4, 0)
        return method.asking(Induction().score(model, batch), count)
    held = {one.name: getattr(method, one.name) for one in fields(method)}
    inner = {
        name: with_heads(one, model, tokenizer, count) for name, one in held.items() if isinstance(one, DraftMethod)
    }
    return replace(method, **inner) if inner else method


def compare(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    ways: Mapping[str, Way],
    requests: "Sequence[Request]",
    *,
    tokens: int = 64,
    rounds: int = 5,
    rows: int = 1,
) -> list[Speed]:
    """Let every way answer every request greedily, in turns.

    Args:
        ways: {name: way}; the first is what the others are compared with.
        tokens: generated at most for each request. rounds: how often all of it is done.
        rows: requests that are answered together, padded on the left.

    Raises:
        ValueError: no ways, no requests, or numbers below 1.
    """
    if not ways or not requests or min(tokens, rounds, rows) < 1:
        raise ValueError(
            f"{len(ways)} ways, {len(requests)} requests, {tokens} tokens, {rounds} rounds and {rows} rows were given; "
            "allowed are 1 or more of each."
        )
    parts = [requests[start : start + rows] for start in range(0, len(requests), rows)]
    batches = [pad_left([one.ids for one in part], pad_id(tokenizer)) for part in parts]
    spent: dict[str, list[list[float]]] = {name: [[] for _ in batches] for name in ways}
    made: dict[str, list[_Made]] = {name: [] for name in ways}
    with tqdm(total=rounds * len(batches) * len(ways), desc="decode", disable=hidden(), leave=False) as bar:
        for turn in range(rounds):
            for place, (ids, mask) in enumerate(batches):
                for name, way in _turned(ways, turn + place):
                    one = _generate(model, way, ids.to(model.device), mask.to(model.device), tokens)
                    spent[name][place].append(one.seconds)
                    if turn == 0:
                        made[name].append(one)
                    bar.update()
    first = next(iter(ways))
    return [_speed(name, spent, made, first, len(requests), rows) for name in ways]


def _turned(ways: Mapping[str, Way], by: int) -> list[tuple[str, Way]]:
    """Another one begins each time, so that none always runs behind the same other."""
    order = list(ways.items())
    return order[by % len(order) :] + order[: by % len(order)]


@dataclass(frozen=True)
class _Made:
    """What was generated for one batch."""

    texts: list[list[int]]
    seconds: float
    passes: int
    turns: int
    stats: Stats | None


def _generate(model: "PreTrainedModel", way: Way, ids: Tensor, mask: Tensor, tokens: int) -> _Made:
    options = {"attention_mask": mask, "max_new_tokens": tokens, "do_sample": False, **(way.options or {})}
    stats = None
    with treated(model, way.treatments), way.packed or nullcontext(), _passes(model) as passes:
        start = _clock(model)
        if way.method is None:
            found = model.generate(ids, **options)
        else:
            decoded = way.method.generate(model, ids, **options)
            found, stats = decoded.ids, decoded.stats
        seconds = _clock(model) - start
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    texts = [_ended(row, ends) for row in found[:, ids.shape[1] :].tolist()]
    turns = sum(max(0, len(text) - 1) for text in texts) if stats is None else stats.turns
    if stats is None and len(texts) == 1:
        turns = len(passes) - 1
    return _Made(texts, seconds, len(passes), turns, stats)


def _ended(text: list[int], ends: "set[int | None]") -> list[int]:
    """A text up to its end token."""
    stop = next((i + 1 for i, token in enumerate(text) if token in ends), len(text))
    return text[:stop]


@contextmanager
def _passes(model: "PreTrainedModel") -> "Iterator[list[int]]":
    """One entry for each forward pass of the model."""
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        yield seen
    finally:
        hook.remove()


def _clock(model: "PreTrainedModel") -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _speed(
    name: str,
    spent: dict[str, list[list[float]]],
    made: dict[str, list[_Made]],
    first: str,
    requests: int,
    rows: int,
) -> Speed:
    mine, theirs = spent[name], spent[first]
    totals, others = ([sum(times) for times in zip(*one, strict=True)] for one in (mine, theirs))
    texts = [text for one in made[name] for text in one.texts]
    right = [text for one in made[first] for text in one.texts]
    stats = [one.stats for one in made[name] if one.stats is not None]
    drafted, accepted = sum(one.drafted for one in stats), sum(one.accepted for one in stats)
    why: Counter[str] = sum((one.why for one in stats), Counter())
    sources: dict[str, list[int]] = {}
    for one in stats:
        for source, counts in one.sources.items():
            sources[source] = [a + b for a, b in zip(sources.get(source, [0, 0, 0]), counts, strict=True)]
    gained, turns = sum(max(0, len(text) - 1) for text in texts), sum(one.turns for one in made[name])
    medians = [(statistics.median(b), statistics.median(a)) for a, b in zip(mine, theirs, strict=True)]
    return Speed(
        name=name,
        requests=requests,
        rows=rows,
        tokens=sum(map(len, texts)),
        seconds=statistics.median(totals),
        rounds=totals,
        faster=statistics.median(b / a for a, b in zip(totals, others, strict=True)),
        each=[b / a for b, a in medians],
        same=sum(a == b for a, b in zip(texts, right, strict=True)) / len(right),
        per_pass=gained / turns if turns else 1.0,
        acceptance=accepted / drafted if drafted else None,
        why=dict(why.most_common()),
        sources=sources,
    )


def usual(method: "DraftMethod | None" = None, tokens: int = 10) -> dict[str, Way]:
    """Plain greedy generation, transformers' prompt lookup, and perhaps a method beside them."""
    ways = {"greedy": Way(), "prompt lookup (transformers)": Way(options={"prompt_lookup_num_tokens": tokens})}
    return ways if method is None else {**ways, method.identity()["name"]: Way(method)}
