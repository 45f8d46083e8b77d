"""Wall time and peak memory of `headwise map` on the default model from nothing, and the time that opening it takes.

python bench/map_time.py [--opens 7]
"""

import argparse
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

OPEN = (
    "import time, json; a = time.perf_counter(); c = time.process_time(); from headwise.models import open_model; "
    "b = time.perf_counter(); open_model(); "
    "print(json.dumps([time.perf_counter() - a, time.perf_counter() - b, time.process_time() - c]))"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--opens", type=int, default=7)
    options = parser.parse_args()
    default_model_path()
    found = {"machine": machine.facts(), "versions": race.particulars_of_ours()}
    opens = []
    for _ in range(options.opens):
        done = subprocess.run([sys.executable, "-c", OPEN], capture_output=True, text=True, check=True)
        opens.append([float(x) for x in done.stdout.strip().strip("[]").split(",")])
    names = ("with_imports", "open_model_with_transformers", "cpu_with_imports")
    found["open"] = {name: round(statistics.median(row[i] for row in opens), 3) for i, name in enumerate(names)}
    found["open_least"] = {name: round(min(row[i] for row in opens), 3) for i, name in enumerate(names)}
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
        "said": done.stdout.strip().splitlines()[-12:],
    }
    race.save("map_time", found)


if __name__ == "__main__":
    main()
