"""Draft heads for the default model: trained by the command line, then asked to draft after prompts of their own.

python bench/drafts.py [--folder drafts] [--texts 160] [--steps 200] [--rows 2] [--prompts 12]

The model writes texts once; `headwise draft train default` learns from them with Medusa and with Hydra, both with the
same options. What was stopped goes on where it was. Results go to bench/results/decode_drafts.json; docs/bench.md is
made from them by bench/report.py.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import machine
import numpy as np
import race
import torch
from tqdm.auto import tqdm

from headwise import open_model
from headwise.data import HeldOut
from headwise.draft_heads import DraftHeads
from headwise.draft_training import STATE, TEXTS, texts_in
from headwise.drafting import Drafter, Stats
from headwise.stats import sign_flip
from headwise.verifying import Verifying, run

METHODS = {"Medusa": "medusa", "Hydra": "hydra"}
TOLD, PROMPT = "told.json", 32


def trained(method: str, folder: Path, texts: Path, given: argparse.Namespace) -> dict:
    """What `headwise draft train --json` says, and its processor seconds; None where a stopped run went on."""
    told = folder / TOLD
    if told.exists():
        return json.loads(told.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(texts / TEXTS, folder / TEXTS)
    options = {key: getattr(given, key) for key in ("texts", "tokens", "steps", "rows", "rate")}
    options |= {"method": method, "out": folder}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    whole, before = not (folder / STATE).exists(), _of_children()
    command = [sys.executable, "-m", "headwise", "draft", "train", "default", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"headwise draft train {method} ended with {done.returncode}.")
    found = {**json.loads(done.stdout), "cpu": _of_children() - before if whole else None}
    told.write_text(json.dumps(found))
    return found


def _of_children() -> float:
    """Processor seconds of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def held_out(tokenizer, count: int, known: torch.Tensor) -> torch.Tensor:
    """[count, PROMPT] beginnings of paragraphs that no text to learn from begins with."""
    seen = {tuple(row) for row in known[:, :PROMPT].tolist()}
    drawn = HeldOut(length=PROMPT).make(tokenizer, 4 * count, 1).ids.tolist()
    return torch.tensor([row for row in dict.fromkeys(map(tuple, drawn)) if row not in seen][:count])


class Drafting:
    """Texts after prompts by each drafter, beside plain greedy generation: passes, processor seconds, sameness."""

    def __init__(self, model, drafters: dict[str, Drafter], prompts: torch.Tensor, new: int) -> None:
        names = ["greedy", *drafters]
        self.gained: dict[str, list[float]] = {name: [] for name in drafters}
        self.stats: dict[str, list[Stats]] = {name: [] for name in drafters}
        self.same, self.cpu = dict.fromkeys(drafters, 0), dict.fromkeys(names, 0.0)
        for place, row in enumerate(tqdm(prompts.split(1), desc="drafting")):
            how = {"attention_mask": torch.ones_like(row), "max_new_tokens": new, "do_sample": False}
            said = {}
            for name in names[place % len(names) :] + names[: place % len(names)]:
                began = time.process_time()
                if name == "greedy":
                    said[name] = model.generate(row, **how)
                else:
                    found = run(Verifying(drafters[name]), model, row, how)
                    said[name] = found.ids
                    self.stats[name].append(found.stats)
                    self.gained[name].append(found.stats.per_pass)
                self.cpu[name] += time.process_time() - began
            for name in drafters:
                self.same[name] += torch.equal(said[name], said["greedy"])

    def row(self, name: str) -> dict:
        """Everything about one drafter."""
        drafted, accepted = (sum(getattr(one, key) for one in self.stats[name]) for key in ("drafted", "accepted"))
        return {
            "name": name,
            "per_pass": float(np.mean(self.gained[name])),
            "each": self.gained[name],
            "acceptance": accepted / drafted,
            "same": self.same[name] / len(self.gained[name]),
            "faster": self.cpu["greedy"] / self.cpu[name],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("drafts"))
    defaults = {"texts": 160, "tokens": 64, "steps": 200, "rows": 2, "prompts": 12, "new": 48}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=1e-3)
    given = parser.parse_args()
    model, tokenizer = open_model()
    given.folder.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    prompts = HeldOut(length=PROMPT).make(tokenizer, given.texts, 0).ids
    ids = texts_in(given.folder, model, prompts, given.tokens)
    writing, load = time.process_time() - began, [round(os.getloadavg()[0], 1)]
    told = {name: trained(method, given.folder / method, given.folder, given) for name, method in METHODS.items()}
    heads = {name: DraftHeads.from_pretrained(one["folder"], model) for name, one in told.items()}
    drafters = {name: one.method.drafting(one) for name, one in heads.items()}
    asked = held_out(tokenizer, given.prompts, ids)
    found = Drafting(model, drafters, asked, given.new)
    rows = [
        {
            **found.row(name),
            "weights": sum(value.numel() for value in heads[name].parameters()),
            **{key: told[name][key] for key in ("cpu", "right", "loss")},
        }
        for name in METHODS
    ]
    gained = {name: np.array(one) for name, one in found.gained.items()}
    how = {name: getattr(given, name) for name in (*defaults, "rate")}
    race.save(
        "decode_drafts",
        {
            "machine": machine.facts(), "versions": race.particulars_of_ours(), "threads": torch.get_num_threads(),
            "how": {**how, "load": [*load, round(os.getloadavg()[0], 1)]}, "writing": writing, "prompts": len(asked),
            "rows": rows, "gain": float(gained["Hydra"].mean() / gained["Medusa"].mean()),
            "p": sign_flip(gained["Hydra"] - gained["Medusa"]),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
