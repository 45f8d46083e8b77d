"""Writes docs/bench.md from bench/results/*.json: python bench/report.py. No number in that page is typed by hand."""

import json
import statistics
from pathlib import Path

from report_cache import caches
from report_circuits import circuits
from report_decode import drafts

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
NAMES = {
    "bare": "bare forward pass",
    "hooks": "plain transformers",
    "hooks_restricted": "plain transformers, only the logits in use",
    "transformer_lens": "TransformerLens",
    "nnsight": "nnsight",
    "headwise": "**headwise**",
    "headwise_blas": "headwise, PyTorch's own products",
    "headwise_bf16": "**headwise, bfloat16 rows**",
}
LAST = "Exact ablation scan, the answer in the last column"
INTRODUCTION = """
Written by `python bench/report.py` from `bench/results/`. Each part is a file of `bench/`, whose first lines say how it
is run; `make bench` runs those of reading, scans, the screen and the map. Contestants are processes of their own that
run in turn, one at a time, so that the machine's moods hit all alike. Seconds and ratios are medians; a ratio is taken
within a round. *Processor seconds* count only the time that a process was given: where others shared the machine, they
are the figure to trust, and goals are judged by them.
""".strip()
NOTES = """
## What was tried for the scan

- Sharing the prefix: kept. By itself it cannot pass the bound above, as a head of layer l runs all layers from l
  again.
- float32 products by oneDNN rather than MKL: kept. PyTorch hands float32 products to MKL, which leaves AVX-512 unused
  on AMD processors; oneDNN's rounding is of the same size (tests/test_scan.py). On an Intel processor expect no gain.
  Plain loops would gain as much if their authors knew; the row "PyTorch's own products" shows headwise without it.
- Rounding whole linear layers, or a whole copy of the model, to bfloat16: dropped. Most effects are smaller than that
  noise: on 90 heads with mean ablation, rank correlations with the exact effects were 0.957 and 0.952.
- Rounding only the difference from the unchanged run: kept as bfloat16 rows, see the rank correlation above. It reads
  the remembered values of every linear layer, so it is bound by memory as much as by products.
- Packing oneDNN's weights beforehand: a few percent for prompts as long as a scan's, for a second copy of all weights.
  Dropped there; passes of a few tokens gain two to three times (headwise/packing.py).
- `torch.backends.mkldnn.matmul.fp32_precision = "bf16"`: on a processor with AVX512_BF16 but no AMX it changes
  nothing but the kernel; the products stay float32. Dropped.
- Starting layer l after its attention, and running the last layer at the answer's column only: each saves less than
  one layer of some fifteen, and needs knowledge of every attention module's insides. Not done.
"""


def load(name: str) -> dict | None:
    """One file of results, None where that part has not been run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def main() -> None:
    parts = [
        "# Side by side",
        INTRODUCTION,
        reads(load("read_sites")),
        scan(with_own_race(load("ablation_scan_last_sample"), load("ablation_scan_last_bf16")), LAST),
        scan(load("ablation_scan_all_sample"), "Exact ablation scan, answers in all columns"),
        full(load("ablation_scan_last_full")),
        screening(load("screen")),
        mapping(load("map_time")),
        circuits(load),
        caches(load, circumstances),
        drafts(load, circumstances),
        NOTES.strip(),
    ]
    (ROOT / "docs" / "bench.md").write_text("\n\n".join(part for part in parts if part) + "\n")


def circumstances(found: dict) -> str:
    """Date, machine, versions, load."""
    m, threads = found["machine"], found.get("threads")
    loads = found.get("load_seen") or [m["load"][0]]
    text = (
        f"{found['when']}; {m['cores']} cores, {m['processor']} (family {m['family']}: {', '.join(m['flags'])}), "
        f"{m['memory_gib']} GiB, Python {m['python']}; "
    )
    text += f"{threads} thread{'s' if threads != 1 else ''} each; " if threads else ""
    versions = found["versions"]
    own = versions.get("headwise", versions)
    text += ", ".join(f"{name} {version}" for name, version in own.items() if name in ("torch", "transformers"))
    for peer in ("transformer_lens", "nnsight"):
        if peer in versions:
            name = peer.replace("_", "-")
            text += f"; {NAMES[peer]} {versions[peer].get(name, '')} (transformers {versions[peer]['transformers']})"
    return text + f". Load of the machine {' to '.join(f'{x:.1f}' for x in dict.fromkeys((loads[0], loads[-1])))}."


def table(rows: dict, reference: str) -> str:
    """Medians and ratios."""
    lines = [
        f"| | processor seconds | ratio to {NAMES[reference].strip('*')} | wall seconds | ratio | peak MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in rows.items():
        numbers = (*(f"{r[key]:.2f}" for key in ("cpu", "cpu_ratio", "wall", "wall_ratio")), str(r["peak_mb"]))
        lines.append(f"| {NAMES[name]} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def verdict(goal: str, number: float, met: bool) -> str:
    """One sentence about a goal."""
    return f"Goal {goal}: {number:.2f}, {'met' if met else 'missed'}."


def reads(found: dict | None) -> str:
    """Reading sites."""
    if found is None:
        return ""
    parts = []
    for job, title, limit in (
        ("reads", "Reading every z and every residual, 8 x 128 tokens", 1.10),
        ("patterns", "Reading every pattern, 8 x 128 tokens", 1.15),
    ):
        rows, sums = found[job]["table"], {name: v for name, v in found[job]["sums"].items() if v}
        ratio = rows["headwise"]["cpu_ratio"]
        pairs = [(a, b) for values in sums.values() for a, b in zip(values, sums["hooks"], strict=True)]
        apart = max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)
        parts += [
            f"## {title}",
            table(rows, "bare"),
            f"{verdict(f'at most {limit:.2f} of the bare pass', ratio, ratio <= limit)} {rows['bare']['runs']} rounds. "
            f"Sums of what was read differ between contestants by {apart:.0e} of their size.",
        ]
    return "\n\n".join([*parts, circumstances(found)])


def scan(found: dict | None, title: str) -> str:
    """Seconds a head, and what bounds them."""
    if found is None:
        return ""
    rows, f = found["table"], found["flops"]
    loops = [name for name in rows if not name.startswith("headwise")]
    best = min(loops, key=lambda name: rows[name]["cpu_ratio"])
    over = {name: rows[best]["cpu_ratio"] / r["cpu_ratio"] for name, r in rows.items()}
    apart = {NAMES[n].strip("*"): a["largest_difference"] for n, a in found["agreement"].items()}
    alone = over["headwise_blas"]
    return "\n\n".join(
        [
            f"## {title}",
            f"Seconds a head: {found['heads']} of {found['of']} heads, one a layer, each set to zero on "
            f"{found['batch'][0]} x {found['batch'][1]} tokens.",
            table(rows, "hooks_restricted"),
            f"{verdict(f'1.8 times the fastest loop ({NAMES[best]})', *passed(over['headwise'], 1.8))} "
            f"{verdict('3 times with bfloat16 rows', *passed(over['headwise_bf16'], 3))}",
            f"Sharing the prefix by itself, with PyTorch's own products, gives {alone:.2f}. Its bound is "
            f"{f['bound']:.2f}, from {f['naive'] / 1e9:.0f} GFLOP a full pass and "
            f"{f['shared'] / 1e9:.0f} a variant on average.",
            "Largest difference of an effect on one prompt from the plain loop's, in nats: "
            + ", ".join(f"{name} {value:.0e}" for name, value in apart.items() if name != NAMES["hooks_restricted"])
            + ".",
            shares(rows, found["rates"], f["shared"]),
            circumstances(found) + (f" {found['note']}" if "note" in found else ""),
        ]
    )


def with_own_race(found: dict | None, own: dict | None) -> dict | None:
    """The scan's results, with the row of bfloat16 rows from a race of its own where there was one."""
    if found is None or own is None:
        return found
    name, note = "headwise_bf16", f"Bfloat16 rows ran in a race of their own. {circumstances(own)}"
    for part in ("table", "agreement"):
        found[part][name] = own[part][name]
    return {**found, "note": note}


def passed(value: float, least: float) -> tuple[float, bool]:
    """A value that should be large, and whether it is."""
    return value, value >= least


def shares(rows: dict, rates: dict[str, float], flops: float) -> str:
    """Which share of the machine's rate the scan reaches."""
    lines = [
        "| products | rate of the machine, GFLOP a second | reached in the scan | share |",
        "| --- | --- | --- | --- |",
    ]
    for name, kind in zip(("headwise_blas", "headwise", "headwise_bf16"), rates, strict=True):
        reached = flops / rows[name]["cpu"] / 1e9
        lines.append(f"| {kind} | {rates[kind]:.0f} | {reached:.0f} | {reached / rates[kind]:.0%} |")
    return (
        "\n".join(lines)
        + "\n\nThe rate is that of a product of two 2048 x 2048 matrices on one thread, the best of seven "
        "in the same run. The rest goes to attention, norms, rotations, activations and copies, and to sharing the "
        "machine's caches."
    )


def full(found: dict | None) -> str:
    """All heads once."""
    if found is None:
        return ""
    rows, exact = found["table"], found["agreement"]["headwise_bf16"]
    rank = exact["rank_correlation"]
    names = [n for n in rows if n in found["agreement"]]
    total = ", ".join(f"{NAMES[n].strip('*')} {rows[n]['cpu_total']:.0f}" for n in names)
    text = (
        f"## All heads\n\n{found['heads']} of {found['of']} heads. bfloat16 rows: rank correlation "
        f"with the exact effects "
        f"{rank:.4f} (goal 0.99, {'met' if rank >= 0.99 else 'missed'}); largest difference on one prompt "
        f"{exact['largest_difference']:.2f} nats. Processor seconds of the whole scan: {total}."
    )
    if "hooks_restricted" in rows:
        apart = found["agreement"]["headwise"]["largest_difference"]
        text += f" Largest difference of headwise from the plain loop: {apart:.0e} nats."
    return text + "\n\n" + circumstances(found)


def screening(found: dict | None) -> str:
    """The gradient screen beside the exact effects."""
    if found is None:
        return ""
    rows = found["rows"]
    lines = [
        "| task | rank correlation | linear correlation | of the ten strongest, found | screen, s | exact, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['task']} | {r['spearman']:.2f} | {r['pearson']:.2f} | {r['top10_found']} | {r['screen_s']:.1f} "
        f"| {r['exact_s']:.0f} |"
        for r in rows
    ]
    ranks, lines_up = ([r[key] for r in rows] for key in ("spearman", "pearson"))
    cost = statistics.median(r["exact_s"] / r["screen_s"] for r in rows)
    text = (
        f"All {rows[0]['heads']} heads, {rows[0]['prompts']} prompts a task, each head replaced by its value on the "
        "corrupt prompt: once exactly, once as the gradient foretells. "
        f"The screen puts the heads in nearly the right order (rank correlation {min(ranks):.2f} to {max(ranks):.2f}) "
        f"and costs {cost:.0f} times less (median). Its sizes are another matter: the linear correlation lies between "
        f"{min(lines_up):.2f} and {max(lines_up):.2f}, so the slope misjudges how large some effects are. "
        "So it may say which heads are tested first, and never how much one matters."
    )
    about = f"{found['date']}; torch {found['torch']}; `python bench/screen.py`."
    return "\n\n".join(["## The gradient screen beside the exact effects", text, "\n".join(lines), about])


def mapping(found: dict | None) -> str:
    """The main job, and opening."""
    if found is None:
        return ""
    m, o = found["map"], found["open"]
    return "\n\n".join(
        [
            "## `headwise map` on the default model",
            f"{m['wall'] / 60:.1f} minutes, {m['cpu'] / 60:.1f} of processor time, peak {m['peak_mb']} MB; load "
            f"{m['load'][0]} at its start and {m['load'][1]} at its end, its own two threads included. "
            f"{verdict('at most 8 minutes', m['wall'] / 60, m['wall'] <= 480)} "
            f"{verdict('at most 4 GiB', m['peak_mb'] / 1024, m['peak_mb'] <= 4096)}",
            f"Opening the default model in a process that has imported torch and transformers ({o['imports']:.2f} s): "
            f"{o['first']:.2f} s the first time, as transformers imports more of itself, {o['again']:.2f} s after "
            f"(medians of {o['runs']}, load {o['load']}, {o['when']}). "
            f"{verdict('at most 1.5 s', o['first'], o['first'] <= 1.5)}",
            circumstances(found),
        ]
    )


if __name__ == "__main__":
    main()
