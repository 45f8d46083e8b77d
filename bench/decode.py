"""Decoding with drafts side by side on the default model: seconds, tokens a pass, and identical tokens.

python bench/decode.py speed [--requests 50] [--tokens 64] [--rounds 5] [--only NAME ...] [--packed]
    answers that repeat a text and answers that do not: plain greedy, transformers' prompt lookup, CopySpec, copying by
    heads; contestants in turns in one process; with --packed each once more with packed weights
python bench/decode.py plan --plan FILE [--requests 50] [--tokens 64] [--rounds 5]
    answers that repeat a text: the plan alone, plan + CopySpec, plain greedy, and CopySpec by itself
python bench/decode.py batch [--requests 48] [--rows 4]
    the same, requests padded on the left in batches, against plain greedy of the same batches and row by row
Results go to bench/results/decode_*.json; docs/bench.md is made from them by bench/report.py.
"""

import argparse
import json
import os
from dataclasses import asdict, replace

import machine
import race
import torch

from headwise import decode, open_model
from headwise.data.requests import copying, open_ended
from headwise.decoding import Way, compare, usual, with_heads
from headwise.packing import Packed
from headwise.plan import Plan
from headwise.verifying import DraftMethod

KINDS = {"repeats": copying, "open": open_ended}
SHORT = 10
SEED = 1  # drafters were tuned on the requests of seed 0


def methods(model, tokenizer) -> dict[str, DraftMethod]:
    """The drafters of this project that need no training."""
    heads = with_heads(decode.HeadCopying(), model, tokenizer)
    long = decode.HeadCopying(heads=heads.heads, tokens=decode.CopySpec().tokens)
    return {
        "CopySpec": decode.CopySpec(),
        "CopySpec, the paper's rule": decode.CopySpec(near=0),
        f"CopySpec, {SHORT} tokens": decode.CopySpec(tokens=SHORT),
        "CopySpec, paced": decode.Paced(decode.CopySpec()),
        "copying by heads": heads,
        "copying by heads, paced": decode.Paced(long),
        "CopySpec, else heads, paced": decode.Paced(decode.Either(decode.CopySpec(), long)),
        "prompt lookup, our loop": decode.PromptLookup(),
    }


def about(**how) -> dict:
    """Machine, versions, and how it was measured."""
    return {"machine": machine.facts(), "versions": race.particulars_of_ours(), "how": how}


def timed(name: str, model, tokenizer, ways: dict[str, Way], rounds: int, tokens: int, sizes, parts: dict) -> None:
    """Every way on every part, in batches of each size; saved after each. Other kinds of requests stay as they were."""
    file, began = race.RESULTS / f"{name}.json", os.getloadavg()[0]
    rows = [row for row in json.loads(file.read_text())["rows"] if row["kind"] not in parts] if file.is_file() else []
    for kind, requests in parts.items():
        for size in sizes:
            found = compare(model, tokenizer, ways, requests, tokens=tokens, rounds=rounds, rows=size)
            rows += [{"kind": kind, **asdict(one), "tokens_per_second": one.tokens_per_second} for one in found]
            load = [round(began, 1), round(os.getloadavg()[0], 1)]
            race.save(
                name, {**about(tokens=tokens, rounds=rounds, load=load, threads=torch.get_num_threads()), "rows": rows}
            )


def asked(tokenizer, given) -> dict:
    """Requests whose answers repeat a text, and requests whose answers do not."""
    return {kind: KINDS[kind](tokenizer, given.requests, SEED) for kind in given.kinds}


def speed(given) -> None:
    """One row at a time."""
    model, tokenizer = open_model()
    drafts = {name: one for name, one in methods(model, tokenizer).items() if not given.only or name in given.only}
    ways = {**usual(), **{name: Way(method) for name, method in drafts.items()}}
    if given.packed:
        packed = Packed(model)
        ways |= {f"{name}, packed": replace(way, packed=packed) for name, way in ways.items()}
    timed("decode_speed", model, tokenizer, ways, given.rounds, given.tokens, (1,), asked(tokenizer, given))


def with_plan(given) -> None:
    """What drafts add to a plan. The plan alone is first, as plan + CopySpec has to give its texts."""
    model, tokenizer = open_model()
    plan = Plan.load(given.plan)
    plan.check(model)
    ways = {
        "plan": Way(treatments=plan.treatments()),
        "plan + CopySpec": Way(decode.CopySpec(), treatments=plan.treatments()),
        "greedy": Way(),
        "CopySpec": Way(decode.CopySpec()),
    }
    parts = {"repeats": copying(tokenizer, given.requests, SEED)}
    timed("decode_plan", model, tokenizer, ways, given.rounds, given.tokens, (1,), parts)


def batch(given) -> None:
    """Batches padded on the left; and the same requests one at a time."""
    model, tokenizer = open_model()
    ways = {"greedy": Way(), "CopySpec": Way(decode.CopySpec())}
    sizes, parts = (given.rows, 1), asked(tokenizer, given)
    timed("decode_batch", model, tokenizer, ways, given.rounds, given.tokens, sizes, parts)


def main() -> None:
    jobs = {"speed": speed, "plan": with_plan, "batch": batch}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=jobs)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS], help="speed and batch")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--plan", help="plan: the file of an accepted plan")
    parser.add_argument("--only", nargs="*", default=[], help="speed: drafters by their names in `methods`")
    parser.add_argument("--packed", action="store_true", help="speed: each contestant once more, with packed weights")
    given = parser.parse_args()
    if given.job == "plan" and not given.plan:
        parser.error("plan needs --plan FILE.")
    jobs[given.job](given)


if __name__ == "__main__":
    main()
