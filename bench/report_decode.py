"""The part of docs/bench.md that is about decoding with drafts, from bench/results/decode_*.json."""

from collections.abc import Callable

from goals import goal, least

KINDS = {"repeats": "answers that repeat a text", "open": "answers that do not"}
COPIES = "CopySpec"
OURS = "headwise_drafts"
LOOKUP = "prompt lookup (transformers)"
HEAD = (
    "| method | tokens a second | faster than {first} | tokens a pass | accepted | same text |",
    "| --- | --- | --- | --- | --- | --- |",
)
Circumstances = Callable[[dict], str]


def drafts(load: Callable[[str], dict | None], circumstances: Circumstances) -> str:
    """All sections of which there are results."""
    parts = {
        "speed": _speed,
        "batch": _batch,
        "peers": _peers,
        "plan": _plan,
        "drafts": _trained,
        "same": _same,
        "exact": _exact,
    }
    found = {name: load(f"decode_{name}") for name in parts}
    made = [write(found[name], circumstances) for name, write in parts.items() if found[name] is not None]
    return "\n\n".join(["## Decoding with drafts, default model, float32", *made]) if made else ""


def _table(rows: list[dict], first: str = "greedy") -> str:
    lines = [HEAD[0].format(first=first), HEAD[1]]
    for row in rows:
        accepted = "-" if row["acceptance"] is None else f"{row['acceptance']:.0%}"
        lines.append(
            f"| {row['name']} | {row['tokens_per_second']:.1f} | {row['faster']:.2f} | {row['per_pass']:.2f} | "
            f"{accepted} | {row['same']:.0%} |"
        )
    return "\n".join(lines)


def _about(found: dict, circumstances: Circumstances) -> str:
    load = found["how"]["load"]
    own = f"Load {load[0]} at the start and {load[1]} at the end, this job's own included."
    return " ".join([circumstances(found), own, *([found["note"]] if "note" in found else [])])


def _speed(found: dict, circumstances: Circumstances) -> str:
    parts, how = [], found["how"]
    for kind, words in KINDS.items():
        rows = {row["name"]: row for row in found["rows"] if row["kind"] == kind}
        if not rows:
            continue
        said = [one for more in ("", ", packed") if COPIES + more in rows for one in _copying(kind, rows, more)]
        count = next(iter(rows.values()))["requests"]
        parts += [f"{count} requests, {words}:", _table([*rows.values()]), *([" ".join(said)] if said else [])]
    intro = (
        f"Greedy, {how['tokens']} tokens at most, {how['rounds']} rounds, contestants in turns on every request; a "
        "ratio is the median over rounds. *Same text*: as plain greedy generation gives. Seconds include the reading "
        "of the prompt."
    )
    return "\n\n".join(["### One text at a time", intro, *parts, _about(found, circumstances)])


def _copying(kind: str, rows: dict[str, dict], more: str) -> list[str]:
    """Goals of CopySpec, by itself or with packed weights, against others without and with them."""
    name = COPIES + more
    mine = rows[name]["faster"] / rows["greedy" + more]["faster"]
    if kind == "open":
        return [least(f"Goal, {name} at least 0.97 of greedy", mine, 0.97)]
    against = rows[name]["faster"] / rows[LOOKUP + more]["faster"]
    return [
        least(f"Goal, {name} at least 1.5 times greedy{more}", mine, 1.5),
        least(f"Goal, {name} at least 1.05 times prompt lookup{more}", against, 1.05),
    ]


def _batch(found: dict, circumstances: Circumstances) -> str:
    parts = []
    for kind, words in KINDS.items():
        for size in sorted({row["rows"] for row in found["rows"]}, reverse=True):
            rows = [row for row in found["rows"] if row["kind"] == kind and row["rows"] == size]
            if rows:
                together = f"in batches of {size}" if size > 1 else "one at a time"
                parts += [f"{words.capitalize()}, {together}:", _table(rows)]
                same = next((row["same"] for row in rows if row["name"] == COPIES), None)
                if size > 1 and same is not None:
                    parts.append(
                        goal("Goal, texts of a batch are those without drafts, share of them", same, same == 1)
                    )
    intro = "Prompts of a batch differ in length and are padded on the left; rows accept what each of them can."
    return "\n\n".join(["### Batches", intro, *parts, _about(found, circumstances)])


def _plan(found: dict, circumstances: Circumstances) -> str:
    rows = {row["name"]: row for row in found["rows"]}
    first, how = rows["plan"], found["how"]
    both, alone = rows["plan + CopySpec"], rows[COPIES]["faster"] / rows["greedy"]["faster"]
    product = first["faster"] / rows["greedy"]["faster"] * alone
    share = both["faster"] / rows["greedy"]["faster"] / product
    said = " ".join(
        [
            goal("Goal, plan and CopySpec give the plan's texts, share of them", both["same"], both["same"] == 1),
            least("Goal, together at least 0.85 of the product of what each gains", share, 0.85),
        ]
    )
    intro = (
        f"{first['requests']} requests, {KINDS['repeats']}, {how['tokens']} tokens at most, {how['rounds']} rounds. "
        "Under a plan the model says other texts than without one, so speed and texts are held against the plan alone."
    )
    return "\n\n".join(
        ["### Drafts under a plan", intro, _table([*rows.values()], "the plan"), said, _about(found, circumstances)]
    )


def _same(found: dict, circumstances: Circumstances) -> str:
    return _identical(found, circumstances, "Identical texts")


def _exact(found: dict, circumstances: Circumstances) -> str:
    return _identical(found, circumstances, "Identical texts of a small writer, with every drafter and cache")


def _identical(found: dict, circumstances: Circumstances, title: str) -> str:
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
    return "\n\n".join([f"### {title}", text, "\n".join(lines), circumstances(found)])


def _peers(found: dict, circumstances: Circumstances) -> str:
    parts, how = [], found["how"]
    who = {name: _who(name, have) for name, have in found["versions"].items()} | {OURS: "**headwise**"}
    for kind, words in KINDS.items():
        rows = [row for row in found["rows"] if row["kind"] == kind]
        if not rows:
            continue
        lines = [
            "| | way | tokens a second | of processor time | faster than ours | processor time | same text |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in rows:
            if "failed" in row:
                lines.append(f"| {who.get(row['who'], row['who'])} | | failed: {row['failed']} | | | | |")
                continue
            lines.append(
                f"| {who[row['who']]} | {row['way']} | {row['per_second']:.1f} | {row['per_cpu_second']:.1f} | "
                f"{row['wall_ratio']:.2f} | {row['cpu_ratio']:.2f} | {row['same']} of {row['texts']} |"
            )
        parts += [f"{rows[0]['asked']} requests, {words}:", "\n".join(lines), *_against(rows)]
    intro = (
        f"Batches of {how['rows']} prompts of different lengths, at most {how['tokens']} new tokens, "
        f"{how['rounds']} rounds. Everyone is a process of its own, in an environment of its own, on "
        f"{how['threads']} thread{'s' if how['threads'] > 1 else ''}, and they take turns. A ratio to ours is that of "
        "tokens a second, of wall and of processor time, the median over rounds; *same text* is that of plain greedy "
        "generation of each request by itself. economize takes the prompts without their padding; dejavuu knows no "
        "batches and answers them one after the other."
    )
    about = " ".join([circumstances(found), *([found["note"]] if "note" in found else [])])
    return "\n\n".join(["### Beside economize and dejavuu", intro, *parts, about])


def _who(name: str, have: dict[str, str]) -> str:
    """A contestant with its version and transformers'."""
    peer = name.removesuffix("_older")
    return f"{peer} {have.get(peer, '')}, transformers {have['transformers']}"


def _against(rows: list[dict]) -> list[str]:
    """Goals of the batch: our texts, and our speed against the fastest way of economize."""
    own = [row for row in rows if row["who"] == OURS and row["way"] == COPIES]
    rival = [row for row in rows if row["who"] == "economize" and "failed" not in row]
    if not own:
        return []
    same = own[0]["same"] / own[0]["texts"]
    said = [goal("Goal, a batch gives the texts of its rows, share of them", same, same == 1)]
    if rival:
        best = max(rival, key=lambda row: row["cpu_ratio"])
        for row in (row for row in rows if row["who"] == OURS and row["way"].startswith(COPIES)):
            words = f"Goal, {row['way']} at least as fast in processor time as economize's best ({best['way']})"
            said.append(least(words, row["cpu_ratio"] / best["cpu_ratio"], 1.0))
    return [" ".join(said)]


def _trained(found: dict, circumstances: Circumstances) -> str:
    lines = [
        "| heads | weights | training, minutes | right, 2 to 5 tokens ahead | tokens a pass | accepted | same text "
        "| faster than greedy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        right = ", ".join(f"{share:.0%}" for share in row["right"])
        minutes = "-" if row["cpu"] is None else f"{row['cpu'] / 60:.1f}"
        lines.append(
            f"| {row['name']} | {row['weights']:,} | {minutes} | {right} | {row['per_pass']:.2f} | "
            f"{row['acceptance']:.0%} | {row['same']:.0%} | {row['faster']:.2f} |"
        )
    how, gain = found["how"], found["gain"]
    intro = (
        f"The default model writes {how['texts']} texts of {how['tokens']} tokens ({found['writing'] / 60:.1f} "
        "minutes), and `headwise draft train default` learns from them with each method: "
        f"{how['steps']} steps of {how['rows']} texts. Then both draft greedy text after {found['prompts']} prompts "
        f"with which none of these began, {how['new']} tokens each. Minutes and speed are those of processor time."
    )
    said = (
        f"{least('Goal, Hydra at least 1.1 times the tokens a pass of Medusa', gain, 1.1)} "
        f"p = {found['p']:.2g} (paired, over prompts)."
    )
    parts = ["### Heads trained for the default model", intro, "\n".join(lines), said, _about(found, circumstances)]
    return "\n\n".join(parts)
