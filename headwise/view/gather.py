"""Everything a view shows of an atlas, as one plain dictionary that JSON can carry."""

import base64
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from headwise.claim import ROLES, Claim
from headwise.view.circuits import circuits
from headwise.view.plain import number, plain
from headwise.view.tradeoffs import tradeoffs
from headwise.view.training import training
from headwise.view.words import head_sentence, score_code, shown_role, summary_sentence

if TYPE_CHECKING:
    from headwise.atlas import Atlas
    from headwise.score import Score

FORMAT = 1
RUNG_NUMBERS = ("value", "low", "high", "null", "p", "p_holm", "share")


def gather(atlas: "Atlas") -> dict[str, Any]:
    """Heads, scores, claims, patterns, read-outs and plans of an atlas. Numbers that are not finite become None."""
    about = atlas.about
    claims: dict[str, list[Claim]] = {}
    for claim in atlas.claims():
        claims.setdefault(claim.unit, []).append(claim)
    heads = [{"stack": _stack(row["unit"]), **row, "role": shown_role(row, claims)} for row in atlas.heads()]
    units = [row["unit"] for row in heads]
    return {
        "format": FORMAT,
        "about": plain(about),
        "atlas": f"atlas/{_folder(atlas)}",
        "summary": summary_sentence(heads),
        "does": {role.name: role.does for role in ROLES},
        "stacks": _stacks(heads),
        "heads": [
            {key: row[key] for key in ("unit", "stack", "layer", "index", "role", "verdict")}
            | {"sentence": head_sentence(row, claims.get(row["unit"], []))}
            for row in heads
        ],
        "scores": _scores(atlas, units, about),
        "tests": plain({claim.role: claim.about for claim in atlas.claims() if claim.about}),
        "claims": {unit: [_claim(claim) for claim in made] for unit, made in claims.items()},
        "patterns": [_pattern(atlas, prompt) for prompt in atlas.patterns()],
        "readouts": _readouts(atlas),
        "tradeoffs": tradeoffs(atlas, [_kv_of(unit, about) for unit in units]),
        "circuits": circuits(atlas),
        "training": training(atlas),
    }


def _folder(atlas: "Atlas") -> str:
    path = getattr(atlas, "path", None)
    return path.name if path is not None else str(atlas.about.get("model", "model")).rstrip("/").split("/")[-1]


def _stack(unit: str) -> str:
    """The stack of a unit: "" for "L5.H1", "enc" for "enc.L2.H3"."""
    return "" if unit.startswith("L") else unit.split(".", 1)[0]


def _stacks(heads: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = sorted({row["stack"] for row in heads}, key=("enc", "", "cross").index)
    several = len(names) > 1
    titles = {"enc": "Encoder", "": "Decoder" if several else "", "cross": "Cross-attention"}
    return [
        {
            "name": name,
            "title": titles[name],
            "layers": sorted({row["layer"] for row in heads if row["stack"] == name}),
            "width": 1 + max(row["index"] for row in heads if row["stack"] == name),
        }
        for name in names
    ]


def _scores(atlas: "Atlas", units: list[str], about: dict[str, Any]) -> list[dict[str, Any]]:
    """The scores that have a number for heads, in the order of the evidence ladder, aligned with `units`."""
    ladder = ("seen", "read", "needed", "enough", "mediated", "grown")
    scores = [atlas.score(name) for name in atlas.names()]
    kept = [score for score in scores if score.kind in ("head", "kv")]
    kept.sort(key=lambda score: ladder.index(score.evidence))
    return [_score(score, units, about) for score in kept]


def _score(score: "Score", units: list[str], about: dict[str, Any]) -> dict[str, Any]:
    rows = {row["unit"]: row for row in score.frame().to_dicts()}
    places = units if score.kind == "head" else [_kv_of(unit, about) for unit in units]
    columns: dict[str, Any] = {"value": [], "low": [], "high": [], "n": []}
    for place in places:
        row = rows.get(place, {})
        for key, column in columns.items():
            column.append(number(row.get(key)))
    return {
        "name": score.name,
        "kind": score.kind,
        "evidence": score.evidence,
        "about": plain(score.about),
        "code": score_code(score),
        **columns,
    }


def _kv_of(unit: str, about: dict[str, Any]) -> str:
    """The KV head that a query head reads from: "L5.H7" -> "L5.G2" in groups of three."""
    layer, index = unit.rsplit(".H", 1)
    heads, kv_heads = (_at_layer(about.get(key), layer) for key in ("heads", "kv_heads"))
    return f"{layer}.G{int(index) // (heads // kv_heads if heads and kv_heads else 1)}"


def _at_layer(counts: Any, layer: str) -> int | None:
    """A count that may be one for the whole model or one a layer."""
    found = counts.get(layer.rsplit("L", 1)[-1]) if isinstance(counts, dict) else counts
    return found if isinstance(found, int) else None


def _claim(claim: Claim) -> dict[str, Any]:
    rungs = []
    for rung in claim.rungs:
        numbers = {key: number(getattr(rung, key)) for key in RUNG_NUMBERS}
        rungs.append({"step": rung.step, "score": rung.score, "n": rung.n, "passed": bool(rung.passed), **numbers})
    return {"role": claim.role, "verdict": claim.verdict, "rungs": rungs}


def _pattern(atlas: "Atlas", prompt: str) -> dict[str, Any]:
    """One stored prompt. Each layer is [heads, queries, keys] of bytes, deflated, in base64."""
    tokens, text, layers = atlas.pattern(prompt)
    packed = {}
    for layer, values in layers.items():
        block = np.ascontiguousarray(values, dtype=np.uint8)
        name = f"L{layer}" if isinstance(layer, int) else str(layer)
        packed[name] = {
            "shape": list(block.shape),
            "data": base64.b64encode(zlib.compress(block.tobytes(), 9)).decode(),
        }
    return {"id": prompt, "tokens": list(tokens), "text": text, "layers": packed}


def _readouts(atlas: "Atlas") -> dict[str, dict[str, list[list[Any]]]]:
    """By unit and circuit: rows of source token, target token, value, in order of rank within a source."""
    frame = atlas.readouts()
    found: dict[str, dict[str, list[list[Any]]]] = {}
    if frame is None or frame.is_empty():
        return found
    columns = ("unit", "circuit", "source", "target", "value")
    for unit, circuit, source, target, value in frame.select(columns).iter_rows():
        found.setdefault(unit, {}).setdefault(circuit, []).append([source, target, number(value)])
    return found
