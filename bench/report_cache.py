"""The part of docs/bench.md that is about caches, from bench/results/cache_*.json."""

import statistics
from collections.abc import Callable


def caches(load: Callable[[str], dict | None], circumstances: Callable[[dict], str]) -> str:
    """All sections of which there are results."""
    parts = [
        _time(load("cache_time"), circumstances),
        _memory(load("cache_memory"), circumstances),
        _same(load("cache_same"), circumstances),
        _plan(load("cache_plan"), circumstances),
        _answers(load("cache_quality"), circumstances),
    ]
    made = [part for part in parts if part]
    return "\n\n".join(["## KV caches, default model, float32", *made]) if made else ""


def _goal(what: str, value: float, met: bool) -> str:
    return f"{what}: {value:.2f}, {'met' if met else 'missed'}."


def _time(found: dict | None, circumstances: Callable[[dict], str]) -> str:
    if found is None:
        return ""
    lines = [
        "| tokens | cache | ms a new token | faster than DynamicCache | than StaticCache | prompt, s | MB held |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    said = []
    for at in sorted({row["at"] for row in found["rows"]}):
        rows = {row["name"]: row for row in found["rows"] if row["at"] == at}

        def ratio(name: str, rival: str, rows: dict = rows) -> float:
            pairs = zip(rows[rival]["decodes"], rows[name]["decodes"], strict=True)
            return statistics.median(one / other for one, other in pairs)

        for name, row in rows.items():
            against = " | ".join(f"{ratio(name, rival):.2f}" for rival in ("DynamicCache", "StaticCache"))
            lines.append(
                f"| {at} | {name} | {1000 * row['decode']:.1f} | {against} | {row['prefill']:.1f} | "
                f"{row['bytes'] / 1e6:.0f} |"
            )
        if at == 8192:
            half = max(ratio("50% full", "DynamicCache"), 0), ratio("50% full", "StaticCache")
            full = ratio("all full", "DynamicCache")
            said.append(_goal("Goal, lossless at least 1.5 times DynamicCache at 8192", full, full >= 1.5))
            said.append(_goal("Goal, half full at least 2 times DynamicCache", half[0], half[0] >= 2))
            said.append(_goal("Goal, half full at least 1.2 times StaticCache", half[1], half[1] >= 1.2))
            for share, most in (("50% full", 0.55), ("30% full", 0.4)):
                size = rows[share]["bytes"] / rows["DynamicCache"]["bytes"]
                said.append(_goal(f"Goal, bytes with {share} at most {most}", size, size <= most))
            first = rows["50% full"]["prefill"] / rows["DynamicCache"]["prefill"]
            said.append(_goal("Goal, prompt with half full at most 1.05 of DynamicCache's time", first, first <= 1.05))
    intro = (
        "Contestants decode in turns in one process; a ratio is the median over rounds. Peers run in the model as it "
        "is. The prompt is read in one pass; heads that are not full stream in it too (cache.duo, sink 64, recent 256)."
    )
    loads = [row.get("load", [0, 0]) for row in found["rows"]]
    load = f"Load while measuring {min(map(min, loads)):.1f} to {max(map(max, loads)):.1f}, this job's own included."
    return "\n\n".join(
        ["### Time", intro, "\n".join(lines), *([" ".join(said)] if said else []), circumstances(found) + " " + load]
    )


def _memory(found: dict | None, circumstances: Callable[[dict], str]) -> str:
    if found is None:
        return ""
    names = list(dict.fromkeys(row["name"] for row in found["rows"]))
    lines = ["| cache | MB of tensors | process grew at its peak, MB | of DynamicCache |", "| --- | --- | --- | --- |"]

    def peak(name: str) -> float:
        return statistics.median(row["peak"] or row["maxrss_grew"] for row in found["rows"] if row["name"] == name)

    for name in names:
        size = next(row["bytes"] for row in found["rows"] if row["name"] == name)
        lines.append(
            f"| {name} | {size / 1e6:.0f} | {peak(name) / 1e6:.0f} | {peak(name) / peak('DynamicCache'):.2f} |"
        )
    share = peak("50% full") / peak("DynamicCache")
    runs = max(row["turn"] for row in found["rows"]) + 1
    intro = (
        f"{found['length']} tokens read in chunks of 1024, then 64 decoded; a process of its own each time, "
        f"{runs} runs, medians."
    )
    goal = _goal("Goal, half full at most 0.75 of DynamicCache's peak", share, share <= 0.75)
    return "\n\n".join(["### Memory", intro, "\n".join(lines), goal, circumstances(found)])


def _same(found: dict | None, circumstances: Callable[[dict], str]) -> str:
    if found is None:
        return ""
    low, high = min(found["lengths"]), max(found["lengths"])
    return (
        f"### Sameness\n\n{found['identical']} of {found['prompts']} prompts of {low} to {high} tokens are continued "
        f"by the same {found['tokens']} tokens as by plain `generate`, everything kept. {circumstances(found)}"
    )


def _plan(found: dict | None, circumstances: Callable[[dict], str]) -> str:
    if found is None:
        return ""
    lines = ["| cache | bytes | answers kept | retrieval | nats a token |", "| --- | --- | --- | --- | --- |"]
    for row in found["trial"]["rows"]:
        lines.append(
            f"| {row['name']} | {row['share']:.0%} | {row['kept']:.0%} | {row['retrieval']:.2f} | {row['nll']:.3f} |"
        )
    verdict = "Accepted" if found["trial"]["accepted"] else "Rejected"
    about = (
        f"`headwise plan default --bytes {found['bytes']:g}`: {found['seconds']:.0f} seconds ({found['cpu']:.0f} of "
        f"processor time), heads chosen by {found['ranking']}, tried at {found['test_at']} tokens. {verdict}. "
        f"{found['trial']['says']} {found['trial']['rule']}"
    )
    return "\n\n".join(["### A plan and its trial", about, "\n".join(lines), circumstances(found)])


def _answers(found: dict | None, circumstances: Callable[[dict], str]) -> str:
    if found is None:
        return ""
    tasks = list(found["rows"][0]["accuracy"])
    lines = [
        f"| cache | bytes | answers kept | {' | '.join(tasks)} | nats a token |",
        f"| --- | --- | --- | {' | '.join('---' for _ in tasks)} | --- |",
    ]
    for row in found["rows"]:
        each = " | ".join(f"{row['accuracy'][task]:.0%}" for task in tasks)
        lines.append(f"| {row['name']} | {row['share']:.0%} | {row['kept']:.0%} | {each} | {row['nll']:.3f} |")
    full = found["rows"][0]["bytes"]
    for name, row in found.get("kvpress", {}).items():
        if "failed" in row:
            lines.append(f"| {name} | failed: {row['failed']} | | {' | '.join('' for _ in tasks)} | |")
            continue
        each = " | ".join(f"{row['accuracy'][task]:.0%}" for task in tasks)
        lines.append(f"| {name} | {row['bytes'] / full:.0%} | | {each} | |")
    intro = (
        f"{found['length']} tokens; the plan keeps {found['plan'].get('full', 0)} of "
        f"{sum(found['plan'].values())} KV heads full. Bytes as they are held when a prompt is answered; in those of 8 "
        "bits every number is coded by torchao. Contexts are read before the questions, so SnapKV and Ada-KV choose "
        "without having seen them; they keep as many tokens as the plan has bytes for, and the rest of what they hold "
        "is room for later tokens. kvpress 0.5.5 runs in an environment of its own (transformers 5.2.0), on the same "
        "prompts."
    )
    peers = [row for row in found.get("kvpress", {}).values() if "failed" not in row]
    if peers and not all(row.get("forced") for row in peers):
        intro += (
            " Its rows go on from what it said itself, where the others read the right tokens. A wrong answer then "
            "misleads later questions of a prompt (keys), so compare them with the row without a press."
        )
    return "\n\n".join(["### Answers at equal bytes", intro, "\n".join(lines), circumstances(found)])
