"""How well cheap edges rank against exact path patching, and circuit discovery against its peers.

python bench/circuits.py spearman [--tasks ioi --edges 150]             writes bench/results/circuits_spearman.json
python bench/circuits.py race [--prompts 3 --rounds 3 --jobs eap_ig]    writes bench/results/circuits_race.json
"""

import argparse
import json
import os
import random
import subprocess
import tempfile
import time
from pathlib import Path

import env
import machine
import numpy as np
import race as racing
import torch
from safetensors.torch import save_file

import headwise as hw
from headwise.circuits import CDT, Conductance, Eap, EapIg
from headwise.graph import Graph
from headwise.method import load
from headwise.paths import prepare
from headwise.replicate.head_subspaces import even
from headwise.stats import spearman
from headwise.task import logit_diff
from headwise.worth import gap, outcomes, share

TASKS = ("ioi", "greater_than", "pronouns", "successor", "induction")
SIZES = (100, 300, 1000, 3000)
# Each way of weighing edges, and who has it.
JOBS = {
    "eap": ("headwise", "circuitkit", "auto_circuit"),
    "eap_ig": ("headwise", "circuitkit"),
    "mask_gradient": ("headwise", "auto_circuit"),
}
PEERS = JOBS["eap"]


def sampled(graphs: dict[str, Graph], count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Edges to be patched exactly: as many at random as from the thousand largest of each method."""
    draw = random.Random(f"edges {seed}")
    known = sorted(set.union(*(set(graph.edges) for graph in graphs.values())))
    found = set(draw.sample(known, count // (1 + len(graphs))))
    for graph in graphs.values():
        large = sorted(set(graph.top(1000).edges) - found)
        found |= set(draw.sample(large, min(len(large), count // (1 + len(graphs)))))
    return sorted(found)


def rank(model, tokenizer, task: str, prompts: int, few: int, count: int) -> dict:
    """Rank correlations with exact path patching: of each method over the sampled edges that it weighs.

    CD-T runs on the first `few` prompts only, for it takes a pass a node, and is held against those.
    """
    batch = load(f"data.{task}")().make(tokenizer, prompts, 0)
    methods = {"eap": Eap(), "eap_ig": EapIg(), "conductance": Conductance(), "cd_t": CDT(nodes=12)}
    rows = {name: few if name == "cd_t" else prompts for name in methods}
    graphs, seconds = {}, {}
    for name, method in methods.items():
        began = time.perf_counter()
        graphs[name] = method.find(model, batch.take(slice(0, rows[name])))
        seconds[name] = round(time.perf_counter() - began, 1)
    edges = sampled(graphs, count)
    began, exact = time.perf_counter(), []
    for paths in prepare(model, batch, logit_diff, 4):
        exact.append((paths.clean.cpu().float() - paths.single(edges, 8)).numpy())
    seconds["exact"] = round(time.perf_counter() - began, 1)
    values = np.concatenate(exact, 1)
    signed, sizes, weighed = {}, {}, {}
    for name, graph in graphs.items():
        at = [i for i, edge in enumerate(edges) if edge in graph]
        mine, true = np.array([graph[edges[i]] for i in at]), values[at, : rows[name]].mean(1)
        signed[name], sizes[name] = round(spearman(mine, true), 3), round(spearman(abs(mine), abs(true)), 3)
        weighed[name] = len(at)
    return {
        "task": task, "prompts": prompts, "edges": len(edges), "of": len(paths.all()), "seconds": seconds,
        "spearman": signed, "of_sizes": sizes, "weighed": weighed, "on": rows,
        "largest_exact": round(float(abs(values.mean(1)).max()), 3),
    }  # fmt: skip


def spearmans(tasks: list[str], prompts: int, few: int, edges: int) -> None:
    model, tokenizer = hw.open_model("default")
    file = racing.RESULTS / "circuits_spearman.json"
    for task in tasks:
        row = rank(model, tokenizer, task, prompts, few, edges)
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        rows = [one for one in rows if one["task"] != task] + [row]
        # What is done is kept, should a later task be stopped.
        racing.save("circuits_spearman", {"rows": rows, "machine": machine.facts(), "torch": torch.__version__})


def race(prompts: int, rounds: int, envs: Path, jobs: list[str]) -> None:
    """Every contestant scores all edges of the same prompts; its largest edges are then a circuit, on other prompts.

    Rows of jobs that are not asked for stay as they were.
    """
    from headwise.convert import default_model_path

    folder = str(default_model_path())
    model, tokenizer = hw.open_model("default")
    task = load("data.ioi")()
    few = even(task.make(tokenizer, 8 * prompts, 0)).take(slice(0, prompts))
    held = even(task.make(tokenizer, 32, 1)).take(slice(0, 8))
    parts = prepare(model, held, logit_diff, 8)
    clean, corrupt = gap(parts)
    found = {"prompts": len(few), "tokens": few.ids.shape[1], "held_out": len(held), "sizes": SIZES, "rows": []}
    file = racing.RESULTS / "circuits_race.json"
    if file.is_file():
        found["rows"] = [row for row in json.loads(file.read_text())["rows"] if row["job"] not in jobs]
    with tempfile.TemporaryDirectory() as room:
        file = os.path.join(room, "batch.safetensors")
        save_file(
            {
                "clean": few.ids.contiguous(), "corrupt": few.corrupt["input_ids"].contiguous(),
                "answer": few.answer[:, 0].contiguous(), "foil": few.foil[:, 0].contiguous(),
            },
            file,
        )  # fmt: skip
        for job in jobs:
            for name in JOBS[job]:
                out = os.path.join(room, f"{name}.json")
                command = [env.python_of(name, envs), str(Path(__file__).with_name("circuits_worker.py"))]
                quiet = {"HF_HUB_OFFLINE": "1", "HEADWISE_PROGRESS": "0", "PYTHONWARNINGS": "ignore"}
                done = subprocess.run(
                    [*command, name, job, folder, file, out, str(rounds)],
                    env={**os.environ, **quiet}, capture_output=True, text=True, check=False,
                )  # fmt: skip
                if done.returncode:
                    found["rows"].append({"job": job, "name": name, "failed": racing.last_words(done.stderr)})
                else:
                    row = json.loads(Path(out).read_text())
                    kept = faithful(parts, row.pop("scores"), clean, corrupt)
                    found["rows"].append({"job": job, "name": name, **row, **kept, "load": os.getloadavg()[0]})
                # What is done is kept, should a later contestant be stopped.
                racing.save("circuits_race", {**found, "machine": machine.facts(), "versions": versions(envs)})


def faithful(parts, scores: dict[str, float], clean: np.ndarray, corrupt: np.ndarray) -> dict:
    """Share of the gap that circuits of equal size do alone; edges that headwise does not have are counted."""
    edges = parts[0].all()
    known = {f"{s} {t}": (s, t) for s, t in edges}
    values = np.array([scores.get(name, float("nan")) for name in known]).reshape(-1, 1)
    graph = Graph.of_edges(EapIg(), parts[0].model, None, parts[0].edges.heads, list(known.values()), values)
    circuits = [graph.grown(size).pruned() for size in SIZES]
    kept = share(outcomes(parts, circuits), clean, corrupt)
    return {
        "faithfulness": {size: round(float(value), 3) for size, value in zip(SIZES, kept, strict=True)},
        "edges": len(scores), "missing": int(np.isnan(values).sum()), "unknown": len(set(scores) - set(known)),
    }  # fmt: skip


def versions(envs: Path) -> dict[str, dict[str, str]]:
    return {name: env.versions(env.python_of(name, envs)) for name in PEERS}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=("spearman", "race"))
    parser.add_argument("--prompts", type=int, help="8 for correlations, 3 for the race")
    parser.add_argument("--few", type=int, default=2, help="prompts on which CD-T runs")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--edges", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="of the race")
    parser.add_argument("--envs")
    given = parser.parse_args()
    if given.job == "spearman":
        spearmans(given.tasks, given.prompts or 8, given.few, given.edges)
    else:
        race(given.prompts or 3, given.rounds, env.folder_of(given.envs), given.jobs)
