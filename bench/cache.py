"""KV caches side by side on the default model: seconds, bytes, peaks, answers, and identical tokens.

python bench/cache.py time [--lengths 2048 4096 8192]    decoding and prefill, contestants in turns in one process
python bench/cache.py memory [--length 8192] [--runs 5]  bytes of tensors and process peak, one process a contestant
python bench/cache.py same [--prompts 20]                tokens of the lossless cache, and with packed weights too
python bench/cache.py plan --plan FILE [--bytes 0.4] [--at 8192] [--length 1024]     makes a plan, timed, and writes it
python bench/cache.py quality --plan FILE [--length N] [--few]
                                                         answers: plan, random heads, streaming, SnapKV, Ada-KV, fp8
python bench/cache.py kvpress --plan FILE [--length N]   the same prompts through kvpress, beside what quality measured
Results go to bench/results/cache_*.json, times by the maker of the processor; bench/report.py makes docs/bench.md.
"""

import argparse
import importlib.util
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import env
import machine
import race
import torch
from transformers import QuantizedCache

from headwise import compiled, open_model, quality
from headwise.attach import treated
from headwise.bench import cost, dynamic, static
from headwise.cache.adakv import AdaKV
from headwise.cache.duo import Duo
from headwise.cache.preallocated import Preallocated
from headwise.cache.quantised import Quantised
from headwise.cache.snapkv import SnapKV
from headwise.data.held_out import HeldOut
from headwise.kv_cache import KVCache, kv_units
from headwise.matmul import FEW, blas_lags, fast_matmul
from headwise.packing import Packed
from headwise.plan import Plan

TOKENS, ROUNDS = 8, 21
# Peers with the products of `attach`; our caches without them; and our caches where there is no C compiler.
QUICK, ALONE, BY_PYTORCH = ", quick products", ", the model's products", ", read by PyTorch"
MEASURED = ("DynamicCache", "StaticCache", "all full", "50% full", "30% full")
# Tokens of short prompts and of the texts by which kvpress chooses heads, and how many of these it samples.
SHORT, TEXTS = 512, 50


def half(model, share: float, seed: int = 0) -> dict:
    """Treatments in which a share of the KV heads is full; which ones matters not for time and bytes."""
    units = kv_units(model)
    mixed = random.Random(f"bench cache {seed}").sample(units, len(units))
    return dict.fromkeys(mixed[round(share * len(units)) :], Duo())


def contestants(model, at: int) -> dict[str, Callable]:
    """Makers of caches that know their final length, as `generate` tells it."""
    most = at + TOKENS * (ROUNDS + 1) + 1
    made: dict[str, Callable] = {"DynamicCache": dynamic(model), "StaticCache": static(model, most)}
    made["all full"] = lambda: KVCache(model, {}, most)
    # What a step takes when attention has nothing to read: no cache can be faster.
    made["one token"] = lambda: KVCache(model, dict.fromkeys(kv_units(model), Duo(0, 1)), most)
    for share in (0.5, 0.3):
        made[f"{share:.0%} full"] = lambda share=share: KVCache(model, half(model, share), most)
    if blas_lags():
        for name in ("DynamicCache", "StaticCache"):
            made[name + QUICK] = made[name]
        for name in ("all full", "50% full"):
            made[name + ALONE] = made[name]
    if compiled.available():
        for name in ("all full", "50% full"):
            made[name + BY_PYTORCH] = made[name]
    return made


@contextmanager
def circumstances(model, name: str) -> Iterator[None]:
    """What a contestant's name says of products and of reading."""
    serves = compiled.serves
    with nullcontext() if name.endswith(("Cache", ALONE)) else fast_matmul(model, few=FEW):
        if name.endswith(BY_PYTORCH):
            compiled.serves = lambda *_: False
        try:
            yield
        finally:
            compiled.serves = serves


def text(tokenizer, at: int) -> torch.Tensor:
    """Held-out text [1, at]."""
    return quality.prompts(tokenizer, at)["text"].ids[:1, :at]


def about() -> dict:
    """Machine, versions, time."""
    return {"machine": machine.facts(), "versions": race.particulars_of_ours()}


def timing(lengths: list[int], prefills: int) -> None:
    """Decoding and prefill at each length; what was measured before at other lengths is kept."""
    model, tokenizer = open_model()
    kept = f"cache_time_{machine.maker()}"
    file = race.RESULTS / f"{kept}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for at in lengths:
        load = os.getloadavg()[0]
        caches = contestants(model, at)
        how = {"tokens": TOKENS, "rounds": ROUNDS, "prefills": prefills}
        inside = {name: lambda name=name: circumstances(model, name) for name in caches}
        found = cost(model, caches, text(tokenizer, at), inside=inside, **how)
        rows = [row for row in rows if row["at"] != at]
        rows += [{**asdict(one), "load": [round(load, 1), round(os.getloadavg()[0], 1)]} for one in found]
        race.save(kept, {**about(), "rows": rows})


def memory(length: int, runs: int, names: Sequence[str]) -> None:
    """Peak growth of a process that reads `length` tokens and decodes 64, one process a contestant, in turns."""
    rows = []
    for turn in range(runs):
        for name in names:
            done = subprocess.run(
                [sys.executable, __file__, "one", "--contestant", name, "--length", str(length)],
                capture_output=True,
                text=True,
                check=True,
            )
            rows.append({"turn": turn, **json.loads(done.stdout.splitlines()[-1])})
        race.save("cache_memory", {**about(), "length": length, "rows": rows})


def one(name: str, length: int) -> None:
    """One contestant of `memory`, printed as JSON."""
    model, tokenizer = open_model()
    ids = text(tokenizer, length)
    made = contestants(model, length)[name]
    cost(model, {"warm": dynamic(model)}, ids[:, :64], tokens=1, rounds=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (found,) = cost(model, {name: made}, ids, tokens=32, rounds=1, chunk=1024)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"name": name, "bytes": found.bytes, "peak": found.peak, "maxrss_grew": (after - before) * 1024}))


def same(prompts: int) -> None:
    """Greedy tokens of plain generate and of the lossless cache, on prompts of 100 to 1500 tokens, in float32."""
    model, tokenizer = open_model()
    packed, lengths = Packed(model), []
    equal = dict.fromkeys(("identical", "packed"), 0)
    draw = random.Random("same")
    for seed in range(prompts):
        length = draw.randint(100, 1500)
        ids = quality.prompts(tokenizer, max(256, length), seed)["text"].ids[:1, :length]
        how = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        plain = model.generate(ids, **how)
        with treated(model, Preallocated()):
            equal["identical"] += int(torch.equal(plain, model.generate(ids, **how)))
            with packed:
                equal["packed"] += int(torch.equal(plain, model.generate(ids, **how)))
        lengths.append(length)
    race.save("cache_same", {**about(), "prompts": prompts, "tokens": 64, **equal, "lengths": lengths})


def answers(plan_file: str, length: int, thorough: bool, few: bool) -> None:
    """Answers kept by the plan and by what the field would use, at equal bytes. `few`: contestants of a trial only."""
    from headwise.planning import Making
    from headwise.planning import contestants as rivals

    model, tokenizer = open_model()
    plan = Plan.load(plan_file)
    plan.check(model)
    units = kv_units(model)
    share = plan.share_of_bytes(length)
    room = round(share * length)
    caches: dict[str, Callable | None] = {"full": None, **rivals(model, plan, Making(test_at=length))}
    if not few:
        if importlib.util.find_spec("torchao"):
            coded = {unit: Quantised(8, method) for unit, method in plan.treatments().items()}
            caches["plan, 8 bits"] = lambda: KVCache(model, coded, length)
            caches["full, 8 bits"] = lambda: KVCache(model, dict.fromkeys(units, Quantised(8)), length)
        config = model.config.get_text_config(decoder=True)
        caches["QuantizedCache, fp8"] = lambda: QuantizedCache("fp8", config)
        caches["SnapKV"] = lambda: KVCache(model, dict.fromkeys(units, SnapKV(capacity=room)), length)
        caches["Ada-KV"] = lambda: KVCache(model, dict.fromkeys(units, AdaKV(capacity=room)), length)
    batches = quality.prompts(tokenizer, length, 7, quick=not thorough)
    found = quality.compare(model, tokenizer, caches, length, 7, given=batches)
    rows = [
        {
            "name": name,
            "bytes": round(one.bytes),
            "share": one.bytes / found["full"].bytes,
            "kept": one.kept(found["full"]),
            "accuracy": one.accuracy,
            "n": one.n,
            "nll": one.nll,
        }
        for name, one in found.items()
    ]
    full = {SHORT: alone(model, tokenizer, thorough), length: found["full"].accuracy}
    result = {**about(), "plan": plan.count(), "heads": plan.heads, "length": length, "full": full, "rows": rows}
    peers_of = {name: value for name, value in measured(plan, length).items() if name in ("kvpress", "read")}
    race.add("cache_quality", result | peers_of, by=("length",))


def measured(plan: Plan, length: int) -> dict:
    """The answers that were measured last at this length, where they are of these full heads; else nothing."""
    alike = (one for one in race.entries("cache_quality") if (one["heads"], one["length"]) == (plan.heads, length))
    return next(alike, {})


def peers(plan_file: str, length: int, thorough: bool) -> None:
    """The prompts of `answers` through kvpress; its rows go beside those of this plan and length."""
    model, tokenizer = open_model()
    plan = Plan.load(plan_file)
    plan.check(model)
    found = measured(plan, length)
    if not found:
        raise SystemExit(f"There are no answers of this plan at {length} tokens yet; run quality first.")
    new: dict = {"heads": plan.heads}
    if "full" not in found:
        new["full"] = {SHORT: alone(model, tokenizer, thorough), length: found["rows"][0]["accuracy"]}
    batches = quality.prompts(tokenizer, length, 7, quick=not thorough)
    new["kvpress"] = in_kvpress(plan, tokenizer, batches, round(plan.share_of_bytes(length) * length) / length)
    new["read"] = {"texts": TEXTS, "tokens": SHORT, "when": time.strftime("%Y-%m-%d %H:%M")}
    race.add("cache_quality", found | new, by=("length",))


def alone(model, tokenizer, thorough: bool) -> dict[str, float]:
    """{task: share of answers that the full cache gets right} on shorter prompts."""
    batches = quality.prompts(tokenizer, SHORT, 7, quick=not thorough)
    asked = {task: batches[task] for task in quality.RETRIEVAL}
    return quality.compare(model, tokenizer, {"full": None}, SHORT, 7, given=asked)["full"].accuracy


def parts_of(batch, row: int) -> list:
    """[context, [[question, answer], ...]] as token ids; each question begins behind the last answer before it."""
    mask = batch.inputs.get("attention_mask")
    pads = 0 if mask is None else int((mask[row] == 0).sum())
    ids, columns = batch.ids[row, pads:].tolist(), [int(column) - pads for column in batch.at[row]]
    start = int(batch.spans["question"][row, 0]) - pads if "question" in batch.spans else columns[0]
    start = min(start, columns[0])
    asked, begin = [], start
    runs = [[0]]
    for i in range(1, len(columns)):
        if columns[i] == columns[i - 1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    for run in runs:
        asked.append([ids[begin : columns[run[0]] + 1], [int(batch.answer[row, i]) for i in run]])
        begin = columns[run[-1]] + 2
    return [ids[:start], asked]


def planning(share: float, at: int, test_at: int, out: str) -> None:
    """How long a plan takes, causal check and trial included, and what the trial says; no score is kept from before."""
    from headwise.planning import Making, make_plan

    model, tokenizer = open_model()
    start, busy = time.perf_counter(), time.process_time()
    plan = make_plan(model, tokenizer, Making(bytes=share, at=at, test_at=test_at))
    took = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - busy}
    plan.save(out)
    assert plan.trial is not None
    told = {"bytes": share, "at": at, "test_at": test_at, "ranking": plan.about["ranking"], "dev": plan.about["dev"]}
    made = {**about(), **took, **told, "trial": asdict(plan.trial), "count": plan.count()}
    race.add("cache_plan", made, by=("bytes", "at", "test_at"))


def in_kvpress(plan: Plan, tokenizer, batches: dict, share: float) -> dict:
    """The same prompts through kvpress, in its own environment: the same head mask, and its own presses."""
    from headwise.models import default_model_path

    python = env.python_of("kvpress", env.folder_of(None))
    tasks = {}
    for task in quality.RETRIEVAL:
        batch = batches[task]
        tasks[task] = [parts_of(batch, row) for row in range(len(batch))]
    full = [unit for unit, name in plan.heads.items() if name == "full"]
    texts = HeldOut(length=SHORT).make(tokenizer, TEXTS, seed=1).texts
    given = {"model": str(default_model_path()), "tasks": tasks, "full": full, "share": share, "texts": texts}
    with tempfile.TemporaryDirectory() as room:
        file = Path(room) / "given.json"
        file.write_text(json.dumps(given))
        worker = Path(__file__).parent / "kvpress_worker.py"
        done = subprocess.run([python, str(worker), str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"kvpress failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("time", "memory", "one", "same", "plan", "quality", "kvpress"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--length", type=int, default=0, help="tokens; 8192 for memory, else 1024")
    parser.add_argument("--prefills", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--contestant", default="", help="of one")
    parser.add_argument("--contestants", nargs="+", choices=MEASURED, default=MEASURED, help="of memory")
    parser.add_argument("--runs", type=int, default=5, help="of memory, of each contestant")
    parser.add_argument("--plan")
    parser.add_argument("--bytes", type=float, default=0.4)
    parser.add_argument("--at", type=int, default=8192, help="tokens for which the bytes of a plan are counted")
    parser.add_argument("--thorough", action="store_true")
    parser.add_argument("--few", action="store_true", help="quality of the contestants of a plan's trial only")
    given = parser.parse_args()
    if given.plan is None and given.job in ("plan", "quality", "kvpress"):
        parser.error(f"{given.job} needs --plan FILE.")
    if given.job == "time":
        timing(given.lengths, given.prefills)
    elif given.job == "memory":
        memory(given.length or 8192, given.runs, given.contestants)
    elif given.job == "one":
        one(given.contestant, given.length or 8192)
    elif given.job == "same":
        same(given.prompts)
    elif given.job == "plan":
        planning(given.bytes, given.at, given.length or 1024, given.plan)
    elif given.job == "kvpress":
        peers(given.plan, given.length or 1024, given.thorough)
    else:
        answers(given.plan, given.length or 1024, given.thorough, given.few)


if __name__ == "__main__":
    main()
