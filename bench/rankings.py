"""What each ranking of KV heads costs, and what a cache keeps whose full heads it chose, all of equal bytes.

python bench/rankings.py [--bytes 0.4 0.25] [--length 1024] [--seeds 4 5 6] [--rounds 5]
python bench/rankings.py --seconds      takes the time of the scores once more and puts it beside those taken before

Beside the rankings that a plan is made of stands DuoAttention's own recipe, gates that act from the first token on: on
the prompts and in the steps of a plan's gates, and on more prompts in more steps. Each ranking is scored alone and
timed, all in turns; then caches by each answer the same prompts, which chose nothing. Results go to
bench/results/cache_rankings.json; bench/report.py makes docs/bench.md.
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
WITHOUT = tuple(name for name in planning.USUAL if name != "need")
# {name: method, how it is made}.
JOBS: dict[str, tuple[str, planning.Ranking]] = {name: (name, planning.RANKINGS[name]) for name in planning.USUAL}
FIELDS, *GIVEN = planning.RANKINGS["duo_gate"]
LONG = {"steps": 50, "lr": 0.1, "whole": False}, "passkeys", {"length": 500, "passkeys": 2, "asked": 2}, 16
JOBS[f"{RECIPE}, {FIELDS['steps']} steps"] = "duo_gate", ({**FIELDS, "whole": False}, *GIVEN)
JOBS[f"{RECIPE}, {LONG[0]['steps']} steps"] = "duo_gate", LONG


def scored(model, tokenizer) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """{ranking: {KV head: value}} and {ranking: seconds}, the making of prompts included."""
    found, seconds = {}, {}
    for name, (method, ranking) in tqdm(JOBS.items(), desc="rankings"):
        start = time.perf_counter()
        found[name] = kv_values(model, planning.score_by(method, model, tokenizer, 2000, ranking=ranking))
        seconds[name] = time.perf_counter() - start
    return found, seconds


def fused(model, scores: dict[str, dict[str, float]]) -> dict[str, list[str]]:
    """{ranking: KV heads}: those of a plan, and without need, which takes about half of the time."""
    made = [planning.orders(model, {name: scores[name] for name in names}) for names in (planning.USUAL, WITHOUT)]
    return {name: order for orders in made for name, order in orders.items()}


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
    parser.add_argument("--seeds", type=int, nargs="+", default=[4, 5, 6])
    parser.add_argument("--rounds", type=int, default=5, help="of the scores' times")
    parser.add_argument("--seconds", action="store_true", help="of the scores, one round more; nothing else")
    given = parser.parse_args()
    # As it reads in a file of results, to be compared with one.
    jobs = json.loads(json.dumps(JOBS))
    before = {}
    if given.seconds:
        before = json.loads((race.RESULTS / "cache_rankings.json").read_text())
        if jobs != before["jobs"]:
            raise SystemExit("The recorded rankings had other fields or prompts; measure again without --seconds.")
    model, tokenizer = open_model()
    facts = {"machine": machine.facts(), "versions": race.particulars_of_ours()}
    took: dict[str, list[float]] = before.get("seconds", {})
    timed: list[str] = before.get("timed", [])
    for _ in range(1 if before else given.rounds):
        timed.append(time.strftime("%Y-%m-%d %H:%M"))
        scores, seconds = scored(model, tokenizer)
        orders = fused(model, scores)
        seconds |= {name: sum(seconds[one] for one in name.split(" + ")) for name in orders if " + " in name}
        for name, one in seconds.items():
            took.setdefault(name, []).append(one)
        print({name: round(one, 1) for name, one in seconds.items()}, flush=True)
    if before:
        race.save("cache_rankings", {**before, "seconds": took, "timed": timed})
        return
    units = kv_units(model)
    orders |= {name: sorted(units, key=lambda unit: -one[unit]) for name, one in scores.items()}
    with fast_matmul(model):
        budgets = [kept(model, tokenizer, orders, share, given.length, given.seeds) for share in given.bytes]
    told = {"length": given.length, "seeds": given.seeds, "jobs": jobs, "timed": timed}
    race.save("cache_rankings", {**facts, **told, "seconds": took, "budgets": budgets})


if __name__ == "__main__":
    main()
