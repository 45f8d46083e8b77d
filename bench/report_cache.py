"""The part of docs/bench.md that is about caches, from bench/results/cache_*.json."""

import statistics
from collections.abc import Callable

from goals import goal, least

# Whose processors, as files of results have it; kernels differ by that.
MAKERS = {"amd": "an AMD processor", "intel": "an Intel processor", "other": "another processor"}
# Where bytes are counted and a plan is tried, unless told.
USUAL = {"at": 8192, "test_at": 1024}
QUICK, ALONE, BY_PYTORCH = ", quick products", ", the model's products", ", read by PyTorch"

LEFT = (
    "PyTorch's own products read the weights at full speed here, so `attach` leaves them, and peers and ours multiply "
    "by the same kernels."
)


def caches(load: Callable[[str], dict | None], circumstances: Callable[[dict], str]) -> str:
    """All sections of which there are results."""
    parts = [
        *(_time(load(f"cache_time_{maker}"), maker, circumstances) for maker in MAKERS),
        _memory(load("cache_memory"), circumstances),
        _same(load("cache_same"), circumstances),
        _plans(load("cache_plan"), circumstances),
        _rankings(load("cache_rankings"), circumstances),
        _all_answers(load("cache_quality"), circumstances),
    ]
    made = [part for part in parts if part]
    return "\n\n".join(["## KV caches, default model, float32", *made]) if made else ""


def _time(found: dict | None, maker: str, circumstances: Callable[[dict], str]) -> str:
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
            said.append(goal("Goal, lossless at least 1.5 times DynamicCache at 8192", full, full >= 1.5))
            said.append(goal("Goal, half full at least 2 times DynamicCache", half[0], half[0] >= 2))
            said.append(goal("Goal, half full at least 1.2 times StaticCache", half[1], half[1] >= 1.2))
            for share, most in (("50% full", 0.55), ("30% full", 0.4)):
                size = rows[share]["bytes"] / rows["DynamicCache"]["bytes"]
                said.append(goal(f"Goal, bytes with {share} at most {most}", size, size <= most))
            first = rows["50% full"]["prefill"] / rows["DynamicCache"]["prefill"]
            said.append(goal("Goal, prompt with half full at most 1.05 of DynamicCache's time", first, first <= 1.05))
            said.append(_apart(ratio) if f"all full{ALONE}" in rows else LEFT)
            if f"all full{BY_PYTORCH}" in rows:
                full, half = (ratio(f"{name}{BY_PYTORCH}", "DynamicCache") for name in ("all full", "50% full"))
                static = ratio(f"50% full{BY_PYTORCH}", "StaticCache")
                said.append(
                    "Keys are read by C that is compiled on the machine (headwise/compiled.py). Where there is no "
                    f"compiler and PyTorch reads, everything kept is {full:.2f} and half {half:.2f} times as fast as "
                    f"DynamicCache, and half {static:.2f} times StaticCache."
                )
            else:
                said.append("PyTorch read the keys: this is older than headwise/compiled.py, or had no compiler.")
            if "one token" in rows:
                least_ms, most = 1000 * rows["one token"]["decode"], ratio("one token", "DynamicCache")
                said.append(
                    f"A step in which attention reads one token takes {least_ms:.1f} ms, the time of the model itself: "
                    f"no cache could be more than {most:.2f} times as fast as DynamicCache here, or "
                    f"{ratio('one token', 'StaticCache'):.2f} times StaticCache."
                )
    intro = (
        "Contestants decode in turns in one process; a ratio is the median over rounds. Peers run in the model as it "
        "is, ours as `attach` leaves it, unless the name says otherwise. The prompt is read in one pass; heads that "
        "are not full stream in it too (cache.duo, sink 64, recent 256)."
    )
    loads = [row.get("load", [0, 0]) for row in found["rows"]]
    load = f"Load while measuring {min(map(min, loads)):.1f} to {max(map(max, loads)):.1f}, this job's own included."
    return "\n\n".join(
        [
            f"### Time on {MAKERS[maker]}",
            intro,
            "\n".join(lines),
            *([" ".join(said)] if said else []),
            circumstances(found) + " " + load,
        ]
    )


def _apart(ratio: Callable[[str, str], float]) -> str:
    """What the caches do alone, and what they do beside peers that multiply as quickly."""
    dynamic, static = f"DynamicCache{QUICK}", f"StaticCache{QUICK}"
    full, half = f"all full{ALONE}", f"50% full{ALONE}"
    return (
        "The goals above are of a model as `attach` leaves it: its linear layers multiply up to four tokens by a "
        "kernel that reads the weights at full speed, which takes no memory (headwise/matmul.py). The two apart: with "
        f"the model's own products everything kept is {ratio(full, 'DynamicCache'):.2f} and half "
        f"{ratio(half, 'DynamicCache'):.2f} times as fast as DynamicCache, and half {ratio(half, 'StaticCache'):.2f} "
        f"times StaticCache; with quick products DynamicCache is {ratio(dynamic, 'DynamicCache'):.2f} and StaticCache "
        f"{ratio(static, 'StaticCache'):.2f} times as fast as itself. Where peers multiply as quickly: "
        + " ".join(
            least(f"Goal, {what}", ratio(mine, rival), bound)
            for what, mine, rival, bound in (
                ("lossless at least 1.5 times DynamicCache", "all full", dynamic, 1.5),
                ("half full at least 2 times DynamicCache", "50% full", dynamic, 2),
                ("half full at least 1.2 times StaticCache", "50% full", static, 1.2),
            )
        )
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
    often = f"{runs} runs, medians" if runs > 1 else "one run"
    intro = (
        f"{found['length']} tokens read in chunks of 1024, then 64 decoded; a process of its own each time, {often}."
    )
    said = goal("Goal, half full at most 0.75 of DynamicCache's peak", share, share <= 0.75)
    return "\n\n".join(["### Memory", intro, "\n".join(lines), said, circumstances(found)])


def _same(found: dict | None, circumstances: Callable[[dict], str]) -> str:
    if found is None:
        return ""
    low, high = min(found["lengths"]), max(found["lengths"])
    return (
        f"### Sameness\n\n{found['identical']} of {found['prompts']} prompts of {low} to {high} tokens are continued "
        f"by the same {found['tokens']} tokens as by plain `generate`, everything kept"
        + (f"; {found['packed']} of them with packed weights. " if "packed" in found else ". ")
        + circumstances(found)
    )


def _plans(found: dict | None, circumstances: Callable[[dict], str]) -> str:
    if found is None:
        return ""
    parts, rule = ["### Plans and their trials"], ""
    for one in found["entries"]:
        if one["trial"]["rule"] != rule:
            rule = one["trial"]["rule"]
            parts.append(f"A plan is accepted by this rule: {rule[0].lower()}{rule[1:]}")
        parts.append(_plan(one, circumstances))
    return "\n\n".join(parts)


def _plan(found: dict, circumstances: Callable[[dict], str]) -> str:
    lines = ["| cache | bytes | answers kept | retrieval | nats a token |", "| --- | --- | --- | --- | --- |"]
    for row in found["trial"]["rows"]:
        lines.append(
            f"| {row['name']} | {row['share']:.0%} | {row['kept']:.0%} | {row['retrieval']:.2f} | {row['nll']:.3f} |"
        )
    verdict = "Accepted" if found["trial"]["accepted"] else "Rejected"
    how = "".join(f" --{name.replace('_', '-')} {found[name]}" for name, usual in USUAL.items() if found[name] != usual)
    about = (
        f"`headwise plan default --bytes {found['bytes']:g}{how}`: {found['seconds']:.0f} seconds ({found['cpu']:.0f} "
        f"of processor time); {found['count'].get('full', 0)} of {sum(found['count'].values())} KV heads full, chosen "
        f"by {found['ranking']}, tried at {found['test_at']} tokens. {verdict}. {found['trial']['says']}"
    )
    said = goal("Goal, at most 600 seconds", found["seconds"], found["seconds"] <= 600)
    return "\n\n".join([about, "\n".join(lines), said, circumstances(found)])


def _rankings(found: dict | None, circumstances: Callable[[dict], str]) -> str:
    if found is None:
        return ""
    recipes = [name for name in found["jobs"] if name.startswith("DuoAttention's recipe")]
    trained = [f"{name}, {_prompts(*found['jobs'][name][1])}" for name in ("duo_gate", *recipes)]
    budgets, taken = found["budgets"], found["seconds"]
    seconds = {name: statistics.median(each) for name, each in taken.items()}
    lines = [
        f"| full heads chosen by | seconds | {' | '.join(_budget(one, found['seeds']) for one in budgets)} |",
        "| --- " * (2 + len(budgets)) + "|",
    ]
    for name in budgets[0]["rows"]:
        time = ", ".join(f"{one:.0f}" for one in taken.get(name, ()))
        lines.append(f"| {name} | {time} | {' | '.join(_worth(one['rows'][name]) for one in budgets)} |")
    asked = " and ".join(str(one["asked"]) for one in budgets)
    about = (
        f"The first KV heads of a ranking keep everything, the others 64 and 256 tokens; {found['length']} tokens, "
        f"{asked} answers to prompts that chose nothing, and the loss on held-out text in nats a token. Rankings "
        "with a plus between them are fused by reciprocal ranks. Seconds are those of the scores, taken in turns (the "
        f"first from {found['timed'][0]}); goals are of medians. DuoAttention's recipe is gates that act from the "
        "first token on; duo_gate reads each context once, and its gates act behind it. They are trained on: "
        f"{'; '.join(trained)}."
    )
    fused = {name: took for name, took in seconds.items() if " + " in name}
    said = [goal(f"Goal, scores of {name} at most 60 seconds", took, took <= 60) for name, took in fused.items()]
    for one in budgets:
        kept = {name: statistics.mean(row["kept"]) for name, row in one["rows"].items()}
        for recipe in recipes:
            quickest = min((name for name in seconds if kept[name] >= kept[recipe]), key=seconds.__getitem__)
            what = (
                f"Goal, as much kept as by {recipe} with {one['full']} heads full in a tenth of its time ({quickest})"
            )
            said.append(least(what, seconds[recipe] / seconds[quickest], 10))
    parts = ["### What rankings cost and are worth", about, "\n".join(lines), " ".join(said), circumstances(found)]
    return "\n\n".join(parts)


def _prompts(fields: dict, _: str, about: dict, n: int) -> str:
    return f"{n} prompts of {about['length']} tokens, {about['passkeys']} passkeys, {fields['steps']} steps"


def _budget(one: dict, seeds: list[int]) -> str:
    return f"answers kept, {one['full']} heads full, seeds {', '.join(map(str, seeds))}; loss"


def _worth(row: dict) -> str:
    return f"{', '.join(f'{one:.0%}' for one in row['kept'])}; {statistics.mean(row['loss']):+.3f}"


def _all_answers(found: dict | None, circumstances: Callable[[dict], str]) -> str:
    if found is None:
        return ""
    about = (
        "Bytes as they are held when a prompt is answered; in those of 8 bits every number is coded by torchao. "
        "Contexts are read before the questions, so SnapKV and Ada-KV choose without having seen them; they keep as "
        "many tokens as the plan has bytes for, and the rest of what they hold is room for later tokens. kvpress 0.5.5 "
        "runs in an environment of its own (transformers 5.2.0), on the same prompts. Its head-wise presses mask keys "
        "and free none, so that they hold all bytes."
    )
    each = (_answers(one, found["entries"][0], circumstances) for one in found["entries"])
    return "\n\n".join(["### Answers at equal bytes", about, *each])


def _full(found: dict) -> set[str]:
    return {unit for unit, name in found["heads"].items() if name == "full"}


def _answers(found: dict, first: dict, circumstances: Callable[[dict], str]) -> str:
    tasks = list(found["rows"][0]["accuracy"])
    lines = [
        f"| cache | bytes | answers kept | {' | '.join(tasks)} | nats a token |",
        f"| --- | --- | --- | {' | '.join('---' for _ in tasks)} | --- |",
    ]
    for row in found["rows"]:
        each = " | ".join(f"{row['accuracy'][task]:.0%}" for task in tasks)
        lines.append(f"| {row['name']} | {row['share']:.0%} | {row['kept']:.0%} | {each} | {row['nll']:.3f} |")
    full = found["rows"][0]["bytes"]
    kept = _full(found)
    for name, row in found.get("kvpress", {}).items():
        if "failed" in row:
            lines.append(f"| {name} | failed: {row['failed']} | | {' | '.join('' for _ in tasks)} | |")
            continue
        each = " | ".join(f"{row['accuracy'][task]:.0%}" for task in tasks)
        shared = len(set(row.get("full", [])) & kept)
        chosen = f", {shared} of its heads are the plan's" if row.get("full") and set(row["full"]) != kept else ""
        lines.append(f"| {name}{chosen} | {row['bytes'] / full:.0%} | | {each} | |")
    total = sum(found["plan"].values())
    intro = f"The plan keeps {found['plan'].get('full', 0)} of {total} KV heads full."
    if kept != _full(first):
        intro += f" It is another one than above: {len(kept & _full(first))} of these are full in both."
    peers = [row for row in found.get("kvpress", {}).values() if "failed" not in row]
    if peers and not all(row.get("forced") for row in peers):
        intro += (
            " Its rows go on from what it said itself, where the others read the right tokens. A wrong answer then "
            "misleads later questions of a prompt (keys), so compare them with the row without a press."
        )
    if "read" in found:
        read = f"{found['read']['texts']} windows of {found['read']['tokens']} tokens of our held-out text"
        intro += (
            " Where kvpress chooses heads itself (`on_the_fly_scoring`, as many as the plan, 128 sinks and 256 recent "
            f"tokens) it reads {read}: the data set that it would load, BookSum, cannot be had on this machine. "
            f"kvpress ran on {found['read']['when']}."
        )
    said = " ".join([_enough(found.get("full", {})), *_answer_goals(found)]).strip()
    title = f"#### {found['length']} tokens"
    return "\n\n".join([title, intro, "\n".join(lines), *([said] if said else []), circumstances(found)])


def _enough(full: dict[str, dict[str, float]]) -> str:
    """At which lengths the full cache answers well enough that a loss can be seen."""
    if not full:
        return ""
    tasks = next(iter(full.values()))
    enough = {task: [at for at, accuracy in full.items() if accuracy[task] >= 0.9] for task in tasks}
    there = [f"{task} at {' and '.join(lengths)}" for task, lengths in enough.items() if lengths]
    return (
        f"Of {' and '.join(full)} tokens, the full cache is right in at least 90% of the prompts in: "
        f"{', '.join(there) or 'none'}. Elsewhere look at the share of its right answers that is kept."
    )


def _answer_goals(found: dict) -> list[str]:
    """What the plan keeps beside the full cache, random heads of equal bytes, and kvpress's own choice of heads."""
    rows = {row["name"]: row for row in found["rows"]}

    def points(row: dict) -> float:
        return 100 * statistics.mean(row["accuracy"].values())

    plan, said = rows["plan"], []
    said.append(goal("Goal, at most 0.4 of the full cache's bytes", plan["share"], plan["share"] <= 0.4))
    said.append(least("Goal, plan keeps at least 0.95 of the full cache's right answers", plan["kept"], 0.95))
    above = points(plan) - statistics.mean(points(row) for name, row in rows.items() if name.startswith("random"))
    said.append(least("Goal, at least 20 points above random heads of equal bytes", above, 20))
    own = found.get("kvpress", {}).get("kvpress DuoAttention, its own choice", {})
    if "accuracy" in own:
        said.append(least("Goal, points above kvpress's choice of as many heads", points(plan) - points(own), 0))
    if "plan, 8 bits" in rows:
        coded = rows["plan, 8 bits"]
        size, lost = coded["bytes"] / plan["bytes"], points(plan) - points(coded)
        said.append(goal("Goal, 8 bits take at most 0.5 of the plan's bytes", size, size <= 0.5))
        said.append(goal("Goal, 8 bits lose at most 1 point", lost, lost <= 1))
    return said
