"""The exact ablation scan: headwise against the naive loop in plain transformers, TransformerLens and nnsight.

python bench/ablation_scan.py sample [--job scan_last|scan_all]    one head a layer, all contestants in turn
python bench/ablation_scan.py full                                 every head: numbers compared, bfloat16 ranks
Both take [--threads 1] [--envs FOLDER] [--model FOLDER] [--contestants ...].
"""

import argparse
import os
import random
import time
from pathlib import Path

import env
import machine
import race
import torch
from transformers import AutoConfig, AutoTokenizer

from headwise.data import Induction
from headwise.models import default_model_path

OURS = ["headwise", "headwise_blas", "headwise_bf16"]
LOOPS = ["hooks_restricted", "hooks", "transformer_lens", "nnsight"]


def flops(config, rows: int, columns: int, logit_columns: int) -> dict[str, float]:
    """FLOPs of matrix products: of a layer, of the unembedding, of a full pass, and of a variant, prefix shared."""
    wide, heads, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    size = wide // heads
    tokens = rows * columns
    linear = 2 * tokens * (wide * size * (2 * heads + 2 * kv) + 3 * wide * config.intermediate_size)
    # Causal kernels skip about half of the pattern; counted whole, as the usual formula does.
    attention = 2 * 2 * rows * heads * columns * columns * size
    layer, head = linear + attention, 2 * rows * logit_columns * wide * config.vocab_size
    layers = config.num_hidden_layers
    naive = layers * layer + head
    # Head of layer l: layers l to the last run again.
    shared = sum(layers - number for number in range(layers)) / layers * layer + head
    return {"layer": layer, "unembedding": head, "naive": naive, "shared": shared, "bound": naive / shared}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("sample", "full"))
    parser.add_argument("--job", choices=("scan_last", "scan_all"), default="scan_last")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--envs")
    parser.add_argument("--model", help="model folder; the default model where absent")
    parser.add_argument("--contestants", nargs="*")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this long and say how far it came")
    options = parser.parse_args()
    folder, envs = options.model or str(default_model_path()), env.folder_of(options.envs)
    config = AutoConfig.from_pretrained(folder)
    batch = Induction(length=127).make(AutoTokenizer.from_pretrained(folder), 8, 0)
    tensors = {"ids": batch.ids, "answer": batch.answer}
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    draw = random.Random(0)
    order = draw.sample(range(layers), layers)
    per_layer = 1 if options.stage == "sample" else heads
    units = [f"L{n}.H{h}" for n in order for h in draw.sample(range(heads), per_layer)]
    default = [*OURS, *LOOPS] if options.stage == "sample" else ["headwise", "headwise_bf16", "hooks_restricted"]
    names = options.contestants or default
    found = race.particulars(envs, names, options.threads)
    with race.Race(names, options.job, folder, tensors, options.threads, envs) as runners:
        scores, done = run(runners, names, units, options.minutes)
        reference = next(n for n in ("hooks_restricted", "hooks", *names) if n in names)
        table, loads = runners.table(reference), [r["load"] for r in runners.runs[names[0]]]
    shape = (*batch.ids.shape, 1 if options.job == "scan_last" else batch.ids.shape[1])
    found |= {
        "job": options.job,
        "batch": list(batch.ids.shape),
        "heads": done,
        "of": layers * heads,
        "table": table,
        "agreement": agreement(scores, reference),
        "flops": flops(config, *shape),
        "rates": machine.rates(),
        "load_seen": [min(loads), sorted(loads)[len(loads) // 2], max(loads)],
        "effects": {name: {u: round(sum(v) / len(v), 7) for u, v in rows.items()} for name, rows in scores.items()},
    }
    race.save(f"ablation_{options.job}_{options.stage}", found)


def run(runners: race.Race, names: list[str], units: list[str], minutes: float) -> tuple[dict, int]:
    """Every contestant zeroes the same head before the next head's turn comes. Effects {name: {unit: [B]}}."""
    base, scores, begun, done = {}, {name: {} for name in names}, time.monotonic(), 0
    for name in names:
        if name in OURS:
            # Once for the whole scan: the list of heads, the base run, and the test of starting from a middle layer.
            base[name] = runners.turn(name, " ".join(units), keep=False)["value"]
            runners.turn(name, keep=False)
        else:
            runners.turn(name, "base", keep=False)
            base[name] = runners.turn(name, "base", keep=False)["value"]
    for done, unit in enumerate(units, 1):
        for name in random.Random(done).sample(names, len(names)):
            value = runners.turn(name, unit)["value"]
            scores[name][unit] = [b - v for b, v in zip(base[name], value, strict=True)]
        if done % 10 == 0:
            print(f"{done} of {len(units)} heads, load {os.getloadavg()[0]:.1f}", flush=True)
        if time.monotonic() - begun > 60 * minutes:
            break
    return scores, done


def agreement(scores: dict, reference: str) -> dict[str, dict]:
    """Largest difference of an effect from the reference, over heads and prompts, and rank correlation of the means."""
    found = {}
    units = list(scores[reference])
    exact = torch.tensor([scores[reference][u] for u in units])
    for name, rows in scores.items():
        mine = torch.tensor([rows[u] for u in units])
        found[name] = {
            "largest_difference": float((mine - exact).abs().max()),
            "rank_correlation": rank_correlation(mine.mean(1), exact.mean(1)),
        }
    return found


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's, for values without ties."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1]) if len(a) > 2 else float("nan")


if __name__ == "__main__":
    Path(__file__).parent.joinpath("results").mkdir(exist_ok=True)
    main()
