"""CopySpec in batches beside the lookups of economize and dejavuu, on the same requests of the default model.

python bench/drafting_peers.py [--requests 16] [--rows 4] [--tokens 64] [--rounds 5] [--threads 1] [--kinds repeats]

Each in a process and an environment of its own; in every round each way answers every batch once, in turns. Results go
to bench/results/decode_peers.json, where those of a kind that was not asked for stay; docs/bench.md is made from them
by bench/report.py.
"""

import argparse
import json
import statistics

import env
import machine
import race
import torch

from headwise.data.layout import pad_id
from headwise.data.requests import copying, open_ended
from headwise.models import default_model_path, open_model
from headwise.task import pad_left

SEED = 1  # as in decode.py, for drafters were tuned on the requests of seed 0
OURS, RIGHT = ("headwise_drafts", "CopySpec"), ("headwise_drafts", "greedy, row by row")
WAYS = {
    "headwise_drafts": ("CopySpec", "CopySpec, 6 tokens", "CopySpec, 6 tokens, packed", "greedy"),
    "economize": ("greedy", "lookup, 3 tokens", "lookup, 10 tokens", "lookup, 24 tokens after runs of 3"),
    "dejavuu": ("copyspec",),
    "dejavuu_older": ("copyspec",),
}


class Match:
    """One kind of requests: every way that works takes its turn on every batch."""

    def __init__(self, runners: race.Race, count: int, rows: int, ends: set[int], failed: dict[str, str]) -> None:
        self.runners, self.ends, self.failed = runners, ends, failed
        self.batches = [[start, min(start + rows, count)] for start in range(0, count, rows)]
        self.spent: dict[tuple[str, str], list[dict[str, float]]] = {}
        self.texts: dict[tuple[str, str], list[list[int]]] = {}

    def ask(self, who: str, way: str, rows: list[int]) -> dict | None:
        """One answer; a contestant that fails is out from then on, with its last words."""
        if who in self.failed:
            return None
        try:
            return self.runners.by_name[who].run(json.dumps({"way": way, "rows": rows}))
        except RuntimeError as problem:
            self.failed[who] = race.last_words(str(problem))
            return None

    def round(self, turn: int) -> None:
        """Every way answers every batch once; another one begins each time."""
        order = [(who, way) for who, ways in WAYS.items() for way in ways]
        sums = {one: {"wall": 0.0, "cpu": 0.0} for one in order}
        for place, rows in enumerate(self.batches):
            by = (turn + place) % len(order)
            for who, way in order[by:] + order[:by]:
                found = self.ask(who, way, rows)
                if found is None:
                    continue
                for clock, total in sums[who, way].items():
                    sums[who, way][clock] = total + found[clock]
                if turn == 0:
                    self.texts.setdefault((who, way), []).extend(self.ended(one) for one in found["value"])
        for one, total in sums.items():
            if one[0] not in self.failed:
                self.spent.setdefault(one, []).append(total)

    def ended(self, text: list[int]) -> list[int]:
        """A text before its end, without what stands behind it."""
        return text[: next((place for place, token in enumerate(text) if token in self.ends), len(text))]

    def rows(self, kind: str) -> list[dict]:
        """Medians over rounds, ratios to ours within a round, and how many texts are those of greedy generation."""
        right = [text for rows in self.batches for text in map(self.ended, self.ask(*RIGHT, rows)["value"])]
        found = []
        for (who, way), clocks in self.spent.items():
            if who in self.failed:
                continue
            texts = self.texts[who, way]
            row = {"kind": kind, "who": who, "way": way, "texts": len(right), "asked": len(right)}
            row |= {"same": sum(a == b for a, b in zip(texts, right, strict=True)), "tokens": sum(map(len, texts))}
            for clock, name in (("wall", "per_second"), ("cpu", "per_cpu_second")):
                row[name] = row["tokens"] / statistics.median(one[clock] for one in clocks)
                pairs = zip(self.spent[OURS], clocks, strict=True)
                # Tokens count, not texts: one that stops sooner is no faster.
                share = row["tokens"] / sum(map(len, self.texts[OURS]))
                row[f"{clock}_ratio"] = share * statistics.median(a[clock] / b[clock] for a, b in pairs)
                row[f"{clock}s"] = [one[clock] for one in clocks]
            found.append(row)
        return found + [
            {"kind": kind, "who": who, "failed": said, "asked": len(right)} for who, said in self.failed.items()
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("requests", 16), ("rows", 4), ("tokens", 64), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--kinds", nargs="+", choices=("repeats", "open"), default=["repeats", "open"])
    parser.add_argument("--envs")
    given = parser.parse_args()
    envs, failed = env.folder_of(given.envs), {}
    for who in WAYS:
        try:
            env.python_of(who, envs)
        except SystemExit as problem:
            failed[who] = race.last_words(str(problem))
    names = [who for who in WAYS if who not in failed]
    model, tokenizer = open_model()
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    how = {name: getattr(given, name) for name in ("rows", "tokens", "rounds", "threads")}
    file = race.RESULTS / "decode_peers.json"
    kept = json.loads(file.read_text())["rows"] if file.exists() else []
    kept = [row for row in kept if row["kind"] not in given.kinds]
    about = {"machine": machine.facts(), "threads": given.threads, "how": how, "rows": kept}
    about["versions"] = {"headwise": race.particulars_of_ours()}
    about["versions"] |= {who: env.versions(env.python_of(who, envs)) for who in names[1:]}
    for kind in given.kinds:
        asked = {"repeats": copying, "open": open_ended}[kind](tokenizer, given.requests, SEED)
        ids, mask = pad_left([one.ids for one in asked], pad_id(tokenizer))
        tensors = {"ids": ids, "mask": mask, "most": torch.tensor(given.tokens)}
        with race.Race(names, "answers", str(default_model_path()), tensors, given.threads, envs) as runners:
            match = Match(runners, len(asked), given.rows, ends, dict(failed))
            for who in names:
                match.ask(who, WAYS[who][0], match.batches[0])
            for turn in range(given.rounds):
                match.round(turn)
            about["rows"] += match.rows(kind)
        # What is done is kept, should the next kind be stopped.
        race.save("decode_peers", about)


if __name__ == "__main__":
    main()
