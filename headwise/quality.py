"""What a KV cache is worth: secrets found again, text copied, text predicted, all of it read through that cache.

The context goes in first, and what is asked comes in a forward pass of its own, so that an answer can only come from
what the cache kept. Prompts run one at a time and without padding. All caches of a comparison see the same prompts.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from headwise.attach import caching
from headwise.kv_cache import KVCache
from headwise.method import load
from headwise.progress import hidden
from headwise.stats import binomial_interval, interval
from headwise.task import Batch, with_needle

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

    MakeCache = Callable[[], Cache] | None

# Prompts of a quick and of a thorough measurement, and the fields of each task beside its length.
TASKS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "passkey": ("passkeys", 8, 24, {"passkeys": 1, "asked": 1}),
    "needle": ("needle", 6, 18, {"depths": (0.1, 0.5, 0.9, 0.3, 0.7, 0.2)}),
    "keys": ("key_values", 3, 12, {"pairs": 4, "asked": 4}),
    "copy": ("verbatim", 8, 16, {}),
    "text": ("held_out", 3, 12, {}),
}
RETRIEVAL = ("passkey", "needle", "keys", "copy")


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


@dataclass(frozen=True)
class Quality:
    """How well a model works through one cache, at one length.

    Attributes:
        at: length of the prompts in tokens, about; seed: of their making.
        accuracy: {task: share of answers that are right in every token}.
        low, high: {task: Wilson's 95 % interval of it}; the answers of one prompt count as independent.
        n: {task: answers}; for "text" the number of predicted tokens.
        nll: nats a token of held-out text behind the first half of the window; nll_low, nll_high: 95 % interval of its
            mean over windows, NaN with one window.
        right: {task: one bool an answer}, and losses: nats a token of each window, in the order of the prompts, so that
            two caches can be compared prompt by prompt.
        bytes: mean bytes of the cache's tensors when a prompt has been answered.
    """

    at: int
    seed: int
    accuracy: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    n: dict[str, int]
    nll: float
    nll_low: float
    nll_high: float
    bytes: float
    right: dict[str, list[bool]] = field(default_factory=dict, repr=False)
    losses: list[float] = field(default_factory=list, repr=False)

    @property
    def retrieval(self) -> float:
        """Mean accuracy over the retrieval tasks, each counting the same."""
        return sum(self.accuracy.values()) / len(self.accuracy) if self.accuracy else float("nan")

    def kept(self, full: "Quality") -> float | None:
        """Share of the answers that were right with the full cache and are right with this one, over all tasks.

        None where the full cache got nothing right.

        Raises:
            ValueError: the two were not measured on the same prompts.
        """
        if (self.at, self.seed, self.n) != (full.at, full.seed, full.n):
            raise ValueError(
                f"Qualities at {self.at} tokens, seed {self.seed}, and at {full.at} tokens, seed {full.seed}, are not "
                "of the same prompts; measure both with one call of compare."
            )
        pairs = [pair for task, mine in self.right.items() for pair in zip(mine, full.right[task], strict=True)]
        before = [now for now, then in pairs if then]
        return sum(before) / len(before) if before else None


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
        forced: read the right answers in place of the model's own. An answer is right either way or neither, but a
            wrong one does not mislead those after it.
        apart: the question (span "question"; the last token where there is none) is read after the context. When False
            the whole prompt is one prefill, so a cache that drops keys behind a pass shows nothing in the first token.
        step: called after each prompt.

    Raises:
        ValueError: a chunk below 1, a cache that is not fresh, or rows whose answers are split differently.
    """
    _check_chunk(chunk)
    rows, runs = [], None
    for row in range(len(batch)):
        ids, columns, start = _row(batch, row)
        mine = _runs(columns)
        if runs is not None and mine != runs:
            raise ValueError(f"Row {row} has answers of {mine} tokens, the first row of {runs}; they must be the same.")
        runs = mine
        with _reading(model, cache) as past:
            said = _answer(past, ids, columns, start if apart else columns[0] + 1, chunk, forced)
            rows.append((said, bytes_of(past.cache)))
        step()
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
        chunk: tokens of each later pass. Within a pass a token always sees those before it.
        step: called after each row.

    Returns:
        [B] mean nats a token.

    Raises:
        ValueError: a prefill or a chunk that leaves nothing to predict, or a cache that is not fresh.
    """
    _check_chunk(chunk)
    length = ids.shape[1]
    prefill = max(1, length // 2) if prefill is None else prefill
    if not 1 <= prefill < length:
        raise ValueError(f"A prefill of {prefill} tokens was asked for; a text of {length} allows 1 to {length - 1}.")
    losses = []
    for row in ids.to(model.device):
        with _reading(model, cache) as past:
            logits = [past.read(row[:prefill], 1)]
            for start in range(prefill, length - 1, chunk):
                part = row[start : min(start + chunk, length - 1)]
                logits.append(past.read(part, len(part)))
        losses.append(torch.nn.functional.cross_entropy(torch.cat(logits).float(), row[prefill:]))
        step()
    return torch.stack(losses).cpu()


def prompts(
    tokenizer: "PreTrainedTokenizerBase", at: int = 2048, seed: int = 0, quick: bool = True
) -> dict[str, Batch]:
    """The prompts of a measurement: {"passkey", "needle", "keys", "copy", "text": Batch}, each of about `at` tokens.

    Raises:
        ValueError: `at` is too short for a task.
    """
    made = {
        name: load(f"data.{task}")(length=at, **fields).make(tokenizer, few if quick else many, seed)
        for name, (task, few, many, fields) in TASKS.items()
    }
    return made | {"needle": with_needle(made["needle"])}


def compare(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    caches: "Mapping[str, MakeCache]",
    at: int = 2048,
    seed: int = 0,
    quick: bool = True,
    *,
    chunk: int | None = None,
    given: "Mapping[str, Batch] | None" = None,
) -> dict[str, Quality]:
    """Passkeys, needles, keys, copying and held-out text through several caches, on the same prompts.

    Answers are forced: each is what greedy decoding says behind the right answers to the questions before it. A quick
    measurement is 26 prompts a cache (12 answers for passkeys, 6 needles, 12 keys, 8 copies, 3 windows of text), a
    thorough one 82.

    Args:
        caches: {name: maker of a fresh cache, or None for the model's own}; chunk: as in `retrieval`.
        given: prompts to be used in place of those of `prompts`; tasks that it lacks are left out.

    Raises:
        ValueError: a length that is too short, or a cache that is not fresh.
    """
    batches = prompts(tokenizer, at, seed, quick) if given is None else dict(given)
    if strange := [name for name in batches if name not in TASKS]:
        raise ValueError(f"{strange[0]!r} is no task of a quality; allowed are {', '.join(TASKS)}.")
    total = len(caches) * sum(map(len, batches.values()))
    found: dict[str, dict[str, Any]] = {name: {} for name in caches}
    with tqdm(total=total, desc=f"quality at {at}", disable=hidden(), leave=False) as bar:
        for task, batch in batches.items():
            for name, cache in caches.items():
                if task == "text":
                    found[name][task] = perplexity(model, batch.ids, cache, step=bar.update)
                else:
                    found[name][task] = retrieval(model, tokenizer, batch, cache, chunk, forced=True, step=bar.update)
    return {name: _quality(results, at, seed, batches) for name, results in found.items()}


def measure(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    cache: "MakeCache" = None,
    at: int = 2048,
    seed: int = 0,
    quick: bool = True,
    *,
    chunk: int | None = None,
) -> Quality:
    """The quality of one cache; `compare` measures several on the same prompts, and says what is measured."""
    return compare(model, tokenizer, {"cache": cache}, at, seed, quick, chunk=chunk)["cache"]


def solved(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    lengths: Sequence[int] = (500, 1000, 2000, 4000),
    least: float = 0.9,
    seed: int = 0,
    quick: bool = True,
) -> dict[str, dict[int, float]]:
    """At which lengths the full cache answers well enough that a loss could be seen.

    On SmolLM2-135M-Instruct (seed 1) needles, keys and copying pass at 500 and 1000 tokens, copying also at 2000, where
    19 of 24 keys are found. Two passkeys do not pass: 20 of 24 at 500.

    Returns:
        {task: {length: accuracy}}, holding only the lengths at which the accuracy is at least `least`.
    """
    found: dict[str, dict[int, float]] = {task: {} for task in RETRIEVAL}
    for at in lengths:
        made = {name: batch for name, batch in prompts(tokenizer, at, seed, quick).items() if name in RETRIEVAL}
        quality = compare(model, tokenizer, {"full": None}, at, seed, given=made)["full"]
        for task, share in quality.accuracy.items():
            if share >= least:
                found[task][at] = share
    return found


def bytes_of(cache: "Cache") -> int:
    """Bytes of the memory behind a cache's tensors, each piece counted once."""
    if isinstance(cache, KVCache):
        return cache.bytes()
    tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


class _Past:
    """A model, and the cache through which it reads."""

    def __init__(self, model: "PreTrainedModel", cache: "Cache | None") -> None:
        self.model, self.cache = model, cache
        self.short = "logits_to_keep" in inspect.signature(type(model).forward).parameters

    def read(self, ids: Tensor, keep: int) -> Tensor:
        """Read ids [Q] and return the last `keep` rows of logits [keep, V]."""
        less = {"logits_to_keep": keep} if self.short else {}
        out = self.model(input_ids=ids[None], past_key_values=self.cache, use_cache=True, **less)
        self.cache = out.past_key_values
        return out.logits[0, -keep:]


@contextmanager
def _reading(model: "PreTrainedModel", make: "MakeCache") -> Iterator[_Past]:
    """A fresh cache to read through; the model's attention is led to it where it is one of headwise."""
    cache = None if make is None else make()
    if cache is not None and cache.get_seq_length():
        raise ValueError(
            f"The cache holds {cache.get_seq_length()} tokens; each prompt needs a fresh one from the function given."
        )
    was = model.training
    with caching(model) if isinstance(cache, KVCache) else nullcontext(), torch.no_grad():
        model.eval()
        try:
            yield _Past(model, cache)
        finally:
            model.train(was)


def _answer(past: _Past, ids: Tensor, columns: list[int], start: int, chunk: int | None, forced: bool) -> list[int]:
    """The tokens said at `columns` of one prompt ids [T], whose question begins at column `start`."""
    ids = ids.to(past.model.device)
    for begin in range(0, start, chunk or max(1, start)):
        logits = past.read(ids[begin : min(begin + (chunk or start), start)], 1)
    if start <= columns[0]:
        logits = past.read(ids[start : columns[0] + 1], 1)
    said = [int(logits[0].argmax())]
    for last, column in zip(columns, columns[1:], strict=False):
        fresh = ids[last + 1 : column + 1].clone()
        if not forced:
            fresh[0] = said[-1]
        said.append(int(past.read(fresh, 1)[0].argmax()))
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


def _quality(results: dict[str, Any], at: int, seed: int, batches: Mapping[str, Batch]) -> Quality:
    answers = {task: result for task, result in results.items() if task != "text"}
    right = {task: result.right.flatten().tolist() for task, result in answers.items()}
    bounds = {task: binomial_interval(sum(one), len(one)) for task, one in right.items()}
    losses = results["text"].tolist() if "text" in results else []
    low, high = interval(torch.tensor(losses).numpy()) if losses else (float("nan"), float("nan"))
    n = {task: len(one) for task, one in right.items()}
    if losses:
        n["text"] = len(losses) * -(-batches["text"].ids.shape[1] // 2)
    sizes = [size for result in answers.values() for size in result.bytes.tolist()]
    return Quality(
        at=at,
        seed=seed,
        accuracy={task: sum(one) / len(one) for task, one in right.items()},
        low={task: one[0] for task, one in bounds.items()},
        high={task: one[1] for task, one in bounds.items()},
        n=n,
        nll=sum(losses) / len(losses) if losses else float("nan"),
        nll_low=float(low),
        nll_high=float(high),
        bytes=sum(sizes) / len(sizes) if sizes else float("nan"),
        right=right,
        losses=losses,
    )
