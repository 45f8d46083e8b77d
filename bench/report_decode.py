"""The part of docs/bench.md that is about decoding with drafts, from bench/results/decode_*.json."""

from collections.abc import Callable

KINDS = {"repeats": "answers that repeat a text", "open": "answers that do not"}
COPIES = "CopySpec, 24 tokens"
LOOKUP = "prompt lookup (transformers)"
HEAD = (
    "| method | tokens a second | faster than greedy | tokens a pass | accepted | same text |",
    "| --- | --- | --- | --- | --- | --- |",
)


def drafts(load: Callable[[str], dict | None], circumstances: Callable[[dict], str]) -> str:
    """All sections of which there are results."""
    parts = [
        _speed(load("decode_speed"), circumstances),
        _batch(load("decode_batch"), circumstances),
        _same(load("decode_same"), circumstances),
    ]
    made = [part for part in parts if part]
    return "\n\n".join(["## Decoding with drafts, default model, float32", *made]) if made else ""


def _goal(what: str, value: float, met: bool) -> str:
    return f"{what}: {value:.2f}, {'met' if met else 'missed'}."


def _line(row: dict) -> str:
    accepted = "-" if row["acceptance"] is None else f"{row['acceptance']:.0%}"
    return (
        f"| {row['name']} | {row['tokens_per_second']:.1f} | {row['faster']:.2f} | {row['per_pass']:.2f} | "
        f"{accepted} | {row['same']:.0%} |"
    )


def _speed(found: dict | None, circumstances: Callable[[dict], str]) -> str:
    if found is None:
        return ""
    parts, how = [], found["how"]
    for kind, words in KINDS.items():
        rows = {row["name"]: row for row in found["rows"] if row["kind"] == kind}
        if not rows:
            continue
        lines = [*HEAD, *map(_line, rows.values())]
        said = []
        if kind == "repeats" and COPIES in rows:
            mine = rows[COPIES]["faster"]
            against = mine / rows[LOOKUP]["faster"]
            said.append(_goal("Goal, CopySpec at least 1.5 times greedy", mine, mine >= 1.5))
            said.append(_goal("Goal, at least 1.05 times prompt lookup", against, against >= 1.05))
        elif COPIES in rows:
            mine = rows[COPIES]["faster"]
            said.append(_goal("Goal, CopySpec at least 0.97 of greedy", mine, mine >= 0.97))
        if "plan + CopySpec" in rows:
            both = rows["plan + CopySpec"]["faster"] / (rows["plan"]["faster"] * rows[COPIES]["faster"])
            said.append(_goal("Goal, plan and CopySpec together at least 0.85 of the product", both, both >= 0.85))
        count = next(iter(rows.values()))["requests"]
        parts += [f"{count} requests, {words}:", "\n".join(lines), " ".join(said)]
    intro = (
        f"Greedy, {how['tokens']} tokens at most, {how['rounds']} rounds, contestants in turns on every request; a "
        "ratio is the median over rounds. *Same text*: as plain greedy generation gives; with a plan the text is "
        "another. Seconds include the reading of the prompt."
    )
    load = f"Load {how['load'][0]} at the start and {how['load'][1]} at the end, this job's own included."
    return "\n\n".join(["### One text at a time", intro, *parts, f"{circumstances(found)} {load}"])


def _batch(found: dict | None, circumstances: Callable[[dict], str]) -> str:
    if found is None:
        return ""
    parts = []
    for kind, words in KINDS.items():
        for size in sorted({row["rows"] for row in found["rows"]}, reverse=True):
            rows = [row for row in found["rows"] if row["kind"] == kind and row["rows"] == size]
            if rows:
                together = f"in batches of {size}" if size > 1 else "one at a time"
                parts += [f"{words.capitalize()}, {together}:", "\n".join([*HEAD, *map(_line, rows)])]
    intro = "Prompts of a batch differ in length and are padded on the left; rows accept what each of them can."
    return "\n\n".join(["### Batches", intro, *parts, circumstances(found)])


def _same(found: dict | None, circumstances: Callable[[dict], str]) -> str:
    if found is None:
        return ""
    lines = ["| cache | batch | texts | identical, by drafter |", "| --- | --- | --- | --- |"]
    groups: dict[tuple, list[dict]] = {}
    for row in found["rows"]:
        groups.setdefault((row["cache"], row["batch"], row["texts"]), []).append(row)
    for (cache, size, texts), rows in groups.items():
        said = (
            "all"
            if all(row["identical"] == texts for row in rows)
            else ", ".join(f"{row['drafter']} {row['identical']}" for row in rows)
        )
        lines.append(f"| {cache} | {size} | {texts} | {said} |")
    whole = sum(row["texts"] for row in found["rows"])
    right = sum(row["identical"] for row in found["rows"])
    text = (
        f"Texts of {found['how']['tokens']} tokens with drafts beside plain greedy generation through the same cache: "
        f"{right} of {whole} are identical in every token."
    )
    return "\n\n".join(["### Identical texts", text, "\n".join(lines), circumstances(found)])
