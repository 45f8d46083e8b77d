"""How well the gradient screen ranks heads against their exact effects; writes bench/results/screen.json.

Same prompts, same replacement (the head's value on the corrupt prompt), every head of the default model.
Run: python bench/screen.py [--prompts 8]
"""

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

import headwise as hw
from headwise.method import load
from headwise.score import release
from headwise.stats import spearman

TASKS = ("induction", "ioi", "capitals", "successor")


def compare(model, tokenizer, task: str, prompts: int) -> dict:
    """Rank correlation of screen and exact effect over all heads, and how many of the exact top ten it finds."""
    batch = load(f"data.{task}")().make(tokenizer, n=prompts, seed=0)
    start = time.perf_counter()
    screen = hw.heads.Attribution().score(model, batch)
    middle = time.perf_counter()
    exact = hw.heads.Ablation(value="resample").score(model, batch)
    end = time.perf_counter()
    a, b = (score.table["value"].to_numpy() for score in (screen, exact))
    return {
        "task": task,
        "prompts": prompts,
        "heads": len(a),
        "spearman": round(spearman(a, b), 3),
        "pearson": round(float(np.corrcoef(a, b)[0, 1]), 3),
        "top10_found": len(set(screen.top(10)) & set(exact.top(10))),
        "screen_s": round(middle - start, 1),
        "exact_s": round(end - middle, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=8)
    model, tokenizer = hw.open_model("default")
    rows = [compare(model, tokenizer, task, parser.parse_args().prompts) for task in TASKS]
    about = {"date": str(datetime.now(UTC).date()), "torch": torch.__version__, "headwise": release(), "rows": rows}
    out = Path(__file__).parent / "results" / "screen.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
