"""One contestant in a process of its own: reads a line, runs once, answers with a line.

python bench/worker.py CONTESTANT JOB MODEL_FOLDER BATCH_FILE THREADS

Imports only torch and transformers until the contestant asks for more, so that it runs in every environment.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print goes to standard error
_clock = {"wall": 0.0, "cpu": 0.0}


def await_order() -> str:
    """Block until the next order and start the clock; the order is a unit, or "go"."""
    line = sys.stdin.readline().strip()
    if not line or line == "end":
        sys.exit(0)
    _clock.update(wall=time.perf_counter(), cpu=time.process_time())
    return line


def answer(value: object = None) -> None:
    """Stop the clock and report."""
    wall, cpu = time.perf_counter() - _clock["wall"], time.process_time() - _clock["cpu"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    _answers.write(json.dumps({"wall": wall, "cpu": cpu, "peak_mb": peak, "value": value}) + "\n")
    _answers.flush()


def main() -> None:
    contestant, job, folder, batch_file, threads = sys.argv[1:]
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    import contestants

    getattr(contestants, contestant)(job, folder, load_file(batch_file))


if __name__ == "__main__":
    sys.modules["worker"] = sys.modules["__main__"]
    main()
