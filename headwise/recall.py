"""What a model still knows of a text that it reads through one KV cache: secrets found again, and text predicted.

The context goes in first, and what is asked comes in a forward pass of its own, so that an answer can only come from
what the cache kept. Prompts run one at a time and without padding.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from headwise.attach import caching
from headwise.kv_cache import KVCache, KVLayer
from headwise.rewinding import turn_limit
from headwise.task import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

    MakeCache = Callable[[], Cache] | None

# Tokens at most in one pass whose logits are all wanted.
WIDE = 256


@dataclass(frozen=True)
class Answers:
    """What a model answered to a batch.

    Attributes:
        tokens: [B, P] whether each token of the answers was said; right: [B, A] whether all tokens of an answer were.
        said: for each prompt its answers as text.
        bytes: [B] bytes of the cache's tensors after the last answer.
    """

    tokens: Tensor
    right: Tensor
    said: list[list[str]]
    bytes: Tensor

    @property
    def accuracy(self) -> float:
        """Share of answers that are right in every token."""
        return float(self.right.float().mean())


def retrieval(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    batch: Batch,
    cache: "MakeCache" = None,
    chunk: int | None = None,
    *,
    forced: bool = False,
    apart: bool = True,
    step: Callable[[], object] = tuple,
) -> Answers:
    """Let the model read each prompt through a fresh cache and answer it greedily, one token at a time.

    Columns of `batch.at` that follow each other are one answer. Where a prompt asks several times, each question is
    read behind the answers that the model gave before.

    Args:
        batch: `at` and `answer` [B, P] in ascending columns, the same split into answers in every row.
        cache: makes a fresh cache for `past_key_values`; None is the model's own.
        chunk: tokens at most in one forward pass of the context; None reads it at once.
        forced: read the right answers in place of the model's own, as many tokens in one pass as the cache reads as if
            they came one by one. An answer is right either way or neither, but a wrong one misleads none after it.
        apart: the question (span "question"; the last token where there is none) is read after the context. When False
            the whole prompt is one prefill, so a cache that drops keys behind a pass shows nothing in the first token.
        step: called after each prompt.

    Raises:
        ValueError: a chunk below 1, a cache that is not fresh, or rows whose answers are split differently.
    """
    return retrievals(model, tokenizer, batch, {"": cache}, chunk, forced=forced, apart=apart, step=step)[""]


def retrievals(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    batch: Batch,
    caches: "Mapping[str, MakeCache]",
    chunk: int | None = None,
    *,
    forced: bool = False,
    apart: bool = True,
    step: Callable[[], object] = tuple,
) -> dict[str, Answers]:
    """`retrieval` through several caches; what they read alike at the start of a prompt is read once.

    `step` is called after each prompt of each cache.

    Raises:
        ValueError: as `retrieval`.
    """
    _check_chunk(chunk)
    rows: dict[str, list[tuple[list[int], int]]] = {name: [] for name in caches}
    runs = None
    for row in range(len(batch)):
        ids, columns, start = _row(batch, row)
        ids, start = ids.to(model.device), start if apart else columns[0] + 1
        mine = _runs(columns)
        if runs is not None and mine != runs:
            raise ValueError(f"Row {row} has answers of {mine} tokens, the first row of {runs}; they must be the same.")
        runs = mine
        fresh = _fresh(caches)
        begun = _begun(model, ids, start, fresh) if chunk is None else {}
        for name in caches:
            with _reading(model, fresh.pop(name), begun.get(name)) as past:
                said = _answer(past, ids, columns, start, chunk, forced)
                rows[name].append((said, bytes_of(past.cache)))
            step()
    return {name: _answers(tokenizer, batch, mine, runs or []) for name, mine in rows.items()}


def _answers(
    tokenizer: "PreTrainedTokenizerBase", batch: Batch, rows: Sequence[tuple[list[int], int]], runs: list[int]
) -> Answers:
    """What was said through one cache, and its bytes, prompt by prompt, beside what is right."""
    said = torch.tensor([one for one, _ in rows])
    tokens, parts = said == batch.answer.cpu(), said.split(runs, 1)
    return Answers(
        tokens=tokens,
        right=torch.stack([part.all(1) for part in tokens.split(runs, 1)], 1),
        said=[[tokenizer.decode(part[row]) for part in parts] for row in range(len(said))],
        bytes=torch.tensor([size for _, size in rows]),
    )


def perplexity(
    model: "PreTrainedModel",
    ids: Tensor,
    cache: "MakeCache" = None,
    prefill: int | None = None,
    chunk: int = 32,
    *,
    step: Callable[[], object] = tuple,
) -> Tensor:
    """Loss on text that is read through a cache: a prefill, then the rest in small chunks. exp of it is perplexity.

    Args:
        ids: [B, T] token ids without padding.
        cache: as in `retrieval`.
        prefill: tokens of the first pass, 1 to T - 1; None is half of T. Only tokens behind it count.
        chunk: tokens of each later pass; more where that gives the same, as the cache reads them as if they came one
            by one. Within a pass a token always sees those before it.
        step: called after each row.

    Returns:
        [B] mean nats a token.

    Raises:
        ValueError: a prefill or a chunk that leaves nothing to predict, or a cache that is not fresh.
    """
    return perplexities(model, ids, {"": cache}, prefill, chunk, step=step)[""]


def perplexities(
    model: "PreTrainedModel",
    ids: Tensor,
    caches: "Mapping[str, MakeCache]",
    prefill: int | None = None,
    chunk: int = 32,
    *,
    step: Callable[[], object] = tuple,
) -> dict[str, Tensor]:
    """`perplexity` through several caches; what they read alike at the start of a text is read once.

    Raises:
        ValueError: as `perplexity`.
    """
    _check_chunk(chunk)
    length = ids.shape[1]
    prefill = max(1, length // 2) if prefill is None else prefill
    if not 1 <= prefill < length:
        raise ValueError(f"A prefill of {prefill} tokens was asked for; a text of {length} allows 1 to {length - 1}.")
    losses: dict[str, list[Tensor]] = {name: [] for name in caches}
    for row in ids.to(model.device):
        fresh = _fresh(caches)
        begun = _begun(model, row, prefill, fresh)
        for name in caches:
            with _reading(model, fresh.pop(name), begun.get(name)) as past:
                logits = [past.open(row, prefill)]
                wide = max(chunk, min(past.most, WIDE)) if past.most >= chunk else chunk
                for start in range(prefill, length - 1, wide):
                    part = row[start : min(start + wide, length - 1)]
                    logits.append(past.read(part, range(len(part))))
            losses[name].append(torch.nn.functional.cross_entropy(torch.cat(logits).float(), row[prefill:]))
            step()
    return {name: torch.stack(mine).cpu() for name, mine in losses.items()}


def bytes_of(cache: "Cache") -> int:
    """Bytes of the memory behind a cache's tensors, each piece counted once."""
    if isinstance(cache, KVCache):
        return cache.bytes()
    values = [value for layer in cache.layers for value in vars(layer).values()]
    # Where keys are written in few bits, a tuple holds them and their scale.
    held = [one for value in values for one in (value if isinstance(value, tuple) else (value,))]
    tensors = [one for one in held if isinstance(one, Tensor)]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


@dataclass(frozen=True)
class _Begun:
    """The first tokens of a text, read with everything in sight: how many, in a cache, and the logits [1, V] behind."""

    tokens: int
    cache: "Cache"
    logits: Tensor


def _begun(
    model: "PreTrainedModel", ids: Tensor, length: int, fresh: "Mapping[str, Cache | None]"
) -> dict[str, _Begun]:
    """As much of the first `length` ids [T] as saves most, for each cache that would read it so; for two or none."""
    if not any(isinstance(cache, KVCache) for cache in fresh.values()):
        return {}
    # The model's own cache keeps everything.
    asked = {name: KVCache(model, {}) if cache is None else cache for name, cache in fresh.items()}
    ranges = {name: cache.openings(length) for name, cache in asked.items() if isinstance(cache, KVCache)}
    takers = {one[-1]: [name for name in ranges if one[-1] in ranges[name]] for one in ranges.values() if one}
    tokens = max(takers, key=lambda n: n * (len(takers[n]) - 1), default=0)
    if not tokens or len(takers[tokens]) < 2:
        return {}
    with _reading(model, None) as past:
        logits = past.open(ids, tokens)
    return dict.fromkeys(takers[tokens], _Begun(tokens, past.cache, logits))


class _Past:
    """A model, and the cache through which it reads."""

    def __init__(self, model: "PreTrainedModel", cache: "Cache | None", begun: _Begun | None = None) -> None:
        self.model, self.cache, self.begun = model, cache, begun
        if begun is not None and isinstance(cache, KVCache):
            cache.take(model, begun.cache)
        elif begun is not None:
            self.cache = copy.deepcopy(begun.cache)
        self.short = "logits_to_keep" in inspect.signature(type(model).forward).parameters

    @property
    def most(self) -> int:
        """Tokens that one pass may read as if they came one by one, once something has been read; before, and of layers
        that nothing is known of, 1.
        """
        layers = [] if self.cache is None else self.cache.layers
        known = layers and all(type(layer) in (KVLayer, DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        return turn_limit(self.cache) if known and self.cache.get_seq_length() else 1

    def open(self, ids: Tensor, length: int, chunk: int | None = None) -> Tensor:
        """Read the first `length` of the ids [T], `chunk` in one pass -> logits [1, V] behind them."""
        had, logits = (0, torch.empty(0)) if self.begun is None else (self.begun.tokens, self.begun.logits)
        for start in range(had, length, chunk or max(1, length)):
            part = ids[start : min(start + (chunk or length), length)]
            logits = self.read(part, [len(part) - 1])
        return logits

    def read(self, ids: Tensor, columns: Sequence[int]) -> Tensor:
        """Read ids [Q] and return the logits [columns, V] of some of them."""
        at = torch.tensor(list(columns), device=ids.device)
        less = {"logits_to_keep": at} if self.short else {}
        out = self.model(input_ids=ids[None], past_key_values=self.cache, use_cache=True, **less)
        self.cache = out.past_key_values
        return out.logits[0] if self.short else out.logits[0, at]


def _fresh(caches: "Mapping[str, MakeCache]") -> "dict[str, Cache | None]":
    """A new cache of each; None is the model's own."""
    fresh = {name: None if make is None else make() for name, make in caches.items()}
    for cache in fresh.values():
        if cache is not None and (held := cache.get_seq_length()):
            raise ValueError(f"The cache holds {held} tokens; each prompt needs a fresh one from the function given.")
    return fresh


@contextmanager
def _reading(model: "PreTrainedModel", cache: "Cache | None", begun: _Begun | None = None) -> Iterator[_Past]:
    """Reading through a fresh cache, behind what was begun; attention is led to it where it is one of headwise."""
    was = model.training
    with caching(model) if isinstance(cache, KVCache) else nullcontext(), torch.no_grad():
        model.eval()
        try:
            yield _Past(model, cache, begun)
        finally:
            model.train(was)


def _answer(past: _Past, ids: Tensor, columns: list[int], start: int, chunk: int | None, forced: bool) -> list[int]:
    """The tokens said at `columns` of one prompt ids [T], whose question begins at column `start`."""
    logits = past.open(ids, start, chunk)
    said = [int(logits[0].argmax())] if start > columns[0] else []
    begin, waiting = start, columns[len(said) :]
    while waiting:
        count = 1
        # The last as it would come alone: a sliding layer holds on to all that its last pass was cut from.
        while forced and count < len(waiting) - 1 and waiting[count] + 1 - begin <= past.most:
            count += 1
        here, waiting = waiting[:count], waiting[count:]
        fresh = ids[begin : here[-1] + 1].clone()
        if said and not forced:
            fresh[0] = said[-1]
        said += past.read(fresh, [column - begin for column in here]).argmax(-1).tolist()
        begin = here[-1] + 1
    return said


def _row(batch: Batch, row: int) -> tuple[Tensor, list[int], int]:
    """Ids of one prompt without its padding, the columns that are read, and where its question begins."""
    mask = batch.inputs.get("attention_mask")
    pads = 0 if mask is None else int((mask[row] == 0).sum())
    columns = [int(column) - pads for column in batch.at[row]]
    start = columns[0]
    if "question" in batch.spans:
        start = min(start, int(batch.spans["question"][row, 0]) - pads)
    return batch.ids[row, pads:], columns, start


def _runs(columns: list[int]) -> list[int]:
    """How many columns follow each other without a gap, run by run."""
    starts = [i for i, column in enumerate(columns) if i == 0 or column != columns[i - 1] + 1]
    return [stop - start for start, stop in zip(starts, [*starts[1:], len(columns)], strict=True)]


def _check_chunk(chunk: int | None) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"A chunk of {chunk} tokens was asked for; allowed is 1 or more.")
