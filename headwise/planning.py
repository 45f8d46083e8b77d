"""Making a plan: rank the KV heads, choose by what a few prompts keep, and let a test on other prompts decide.

1. Rankings: scores that say which KV heads fetch things from far back, alone and fused into one.
2. Choice: for each ranking a cache of the wanted size answers dev prompts; for the best ranking, so does one for each
   further way of treating the other heads.
3. Trial: on prompts that nothing was chosen by, the full cache, the plan, random heads and streaming of equal bytes.
"""

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from headwise import quality, stats
from headwise.kv_cache import CacheMethod, KVCache, kv_units
from headwise.matmul import fast_matmul
from headwise.method import load
from headwise.plan import Plan, Trial, as_data, held_share, kv_values, named_method
from headwise.progress import hidden
from headwise.recall import retrieval
from headwise.score import Score, provenance

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headwise.atlas import Atlas
    from headwise.quality import Quality
    from headwise.task import Batch

log = logging.getLogger(__name__)

# Fields of a method, its task, the task's fields, prompts.
Ranking = tuple[dict[str, Any], str, dict[str, Any], int]
# By method. What each needs is small, so that a plan takes minutes.
RANKINGS: dict[str, Ranking] = {
    "duo_gate": ({"steps": 20, "lr": 0.2}, "passkeys", {"length": 300, "passkeys": 4, "asked": 4}, 4),
    "reach": ({}, "held_out", {"length": 512}, 2),
    "razor_induction": ({}, "repeated_tokens", {"length": 256}, 4),
    "retrieval": ({}, "needle", {"length": 500}, 9),
    "need": ({}, "key_values", {"length": 500, "pairs": 4, "asked": 4}, 2),
}
# Gates see what two heads do alike, reach what looks far back anyway; need, what is lost at once.
USUAL = ("duo_gate", "reach", "need")
# In a fused ranking a head is worth the sum of 1 / (SMOOTH + rank): what one score puts first counts, and the order in
# which it puts the rest hardly does. Need says much about few heads and nothing about most (docs/LOG.md).
SMOOTH = 10
KEEP, LOSS = 0.95, 0.05
# Prompts of each task by which heads are chosen.
DEV = 4
RULE = (
    f"On prompts that chose nothing, at least {KEEP:.0%} of the answers that the full cache gets right are right too, "
    f"and held-out text loses at most {LOSS} nats a token."
)


@dataclass(frozen=True)
class Making:
    """How a plan is made.

    Attributes:
        bytes: key-value bytes at `at` tokens, as a share of what keeping everything takes, above 0, at most 1.
        at: tokens for which the bytes are counted.
        test_at: tokens of the prompts of choice and trial.
        then: what a chosen head gets; rest: what the others may get; rankings are compared with the first.
        rankings: scores to choose by, names of RANKINGS: all fused, and each alone.
        thorough: more prompts in the trial.
    """

    bytes: float = 0.4
    at: int = 8192
    test_at: int = 1024
    then: CacheMethod = field(default_factory=lambda: named_method("preallocated"))
    rest: Sequence[CacheMethod] = field(default_factory=lambda: (named_method("duo"), named_method("duo:whole=true")))
    rankings: tuple[str, ...] = USUAL
    seed: int = 0
    thorough: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.bytes <= 1:
            raise ValueError(
                f"bytes is {self.bytes}; it is a share of the full cache, above 0 and at most 1: there are no more."
            )
        if self.at < 1 or self.test_at < 64:
            raise ValueError(
                f"at is {self.at} and test_at {self.test_at}; allowed are at >= 1 and test_at >= 64 tokens."
            )
        if not self.rankings:
            raise ValueError(f"No ranking was named; allowed are {', '.join(RANKINGS)}.")
        unknown = [name for name in self.rankings if name not in RANKINGS]
        if unknown:
            raise ValueError(f"There is no ranking {unknown[0]!r}; allowed are {', '.join(RANKINGS)}.")


def make_plan(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    making: Making | None = None,
    atlas: "Atlas | None" = None,
) -> Plan:
    """A plan for this model, tried on it. Scores that the atlas has are not made again, and new ones are kept there.

    Raises:
        ValueError: fewer bytes than the treatment of every head takes, or no ranking could be made.
    """
    making = making or Making()
    counts = {method: count_full(model, making, method) for method in making.rest}
    scores, skipped = _scores(model, tokenizer, making, atlas)
    if not scores:
        raise ValueError(f"No ranking of KV heads could be made: {' '.join(skipped.values())}")
    with fast_matmul(model):
        best, tried = _choose(model, tokenizer, making, orders(model, scores), counts)
    evidence = {unit: {name: round(values[unit], 6) for name, values in scores.items()} for unit in kv_units(model)}
    about = {
        "bytes": making.bytes,
        "at": making.at,
        "test_at": making.test_at,
        "seed": making.seed,
        "ranking": best.ranking,
        "dev": {choice.name: round(float(choice.right), 4) for choice in tried},
        "stopped": [choice.name for choice in tried if len(choice.lost) < len(best.lost)],
        "skipped": skipped,
        "when": _now(),
    }
    plan = Plan.of(model, {"rest": best.rest, "full": making.then}, dict.fromkeys(best.full, "full"), evidence=evidence)
    plan = replace(plan, about=about)
    return replace(plan, trial=try_plan(model, tokenizer, plan, making))


@dataclass
class _Choice:
    """One way to fill the budget: these KV heads full, the rest treated so."""

    ranking: str
    rest: CacheMethod
    full: list[str]
    # What was lost at each prompt, in exact shares of all there is to win; fewer prompts than there are once it could
    # no longer win. `right` is then a bound.
    lost: list[Fraction] = field(default_factory=list)

    @property
    def right(self) -> Fraction:
        """Share of the tokens of answers that are right, each task counting the same."""
        return 1 - sum(self.lost, Fraction())

    @property
    def name(self) -> str:
        fields = ",".join(f"{k}={v}" for k, v in as_data(self.rest)["fields"].items())
        return f"{self.ranking} / {as_data(self.rest)['method']}({fields})"


def count_full(model: "PreTrainedModel", making: Making, rest: CacheMethod) -> int:
    """How many KV heads can be kept by `then` within the budget when the others get `rest`."""
    least, most = held_share(rest, making.at), held_share(making.then, making.at)
    if making.bytes < least:
        raise ValueError(
            f"{making.bytes:.0%} of the bytes at {making.at} tokens is less than {as_data(rest)['method']} takes when "
            f"it treats every head: {least:.1%}. Ask for more bytes, a longer text (at), or a smaller window."
        )
    total = len(kv_units(model))
    return total if most <= making.bytes else int((making.bytes - least) / (most - least) * total + 1e-9)


def _scores(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", making: Making, atlas: "Atlas | None"
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """{ranking: {KV head: value}}, and why others are left out."""
    found: dict[str, dict[str, float]] = {}
    skipped: dict[str, str] = {}
    for name in tqdm(dict.fromkeys(making.rankings), desc="rankings", disable=hidden(), leave=False):
        try:
            # Prompts of another seed than those of choice and trial.
            found[name] = kv_values(model, score_by(name, model, tokenizer, making.seed + 2000, atlas))
        except ValueError as problem:
            skipped[name] = str(problem)
            log.warning("ranking %s is left out: %s", name, problem)
    return found, skipped


def score_by(
    name: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    atlas: "Atlas | None" = None,
    ranking: Ranking | None = None,
) -> Score:
    """Score the KV heads by a method on prompts made for it, from the atlas where it was made before.

    Args:
        name: of the method, as in RANKINGS.
        seed: of the prompts. ranking: fields, task and prompts in place of those in RANKINGS.

    Raises:
        ValueError: what the method or the task says of this model.
    """
    fields, task, about, n = ranking or RANKINGS[name]
    maker: Any = load(f"data.{task}")(**about)
    batch = maker.make(tokenizer, n, seed).to(model.device)
    method: Any = load(f"heads.{name}")(**fields)
    known = atlas.made(provenance(method, model, batch)) if atlas else None
    if known is not None:
        return known
    score: Score = method.score(model, batch)
    if atlas is not None:
        atlas.add(score)
    return score


def orders(model: "PreTrainedModel", scores: Mapping[str, Mapping[str, float]]) -> dict[str, list[str]]:
    """{ranking: KV heads, the first to be kept first}: by all fused, and by each.

    Fused by reciprocal ranks (Cormack, Clarke and Buettcher, SIGIR 2009); heads of equal value share their mean rank.
    """
    units = kv_units(model)
    order = {name: sorted(units, key=lambda unit: -values[unit]) for name, values in scores.items()}
    if len(order) == 1:
        return order
    ranks = [stats.ranks([-values[unit] for unit in units]) for values in scores.values()]
    # Summed exactly, so that it does not matter which ranking was named first.
    worth = {unit: math.fsum(1 / (SMOOTH + one[i]) for one in ranks) for i, unit in enumerate(units)}
    return {" + ".join(order): sorted(units, key=lambda unit: -worth[unit])} | order


def _choose(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    making: Making,
    ordered: Mapping[str, list[str]],
    counts: Mapping[CacheMethod, int],
) -> tuple[_Choice, list[_Choice]]:
    """The choice whose cache gets most tokens of the dev answers right, the earlier where two are equal; and all tried.

    Rankings are compared with the first treatment of the rest, and the other treatments with the best ranking only.
    One that can no longer win is not tried further. Prompts at which the first did worst come first, as they tell most.
    """
    first, *others = making.rest
    tried = [_Choice(name, first, order[: counts[first]]) for name, order in ordered.items()]
    best, total = tried[0], len(tried) + len(others)
    if total == 1:
        return best, tried
    exam = _exam(tokenizer, making)
    with tqdm(total=total * len(exam), desc="choosing", disable=hidden(), leave=False) as bar:

        def examine(choice: _Choice, beat: Fraction | None) -> _Choice:
            _examine(model, tokenizer, making, choice, exam, beat, bar.update)
            return choice

        examine(best, None)
        exam = [exam[i] for i in sorted(range(len(exam)), key=lambda i: -best.lost[i])]
        for choice in tried[1:]:
            best = max(best, examine(choice, best.right), key=lambda one: one.right)
        for rest in others:
            tried.append(_Choice(best.ranking, rest, ordered[best.ranking][: counts[rest]]))
            best = max(best, examine(tried[-1], best.right), key=lambda one: one.right)
    return best, tried


def _exam(tokenizer: "PreTrainedTokenizerBase", making: Making) -> "list[tuple[Batch, Fraction]]":
    """The dev prompts one by one, and what the answers of each are worth: all tasks the same, together 1."""
    batches = quality.prompts(tokenizer, making.test_at, making.seed + 1000, quick=True)
    asked = {name: min(DEV, len(batches[name])) for name in quality.RETRIEVAL}
    return [
        (batches[name].take([row]), Fraction(1, len(asked) * count))
        for name, count in asked.items()
        for row in range(count)
    ]


def _examine(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    making: Making,
    choice: _Choice,
    exam: "Sequence[tuple[Batch, Fraction]]",
    beat: Fraction | None,
    step: Callable[[int], Any],
) -> None:
    """Answer prompt by prompt through the cache of a choice, until it cannot be more than `beat` any more."""
    rest = dict.fromkeys(set(kv_units(model)) - set(choice.full), choice.rest)
    cache = _maker(model, rest, making.test_at, making.then)
    for prompt, worth in exam:
        if beat is not None and choice.right <= beat:
            break
        right = retrieval(model, tokenizer, prompt, cache, forced=True, step=lambda: step(1)).tokens
        choice.lost.append(worth * Fraction(int((~right).sum()), right.numel()))
    step(len(exam) - len(choice.lost))


def try_plan(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", plan: Plan, making: Making | None = None
) -> Trial:
    """The acceptance test of a plan: full cache, plan, two draws of random heads, and streaming of equal bytes."""
    making = making or Making()
    caches = {"full": None, **contestants(model, plan, making)}
    with fast_matmul(model):
        found = quality.compare(model, tokenizer, caches, making.test_at, making.seed, quick=not making.thorough)
    full, mine = found["full"], found["plan"]
    rows = [_row(name, one, full) for name, one in found.items()]
    kept = {name: one.kept(full) or 0.0 for name, one in found.items()}
    if mine.kept(full) is None:
        says = (
            f"With its full cache the model gets nothing right at {making.test_at} tokens, so what a plan keeps cannot "
            "be told; try it on shorter texts (test_at)."
        )
        return Trial(False, says, RULE, rows)
    rivals = [share for name, share in kept.items() if name.startswith("random")]
    loss = mine.nll - full.nll
    says = (
        f"The plan keeps {kept['plan']:.0%} of the full cache's right answers and loses {loss:+.3f} nats a token, at "
        f"{mine.bytes / full.bytes:.0%} of its bytes at {making.test_at} tokens; random heads of equal bytes keep "
        f"{sum(rivals) / len(rivals):.0%}, streaming of equal bytes {kept['streaming']:.0%}."
    )
    return Trial(kept["plan"] >= KEEP and loss <= LOSS, says, RULE, rows)


def contestants(model: "PreTrainedModel", plan: Plan, making: Making) -> "dict[str, Callable[[], KVCache]]":
    """The plan, random heads in its place (two draws), one window for all heads; all of equal bytes at `test_at`."""
    units = kv_units(model)
    treatments = plan.treatments()
    made: dict[str, Callable[[], KVCache]] = {"plan": _maker(model, treatments, making.test_at)}
    for draw in range(2):
        mixed = random.Random(f"random heads {making.seed} {draw}").sample(units, len(units))
        shuffled = dict(zip(mixed, (treatments[unit] for unit in units), strict=True))
        made[f"random {draw + 1}"] = _maker(model, shuffled, making.test_at)
    rest = next(iter(plan.legend.values()))
    sink = getattr(rest, "sink", 16)
    room = max(1, round(plan.share_of_bytes(making.test_at) * making.test_at) - sink)
    whole = getattr(rest, "whole", False)
    window = named_method(f"duo:sink={sink},recent={room},whole={'true' if whole else 'false'}")
    made["streaming"] = _maker(model, dict.fromkeys(units, window), making.test_at)
    return made


def _maker(
    model: "PreTrainedModel", treatments: Mapping[str, CacheMethod], reserve: int, others: CacheMethod | None = None
) -> "Callable[[], KVCache]":
    """Makers of caches with room for `reserve` tokens: bytes that are compared hold no slack of growing buffers."""
    everything = dict(treatments) if others is None else {**dict.fromkeys(kv_units(model), others), **treatments}
    return lambda: KVCache(model, everything, reserve)


def _row(name: str, one: "Quality", full: "Quality") -> dict[str, Any]:
    return {
        "name": name,
        "bytes": round(one.bytes),
        "share": round(one.bytes / full.bytes, 4),
        "kept": None if (kept := one.kept(full)) is None else round(kept, 4),
        "retrieval": round(one.retrieval, 4),
        "accuracy": {task: round(value, 4) for task, value in one.accuracy.items()},
        "n": dict(one.n),
        "nll": round(one.nll, 4),
        "at": one.at,
    }


def _now() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat(timespec="seconds")
