"""What each ranking of KV heads costs, and what a cache keeps whose full heads it chose, all of equal bytes.

python bench/rankings.py [--bytes 0.4] [--length 1024] [--seeds 0 1]

Beside the rankings that a plan is made of stands DuoAttention's own recipe on the same prompts and as many steps: gates
that act from the first token on. Each ranking is scored alone and timed; then all answer the same prompts, which chose
nothing. Results go to bench/results/cache_rankings.json; bench/report.py makes docs/bench.md.
"""

import argparse
import time
from typing import Any

import machine
import race
from tqdm.auto import tqdm

from headwise import open_model, planning, quality
from headwise.kv_cache import KVCache, kv_units
from headwise.matmul import fast_matmul
from headwise.method import load
from headwise.plan import kv_values

RECIPE = "DuoAttention's recipe"


def scored(model, tokenizer) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """{ranking: {KV head: value}} and {ranking: seconds}, the making of prompts included."""
    jobs = dict(planning.RANKINGS)
    fields, *prompts = jobs["duo_gate"]
    jobs[RECIPE] = ({**fields, "whole": False}, *prompts)
    found, seconds = {}, {}
    for name, (fields, task, about, n) in tqdm(jobs.items(), desc="rankings"):
        start = time.perf_counter()
        maker: Any = load(f"data.{task}")(**about)
        method: Any = load(f"heads.{'duo_gate' if name == RECIPE else name}")(**fields)
        found[name] = kv_values(model, method.score(model, maker.make(tokenizer, n, 2000)))
        seconds[name] = time.perf_counter() - start
    return found, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, default=0.4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    model, tokenizer = open_model()
    making = planning.Making(bytes=given.bytes, test_at=given.length)
    scores, seconds = scored(model, tokenizer)
    orders = planning._orders(model, {name: one for name, one in scores.items() if name != RECIPE})
    (together,) = (name for name in orders if " + " in name)
    seconds[together] = sum(seconds[name] for name in together.split(" + "))
    orders[RECIPE] = sorted(kv_units(model), key=lambda unit: -scores[RECIPE][unit])
    rest = making.rest[0]
    count = planning._count(model, making, rest)
    caches: dict[str, Any] = {"full": None}
    for name, order in orders.items():
        streaming = dict.fromkeys(order[count:], rest)
        caches[name] = lambda streaming=streaming: KVCache(model, streaming, given.length)
    rows = {name: {"seconds": seconds.get(name), "kept": [], "loss": []} for name in caches}
    with fast_matmul(model):
        for seed in given.seeds:
            found = quality.compare(model, tokenizer, caches, given.length, seed)
            for name, one in found.items():
                rows[name]["kept"].append(one.kept(found["full"]))
                rows[name]["loss"].append(one.nll - found["full"].nll)
                rows[name].setdefault("answers", 0)
                rows[name]["answers"] += sum(sum(right) for right in one.right.values())
    asked = sum(sum(map(len, one.right.values())) for one in found.values()) // len(found) * len(given.seeds)
    told = {"bytes": given.bytes, "length": given.length, "seeds": given.seeds, "full": count, "asked": asked}
    told["steps"] = load("heads.duo_gate")().steps
    facts = {"machine": machine.facts(), "versions": race.particulars_of_ours()}
    race.save("cache_rankings", {**facts, **told, "rows": rows})


if __name__ == "__main__":
    main()
