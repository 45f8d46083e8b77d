"""A made-up atlas of 30 layers and 9 heads, for looking at the views. Nothing in it was measured on a model."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from headwise.atlas import Atlas
from headwise.cache.duo import Duo
from headwise.cache.preallocated import Preallocated
from headwise.claim import Claim, Rung
from headwise.graph import COLUMNS as EDGES
from headwise.graph import Graph
from headwise.plan import Plan, Trial
from headwise.score import COLUMNS, Score
from headwise.tape import Tape

FINGERPRINT = "0123456789abcdef"
STEPS = {
    "seen": "{role}_stripe",
    "read": "{role}_copying",
    "needed": "resample (logprob)",
    "enough": "restore (logprob)",
}
DOUBTFUL = {"L10.H5": "induction", "L13.H2": "induction", "L6.H1": "previous token", "L28.H3": "copy suppression"}
REFUTED = {"L4.H7": "induction", "L19.H0": "previous token"}
TEXTS = {
    "repeated": " crane vowel amber  lake tulip brick fog seven" * 2,
    "code": "def area(w, h):\n    return w * h\n\nprint(area(3, 4))\nprint(area(5,",
    "names": "When Mary and John went to the store, John gave a drink to",
    "prose": "The lighthouse keeper wrote one line each night. By winter the book was full, and the keeper wrote",
}
ROLES = {
    "induction": ["L5.H1", "L7.H4", "L12.H0", "L15.H7", "L18.H6"],
    "previous token": ["L2.H3", "L3.H8", "L4.H0", "L9.H2"],
    "duplicate token": ["L1.H5", "L6.H6"],
    "current token": ["L0.H2", "L0.H7"],
    "retrieval": ["L14.H3", "L17.H1"],
    "name mover": ["L21.H5", "L23.H2"],
    "copy suppression": ["L26.H4"],
    "sink": ["L8.H8", "L11.H3", "L20.H0", "L24.H7", "L27.H1"],
    "local": ["L0.H0", "L1.H1", "L2.H6"],
    "in-context": ["L19.H8"],
    "memory": ["L22.H3"],
    "successor": ["L25.H6"],
    "select and copy": ["L16.H5"],
}


def empty_atlas(path: Path, heads: dict[int, int], kv_heads: dict[int, int] | None = None, **about: Any) -> Atlas:
    """An atlas that holds nothing, of a model with so many heads in each layer."""
    body = {
        "format": 1,
        "model": "synthetic/never-measured",
        "model_type": "made up",
        "fingerprint": FINGERPRINT,
        "layers": list(heads),
        "heads": {str(layer): count for layer, count in heads.items()},
        "kv_heads": {str(layer): count for layer, count in (kv_heads or heads).items()},
        "tokenizer": "",
        "version": "0.0.0",
        "created": "2026-01-01T00:00:00+00:00",
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "atlas.json").write_text(json.dumps(body | about), encoding="utf-8")
    return Atlas(path)


def score_table(units: list[tuple[int, int]], values: np.ndarray, n: int = 100, letter: str = "H") -> pl.DataFrame:
    """A score's table with an interval of one tenth around each value."""
    wide = 0.02 + 0.1 * np.abs(values)
    names = [f"L{layer}.{letter}{index}" for layer, index in units]
    columns = [
        names,
        [u[0] for u in units],
        [u[1] for u in units],
        values,
        values - wide,
        values + wide,
        [n] * len(units),
    ]
    return pl.DataFrame(columns, schema=COLUMNS)


def provenance(method: str, task: str) -> dict[str, Any]:
    """What a score says of itself, with plainly invented numbers."""
    return {
        "method": {"name": f"heads.{method}", "fields": {}},
        "task": {"task": f"data.{task}", "version": 1, "n": 100, "seed": 0, "rows": 100},
        "model": "synthetic/never-measured",
        "fingerprint": FINGERPRINT,
        "dtype": "float32",
        "versions": {"headwise": "0.0.0", "torch": "none"},
        "when": "2026-01-01T00:00:00+00:00",
    }


def tokens_of(text: str) -> list[str]:
    """Cut a text into pieces as a tokenizer might, spaces in front."""
    return ["<|start|>", *re.findall(r" ?\w+|\n+ *| +(?= )|[^\w\s]", text)]


def pattern_of(role: str, tokens: list[str], rng: np.random.Generator) -> np.ndarray:
    """[T, T] weights that a head of this role might give, causal, rows summing to one."""
    size = len(tokens)
    raw = rng.gamma(0.25, 1.0, (size, size)) * 0.25
    raw[:, 0] += 1.2
    bare = [token.strip() for token in tokens]
    for q in range(size):
        earlier = [k for k in range(q) if bare[k] == bare[q]]
        if role == "previous token" and q:
            raw[q, q - 1] += 14
        elif role == "current token":
            raw[q, q] += 9
        elif role == "local":
            raw[q, max(0, q - 3) : q + 1] += [2, 3, 5, 7][-(q - max(0, q - 3) + 1) :]
        elif role == "sink":
            raw[q, 0] += 30
        elif role in ("induction", "retrieval", "select and copy") and earlier:
            raw[q, earlier[-1] + 1] += 13
        elif role in ("duplicate token", "name mover", "copy suppression") and earlier:
            raw[q, earlier] += 9
    raw = np.tril(raw)
    return raw / raw.sum(1, keepdims=True)


def synthetic_atlas(path: Path, layers: int = 30, heads: int = 9, seed: int = 0) -> Atlas:
    """A whole atlas with every kind of thing a view can show."""
    rng = np.random.default_rng(seed)
    units = [(layer, index) for layer in range(layers) for index in range(heads)]
    names = {f"L{layer}.H{index}" for layer, index in units}
    roles = {unit: role for role, members in ROLES.items() for unit in members}
    verdicts = dict.fromkeys(roles, "proved") | dict.fromkeys(DOUBTFUL, "unknown") | dict.fromkeys(REFUTED, "refuted")
    roles |= DOUBTFUL | REFUTED
    atlas = empty_atlas(
        path,
        dict.fromkeys(range(layers), heads),
        dict.fromkeys(range(layers), max(1, heads // 3)),
        tasks={"induction": {"n": 48, "accuracy": 0.96, "clean": -0.12, "corrupt": -7.4}},
        skipped={"successor": "no single-token numbers in this made-up vocabulary"},
    )
    made = [claim(unit, role, verdicts[unit], rng) for unit, role in roles.items() if unit in names]
    atlas.add_claims([*made, claim("L5.H1", "duplicate token", "refuted", rng)])
    add_scores(atlas, units, roles, rng)
    add_patterns(atlas, units, roles, rng)
    atlas.add_readouts(readouts_of(units, rng))
    add_plans(atlas, {layer: max(1, heads // 3) for layer in range(layers)}, rng)
    add_graphs(atlas, layers, heads, np.random.default_rng(seed))
    return atlas


def name_of(role: str) -> str:
    """A role as part of a score's name."""
    return role.replace(" ", "_").replace("-", "_")


def claim(unit: str, role: str, verdict: str, rng: np.random.Generator) -> Claim:
    """A claim whose rungs agree with its verdict."""
    rungs = []
    for step, score in STEPS.items():
        passed = verdict == "proved" or step == "seen" or (verdict == "unknown" and step == "read")
        value = rng.uniform(0.5, 0.95) if passed else rng.uniform(0.0, 0.1)
        tested = step in ("needed", "enough")
        null, p, share = (rng.uniform(0.08, 0.2), 0.0004 if passed else 0.31, value / 2) if tested else (np.nan,) * 3
        numbers = (value, value - 0.07, value + 0.06, null, p, p * 3, 50, share)
        rungs.append(Rung(step, score.format(role=name_of(role)), *map(float, numbers[:6]), 50, float(share), passed))
    about = {"method": {"name": "headwise.verify", "fields": {"nulls": 20}}, "fingerprint": FINGERPRINT}
    return Claim(unit, role, verdict, rungs, about)


def add_scores(atlas: Atlas, units: list[tuple[int, int]], roles: dict[str, str], rng: np.random.Generator) -> None:
    """Up to three scores a role, one on KV heads, and a negative one that lacks some heads."""
    for role in ROLES:
        name = name_of(role)
        hit = np.array([roles.get(f"L{layer}.H{index}") == role for layer, index in units])
        seen = np.where(hit, rng.uniform(0.5, 0.95, len(units)), rng.beta(1, 14, len(units)))
        needed = np.where(hit, rng.uniform(0.4, 1.4, len(units)), rng.normal(0, 0.05, len(units)))
        atlas.add(Score(f"{name}_stripe", score_table(units, seen), "head", "seen", provenance(name, "repeated")))
        if role in ("induction", "previous token", "name mover", "retrieval"):
            about = provenance("ablation", "repeated")
            atlas.add(Score(f"{name}_ablation", score_table(units, needed), "head", "needed", about))
            atlas.add(
                Score(
                    f"{name}_copying", score_table(units, seen - 0.3), "head", "read", provenance("copying", "repeated")
                )
            )
    groups = sorted({(layer, index // 3) for layer, index in units})
    atlas.add(Score("cache_use", score_table(groups, rng.uniform(0, 1, len(groups)), letter="G"), "kv", "seen", {}))
    values = -np.abs(rng.normal(-0.2, 0.1, len(units)))
    values[::7] = np.nan
    atlas.add(Score("entropy_change", score_table(units, values), "head", "seen", {"method": "by hand"}))


def add_patterns(atlas: Atlas, units: list[tuple[int, int]], roles: dict[str, str], rng: np.random.Generator) -> None:
    """Patterns of all heads on four prompts."""
    for name, text in TEXTS.items():
        tokens = tokens_of(text)
        layers: dict[int, list[np.ndarray]] = {}
        for layer, index in units:
            role = roles.get(f"L{layer}.H{index}", "unknown")
            layers.setdefault(layer, []).append(pattern_of(role, tokens, rng))
        blocks = {layer: np.round(np.stack(found) * 255).astype(np.uint8) for layer, found in layers.items()}
        atlas.add_pattern(name, tokens, text, blocks)


def readouts_of(units: list[tuple[int, int]], rng: np.random.Generator) -> pl.DataFrame:
    """Invented read-outs: every head copies, and looks for what it stands on."""
    words = [" lake", " Mary", " seven", "\n", " the", " winter", ")", " amber", " tulip", " keeper", "  ", " night"]
    found = []
    for layer, index in units:
        for circuit in ("ov", "qk"):
            for source in words[:6]:
                targets = [source, *rng.choice(words, 4, replace=False)]
                for rank, target in enumerate(targets):
                    value = float(8 - 1.3 * rank + rng.normal(0, 0.2))
                    found.append((f"L{layer}.H{index}", circuit, source, str(target), value, rank))
    return pl.DataFrame(found, schema=["unit", "circuit", "source", "target", "value", "rank"], orient="row")


def plan_of(kv_heads: dict[int, int], share: float, rng: np.random.Generator, accepted: bool = True) -> Plan:
    """A plan that keeps this share of KV heads in full, with a made-up trial that agrees with its verdict."""
    units = [f"L{layer}.G{group}" for layer, count in kv_heads.items() for group in range(count)]
    scores = {unit: {"need": float(rng.beta(1, 9)), "retrieval": float(rng.beta(1, 14))} for unit in units}
    best = sorted(units, key=lambda unit: -scores[unit]["need"])[: round(share * len(units))]
    kept = {"full": 1.0, "plan": 0.98 if accepted else 0.71, "random 1": 0.52, "random 2": 0.46, "streaming": 0.33}
    rows = [trial_row(name, value, 1.0 if name == "full" else share + 0.13) for name, value in kept.items()]
    says = f"The plan keeps {kept['plan']:.0%} of the full cache's right answers, in this made-up trial."
    return Plan(
        model="synthetic/never-measured",
        fingerprint=FINGERPRINT,
        layout={str(layer): count for layer, count in kv_heads.items()},
        legend={"rest": Duo(), "full": Preallocated()},
        heads={unit: "full" if unit in best else "rest" for unit in units},
        evidence=scores,
        trial=Trial(accepted, says, "At least 95% of the answers must be kept.", rows),
        about={"bytes": share + 0.1, "at": 8192, "ranking": "need", "seed": 0},
    )


def trial_row(name: str, kept: float, share: float) -> dict[str, Any]:
    """One contestant of a trial, as `planning.try_plan` writes it."""
    return {
        "name": name,
        "bytes": round(share * 47_185_920),
        "share": share,
        "kept": kept,
        "retrieval": 0.94 * kept,
        "accuracy": {"passkey": kept, "copy": 0.88 * kept},
        "n": {"passkey": 12, "copy": 12},
        "nll": 3.21 + 0.4 * (1 - kept),
        "at": 1024,
    }


def add_plans(atlas: Atlas, kv_heads: dict[int, int], rng: np.random.Generator) -> None:
    """One plan that a trial accepted, one that it rejected, one that cannot be read, and caches that were timed."""
    plan_of(kv_heads, 0.3, rng).save(atlas.path / "plans" / "0.4.json")
    plan_of(kv_heads, 0.1, rng, accepted=False).save(atlas.path / "plans" / "0.2.json")
    (atlas.path / "plans" / "torn.json").write_text("{", encoding="utf-8")
    measured = {
        "DynamicCache": (1.0, 92.0, 1.0),
        "StaticCache": (1.01, 61.0, None),
        "cache.duo": (0.16, 31.0, 0.3),
        "plan 0.4": (0.41, 42.5, 0.97),
    }
    atlas.add_bench([bench_row(name, *row) for name, row in measured.items()])


def bench_row(cache: str, share: float, decode_ms: float, kept: float | None) -> dict[str, Any]:
    """One cache, as `headwise bench` measures it."""
    return {
        "cache": cache,
        "at": 2048,
        "bytes": round(share * 94_371_840),
        "share": share,
        "prefill_s": 2.1,
        "decode_ms": decode_ms,
        "peak_mb": 910.0,
        "kept": kept,
        "retrieval": None if kept is None else 0.91 * kept,
        "nll": None if kept is None else 3.05 + 0.3 * (1 - kept),
    }


def graph_of(layers: int, heads: int, many: int, rng: np.random.Generator, tokens: int = 0) -> Graph:
    """Edges on made-up paths from tokens (or the embedding) to the logits; a fifth of them speak against the answer."""
    kv = max(1, heads // 3)
    found: dict[tuple[str, str], float] = {}
    while len(found) < many:
        target, top = "logits", layers
        while target:
            layer = int(rng.integers(-1, top))
            if layer < 0:
                source = f"embed@{rng.integers(tokens)}" if tokens else "embed"
            else:
                source = f"L{layer}.mlp" if rng.random() < 0.2 else f"L{layer}.H{rng.integers(heads)}"
            weight = float(rng.gamma(0.6, 0.3) * (1 if rng.random() < 0.8 else -0.4))
            found.setdefault((source, target), weight)
            if layer < 0:
                break
            side, head = str(rng.choice(list("qkv"))), int(source.split(".H")[1]) if ".H" in source else -1
            unit = f"H{head}.q" if side == "q" else f"G{head * kv // heads}.{side}"
            target, top = source if head < 0 else f"L{layer}.{unit}", layer
    rows = [(s, t, w, abs(w) / 9, 8) for (s, t), w in found.items()]
    about = provenance("eap_ig", "ioi") | {"method": {"name": "circuits.eap_ig", "fields": {"steps": 5}}}
    table = pl.DataFrame(rows, schema=EDGES, orient="row")
    return Graph("eap_ig", table, {layer: (heads, kv) for layer in range(layers)}, "seen", about)


def add_graphs(atlas: Atlas, layers: int, heads: int, rng: np.random.Generator) -> None:
    """The graph of one answer, with what was measured of it; one of a task; and one that is torn."""
    tokens = tokens_of(TEXTS["names"])
    graph = graph_of(layers, heads, 90, rng, len(tokens))
    largest = graph.top(12).nodes
    asked = {
        "prompt": TEXTS["names"],
        "answer": "Mary",
        "instead": "John",
        "tokens": tokens,
        "contrast": [TEXTS["names"].replace("John gave", "Mary gave")],
        "how": "exchanged",
        "metric": "logit difference",
        "clean": 4.2,
        "corrupt": -3.9,
        "faithfulness": 0.83,
        "low": None,
        "high": None,
        "left": 0.11,
        "explains": True,
        "says": f"{len(graph)} of 31000 edges explain the behaviour, in this made-up example.",
        "p": {"paths": 0.048, "shuffled": 0.048},
        "losses": {node: round(float(rng.uniform(0, 0.5)), 4) for node in largest if node != "logits"},
        "of": 31000,
    }
    method = {"method": {"name": "headwise.why", "fields": {"target": 0.8, "steps": 5, "seed": 0}}}
    about = graph.about | method | {"why": asked}
    atlas.add_graph("why-mary-john-0a1b2c", dataclasses.replace(graph, name="why", about=about))
    atlas.add_graph("ioi", graph_of(layers, heads, 400, rng))
    (atlas.path / "graphs" / "torn.parquet").write_bytes(b"no parquet")


def add_run(folder: Path, layers: int, heads: int, seed: int = 0) -> None:
    """The tape of a made-up training run and what was held in it, beside an atlas in the same folder."""
    rng = np.random.default_rng(seed)
    tape = Tape()
    for step in range(0, 2001, 50):
        done = 1 / (1 + np.exp(-(step - 900) / 40))
        tape.add(step, "loss", "train", "", float(3.2 - 2.9 * done + rng.normal(0, 0.02)))
        for layer in range(layers):
            for index in range(heads):
                most = 0.9 if (layer, index) == (5, 1) else 0.3 * rng.random()
                tape.add(step, "induction", "train", f"L{layer}.H{index}", float(most * done + rng.normal(0, 0.01)))
                tape.add(step, "match", "train", f"L{layer}.H{index}", float(rng.random() * 0.1))
    tape.save(folder / "tape.parquet", {"seed": 5, "lesson": "MadeUp"})
    after = {"kind": "After", "metric": "'loss'", "above": "None", "split": "'train'"}
    below = after | {"below": "1.0", "condition": "None"}
    unknown = after | {"below": "None", "condition": "<lambda>"}
    early = {"kind": "Steps", "first": "0", "end": "425"}
    edits = [
        {"kind": "Edit", "site": "'L1.pattern'", "heads": ["0", "3"], "when": early},
        {"kind": "Reset", "parameter": "'embed'", "when": {"kind": "Every", "n": "25"}},
        {"kind": "Edit", "site": "'L0.z'", "heads": "None", "when": below},
        {"kind": "Edit", "site": "'L2.z'", "heads": "None", "when": unknown},
    ]
    asked = {"lesson": {"name": "MadeUp"}, "seed": 5, "edits": edits}
    (folder / "run.json").write_text(json.dumps(asked), encoding="utf-8")
