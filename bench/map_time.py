"""Wall time and peak memory of `headwise map` on the default model from nothing, and the time that opening it takes.

python bench/map_time.py [--opens 7] [--only-open]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import machine
import race

from headwise.models import default_model_path

OPEN = """
import json, time
marks = [time.perf_counter()]
def mark(): marks.append(time.perf_counter())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from headwise.models import open_model
mark()
open_model()
mark()
open_model()
mark()
print(json.dumps([b - a for a, b in zip(marks, marks[1:])]))
"""
STAGES = ("imports", "first", "again")


def opening(times: int) -> dict:
    """Seconds of importing torch and transformers, of the first opening after that, and of one more; load beside it."""
    rows = []
    for _ in range(times):
        done = subprocess.run([sys.executable, "-c", OPEN], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
    found = {stage: round(statistics.median(row[i] for row in rows), 3) for i, stage in enumerate(STAGES)}
    when = time.strftime("%Y-%m-%d %H:%M")
    return {**found, "runs": times, "load": round(os.getloadavg()[0], 1), "when": when}


def keep_opening(times: int) -> None:
    """Measure only the opening, and leave what is kept of the map, with its date and circumstances, as it is."""
    kept = json.loads((race.RESULTS / "map_time.json").read_text())
    race.save("map_time", kept | {"open": opening(times), "when": kept["when"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--opens", type=int, default=7)
    parser.add_argument("--only-open", action="store_true", help="keep the last figures of the map")
    options = parser.parse_args()
    default_model_path()
    if options.only_open:
        keep_opening(options.opens)
        return
    found = {"machine": machine.facts(), "versions": race.particulars_of_ours()}
    found["open"] = opening(options.opens)
    with tempfile.TemporaryDirectory() as room:
        start, load = time.perf_counter(), [os.getloadavg()[0]]
        command = [sys.executable, "-m", "headwise", "map", "default", "--out", os.path.join(room, "atlas")]
        quiet = {**os.environ, "HEADWISE_PROGRESS": "0", "HF_HUB_OFFLINE": "1"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
        wall = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"headwise map failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found["map"] = {
        "wall": round(wall, 1),
        "cpu": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_mb": round(after.ru_maxrss / 1024),
        "load": [round(x, 1) for x in (*load, os.getloadavg()[0])],
        "said": [line for line in done.stdout.splitlines() if " proved" in line],
    }
    race.save("map_time", found)


if __name__ == "__main__":
    main()
