"""The circuits' part of docs/bench.md."""

import statistics
from collections.abc import Callable

from goals import goal

NAMES = {"headwise": "**headwise**", "circuitkit": "circuitkit", "auto_circuit": "AutoCircuit"}
JOBS = {"eap": "EAP, one gradient", "eap_ig": "EAP-IG, five gradients", "mask_gradient": "mask gradient, five points"}
FASTER = 3
METHODS = {"eap": "EAP", "eap_ig": "EAP-IG", "conductance": "conductance", "cd_t": "CD-T"}


def circuits(load: Callable[[str], dict | None]) -> str:
    """Both sections, each where it has been run."""
    return "\n\n".join(part for part in (ranks(load("circuits_spearman")), race(load("circuits_race"))) if part)


def ranks(found: dict | None) -> str:
    """Cheap edges beside exact ones."""
    if found is None:
        return ""
    rows = sorted(found["rows"], key=lambda r: r["task"])
    names = [name for name in METHODS if any(name in r["spearman"] for r in rows)]
    head = "| task | prompts | edges | " + " | ".join(METHODS[n] for n in names)
    lines = [
        head + " | " + " | ".join(f"{METHODS[n]}, sizes" for n in names) + " |",
        "| --- " * (3 + 2 * len(names)) + "|",
    ]
    for r in rows:
        values = [f"{r[key][n]:.2f}" if n in r[key] else "-" for key in ("spearman", "of_sizes") for n in names]
        lines.append(f"| {r['task']} | {r['prompts']} | {r['edges']} of {r['of']} | {' | '.join(values)} |")
    seconds = ", ".join(f"{n} {sum(r['seconds'].get(n, 0) for r in rows):.0f}" for n in (*names, "exact"))
    few = min(r.get("on", {}).get("cd_t", r["prompts"]) for r in rows)
    weighed = [r.get("weighed", {}).get("cd_t", r["edges"]) for r in rows]
    text = (
        "Rank correlations with exact path patching over the same edges of the default model: some drawn at random, as "
        "many from the thousand largest of each method. CD-T, which takes a pass a node, runs on the first "
        f"{few} prompts, weighs {min(weighed)} to {max(weighed)} of the edges, and is held against exact patching of "
        "those. *Sizes* leave the sign out. Seconds of all tasks, on a machine that others used as well: "
        f"{seconds}."
    )
    about = f"{found['when']}; torch {found['torch']}; `python bench/circuits.py spearman`."
    return "\n\n".join(
        ["## Edges by gradient and by decomposition beside exact path patching", text, "\n".join(lines), about]
    )


def race(found: dict | None) -> str:
    """Time and faithfulness at equal edges."""
    if found is None:
        return ""
    sizes = [str(size) for size in found["sizes"]]
    lines = [
        f"| | | processor seconds | wall seconds | {' | '.join(f'{size} edges' for size in sizes)} |",
        "| --- " * (4 + len(sizes)) + "|",
    ]
    failed, cpu = [], {}
    for r in found["rows"]:
        if "failed" in r:
            failed.append(f"{NAMES[r['name']]} failed at {JOBS[r['job']]}: {r['failed'].strip().splitlines()[-1]}.")
            continue
        cpu[r["job"], r["name"]] = statistics.median(c["cpu"] for c in r["clocks"])
        clocks = [statistics.median(c[key] for c in r["clocks"]) for key in ("cpu", "wall")]
        kept = [f"{r['faithfulness'][size]:.0%}" for size in sizes]
        lines.append(
            f"| {JOBS[r['job']]} | {NAMES[r['name']]} | {clocks[0]:.1f} | {clocks[1]:.1f} | {' | '.join(kept)} |"
        )
    goals = [
        _goal(job, name, value / cpu[job, "headwise"], found)
        for (job, name), value in cpu.items()
        if name != "headwise" and (job, "headwise") in cpu
    ]
    apart = [r["logits_apart"] for r in found["rows"] if r.get("logits_apart") is not None]
    text = (
        f"Indirect objects on the default model, {found['prompts']} prompts of {found['tokens']} tokens; every "
        "contestant weighs all edges, and its largest ones, grown backwards from the logits, are a circuit: the share "
        f"of the logit difference that the circuit keeps on {found['held_out']} other prompts, all other edges "
        "patched. Both peers run the model in TransformerLens 3.8, whose registry does not know it; it was converted "
        "by its own converter "
        f"for Llama (largest difference of a logit {max(apart, default=float('nan')):.0e}). AutoCircuit averages over "
        "masks where EAP-IG averages over inputs, and circuitkit has no such method. At the last of the five points "
        "every edge is patched and the gradient is 0; headwise leaves that pass out. Weights of keys and values are "
        "summed over the heads that share them."
    )
    versions = "; ".join(
        f"{name} {v.get(name.replace('_', '-'), v.get('headwise', ''))} (torch {v['torch']}, transformers "
        f"{v['transformers']})".replace("  ", " ")
        for name, v in found.get("versions", {}).items()
    )
    loads = [r["load"] for r in found["rows"] if "load" in r]
    about = (
        f"{found['when']}; {versions}. Load of the machine {min(loads, default=0):.1f} to {max(loads, default=0):.1f}."
    )
    parts = ("## Circuit discovery beside its peers", text, "\n".join(lines), " ".join(goals), " ".join(failed), about)
    return "\n\n".join(part for part in parts if part)


def _goal(job: str, name: str, ratio: float, found: dict) -> str:
    """One contestant against the goal; faithfulness is compared to the percent, as in the table."""
    mine, other = (
        next(r["faithfulness"] for r in found["rows"] if (r["job"], r["name"]) == (job, one) and "failed" not in r)
        for one in ("headwise", name)
    )
    less = [size for size in mine if round(100 * mine[size]) < round(100 * other[size])]
    words = f"Goal, {JOBS[job]}, at least {FASTER} times faster than {NAMES[name]} and as faithful at every size"
    return goal(words, ratio, ratio >= FASTER and not less) + (f" Less faithful at {', '.join(less)}." if less else "")
