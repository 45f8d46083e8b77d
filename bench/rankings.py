"""What each ranking of KV heads costs, and what a cache keeps whose full heads it chose, all of equal bytes.

python bench/rankings.py [--bytes 0.4 0.25] [--length 1024] [--seeds 2 3]
python bench/rankings.py --seconds      takes the time of the scores once more and puts it beside those taken before

Beside the rankings that a plan can be made of stands DuoAttention's own recipe on the same prompts and as many steps:
gates that act from the first token on. Each ranking is scored alone and timed; then caches by each answer the same
prompts, which chose nothing. Results go to bench/results/cache_rankings.json; bench/report.py makes docs/bench.md.
"""

import argparse
import json
import time
from typing import Any

import machine
import race
from tqdm.auto import tqdm

from headwise import open_model, planning, quality
from headwise.kv_cache import KVCache, kv_units
from headwise.matmul import fast_matmul
from headwise.plan import kv_values

RECIPE = "DuoAttention's recipe"


def scored(model, tokenizer) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """{ranking: {KV head: value}} and {ranking: seconds}, the making of prompts included."""
    jobs: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in planning.RANKINGS}
    jobs[RECIPE] = ("duo_gate", {"whole": False})
    found, seconds = {}, {}
    for name, (ranking, fields) in tqdm(jobs.items(), desc="rankings"):
        start = time.perf_counter()
        found[name] = kv_values(model, planning.score_by(ranking, model, tokenizer, 2000, **fields))
        seconds[name] = time.perf_counter() - start
    return found, seconds


def kept(model, tokenizer, orders: dict[str, list[str]], share: float, length: int, seeds: list[int]) -> dict:
    """What caches keep of so many bytes whose full heads come first in each order."""
    making = planning.Making(bytes=share, test_at=length)
    rest = making.rest[0]
    count = planning.count_full(model, making, rest)
    caches: dict[str, Any] = {"full": None}
    for name, order in orders.items():
        streaming = dict.fromkeys(order[count:], rest)
        caches[name] = lambda streaming=streaming: KVCache(model, streaming, length)
    rows: dict[str, dict] = {name: {"kept": [], "loss": [], "right": 0} for name in caches}
    asked = 0
    for seed in seeds:
        found = quality.compare(model, tokenizer, caches, length, seed)
        for name, one in found.items():
            rows[name]["kept"].append(one.kept(found["full"]))
            rows[name]["loss"].append(one.nll - found["full"].nll)
            rows[name]["right"] += sum(sum(right) for right in one.right.values())
        asked += sum(len(right) for right in found["full"].right.values())
    return {"bytes": share, "full": count, "asked": asked, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, nargs="+", default=[0.4, 0.25])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--seconds", action="store_true", help="of the scores, once more; nothing else")
    given = parser.parse_args()
    rankings = {
        "steps": planning.RANKINGS["duo_gate"][0]["steps"],
        "prompts": {name: n for name, (*_, n) in planning.RANKINGS.items()},
    }
    before = {}
    if given.seconds:
        before = json.loads((race.RESULTS / "cache_rankings.json").read_text())
        if rankings != {name: before[name] for name in rankings}:
            raise SystemExit("The recorded rankings had other steps or prompts; measure them again without --seconds.")
    model, tokenizer = open_model()
    facts = {"machine": machine.facts(), "versions": race.particulars_of_ours()}
    scores, seconds = scored(model, tokenizer)
    orders = planning.orders(model, {name: scores[name] for name in planning.USUAL})
    seconds |= {name: sum(seconds[one] for one in name.split(" + ")) for name in orders if " + " in name}
    if before:
        took = {name: [*before["seconds"][name], one] for name, one in seconds.items()}
        race.save("cache_rankings", {**before, "seconds": took})
        return
    units = kv_units(model)
    orders |= {name: sorted(units, key=lambda unit: -one[unit]) for name, one in scores.items()}
    with fast_matmul(model):
        budgets = [kept(model, tokenizer, orders, share, given.length, given.seeds) for share in given.bytes]
    took = {name: [one] for name, one in seconds.items()}
    told = {"length": given.length, "seeds": given.seeds, **rankings}
    race.save("cache_rankings", {**facts, **told, "seconds": took, "budgets": budgets})


if __name__ == "__main__":
    main()
