"""What a cache costs and what it is worth, on the user's own model: seconds, bytes, answers.

Contestants take turns in one process, so that what slows the machine slows all of them.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from headwise.attach import caching
from headwise.kv_cache import KVCache
from headwise.progress import hidden
from headwise.recall import bytes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MakeCache = Callable[[], Cache]


@dataclass(frozen=True)
class Cost:
    """What one cache costs at one length.

    Attributes:
        name: of the contestant; at: tokens of the prompt; tokens: decoded in each round.
        prefill: seconds of reading the prompt, median; decode: seconds a token, median over rounds.
        prefills, decodes: the single figures.
        bytes: of the cache's tensors after decoding.
        peak: bytes by which the process (or GPU) grew at most while reading and decoding first; None if not known here.
    """

    name: str
    at: int
    tokens: int
    prefill: float
    decode: float
    prefills: list[float]
    decodes: list[float]
    bytes: int
    peak: int | None


def dynamic(model: "PreTrainedModel") -> MakeCache:
    """The cache that `generate` makes by default."""
    return lambda: DynamicCache(config=model.config.get_text_config(decoder=True))


def static(model: "PreTrainedModel", most: int) -> MakeCache:
    """The preallocated cache of transformers, of a fixed length."""
    return lambda: StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=most)


def cost(
    model: "PreTrainedModel",
    caches: Mapping[str, MakeCache],
    ids: Tensor,
    *,
    tokens: int = 16,
    rounds: int = 5,
    prefills: int = 1,
    chunk: int | None = None,
    inside: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
) -> list[Cost]:
    """Read ids [1, T] through every cache, then decode in turns.

    Args:
        caches: {name: maker of a fresh cache}; give some the final length T + rounds * tokens + 1 as `reserve`.
        tokens: decoded by each contestant in each round; rounds: interleaved, 1 or more.
        prefills: how often the prompt is read by each, interleaved; only the last one's cache is decoded from.
        chunk: tokens at most in one pass of the prompt; None reads it at once.
        inside: {name: maker of a block that this contestant runs in}, such as `lambda: fast_matmul(model)`.

    Raises:
        ValueError: no caches, or numbers below 1.
    """
    if not caches or min(tokens, rounds, prefills) < 1 or ids.shape[0] != 1:
        raise ValueError(
            f"{len(caches)} caches, {tokens} tokens, {rounds} rounds, {prefills} prefills of {ids.shape[0]} rows were "
            "asked for; allowed are 1 row, and 1 or more of each of the others."
        )
    ids, inside = ids.to(model.device), inside or {}
    reads: dict[str, list[float]] = {name: [] for name in caches}
    decodes: dict[str, list[float]] = {name: [] for name in caches}
    peaks: dict[str, int | None] = {}
    held: dict[str, tuple[Cache, Tensor]] = {}
    steps = len(caches) * (prefills + rounds)
    with torch.no_grad(), tqdm(total=steps, desc="cost", disable=hidden(), leave=False) as bar:
        for turn in range(prefills):
            for name, make in caches.items():
                held.pop(name, None)
                with inside.get(name, nullcontext)(), _peak(model.device) as grown:
                    cache = make()
                    start = _clock(model.device)
                    last = _read(model, cache, ids, chunk)
                    reads[name].append(_clock(model.device) - start)
                    if turn == prefills - 1:
                        last, _ = _decode(model, cache, last, tokens)
                        held[name] = (cache, last)
                peaks[name] = grown()
                del cache
                bar.update()
        for _ in range(rounds):
            for name, (cache, last) in held.items():
                with inside.get(name, nullcontext)():
                    last, seconds = _decode(model, cache, last, tokens)
                held[name] = (cache, last)
                decodes[name].append(seconds / tokens)
                bar.update()
    at = ids.shape[1]
    return [_cost(name, at, tokens, reads[name], decodes[name], held[name][0], peaks[name]) for name in caches]


def _cost(
    name: str, at: int, tokens: int, reads: list[float], decodes: list[float], cache: Cache, peak: int | None
) -> Cost:
    middle = statistics.median
    return Cost(name, at, tokens, middle(reads), middle(decodes), reads, decodes, bytes_of(cache), peak)


def _read(model: "PreTrainedModel", cache: Cache, ids: Tensor, chunk: int | None) -> Tensor:
    logits = None
    with _door(model, cache):
        for part in ids.split(chunk or ids.shape[1], 1):
            logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    assert logits is not None
    return logits[:, -1:].argmax(-1)


def _door(model: "PreTrainedModel", cache: Cache) -> "AbstractContextManager[Any]":
    """Peers run in the model as it is."""
    return caching(model) if isinstance(cache, KVCache) else nullcontext()


def _decode(model: "PreTrainedModel", cache: Cache, last: Tensor, tokens: int) -> tuple[Tensor, float]:
    with _door(model, cache):
        start = _clock(model.device)
        for _ in range(tokens):
            logits = model(input_ids=last, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            last = logits[:, -1:].argmax(-1)
        return last, _clock(model.device) - start


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _peak:
    """By how many bytes memory grew at most inside the block; calling what is bound gives it afterwards."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = 0
        self.most: int | None = None

    def __enter__(self) -> "Callable[[], int | None]":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.before = _reset_peak()
        return lambda: self.most

    def __exit__(self, *_: Any) -> None:
        if self.device.type == "cuda":
            self.most = torch.cuda.max_memory_allocated(self.device) - self.before
        elif self.before:
            self.most = _status("VmHWM") - self.before


def _reset_peak() -> int:
    """Let Linux count this process's peak anew; its resident bytes now, 0 where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return 0


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
