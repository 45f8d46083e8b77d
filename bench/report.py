"""Writes docs/bench.md from bench/results/*.json: python bench/report.py. No number in that page is typed by hand."""

import json
from pathlib import Path

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
NOTES = """
## What was tried for the scan

- Sharing the prefix alone cannot pass the bound above: head l of n layers still runs the layers from l on.
- float32 products by oneDNN rather than MKL: kept. PyTorch hands float32 products to MKL, which leaves AVX-512 unused on
  AMD processors; oneDNN's rounding is of the same size (tests/test_scan.py). On an Intel processor expect no gain.
  Plain loops would gain as much, if their authors knew; the row "PyTorch's own products" shows headwise without it.
- Packing oneDNN's weights beforehand: a few percent, for a second copy of all weights. Left out.
- `torch.backends.mkldnn.matmul.fp32_precision = "bf16"`: on a processor with AVX512_BF16 but no AMX it changes nothing but
  the kernel: the products stay float32. Left out; weights are rounded by hand for bfloat16 rows.
- A bfloat16 copy of the whole model: faster still, but the residual stream is rounded at every layer. Left out: with
  rounding in the linear layers alone the model needs no copy, and interventions entered around the scan still apply.
- Starting layer l after its attention: saves the projections of one layer of some fifteen. Left out, as it needs
  knowledge of every attention module's insides.
- Running the last layer at the answer's column only: saves most of one layer of some fifteen. Left out for the same reason.
"""


def load(name: str) -> dict | None:
    """One file of results, None where that part has not been run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def main() -> None:
    parts = [
        "# Side by side",
        "Written by `python bench/report.py` from `bench/results/`; `make bench` runs all of it. Contestants are processes "
        "of their own that run in turn, one at a time, so that the machine's moods hit all alike. Seconds and ratios are "
        "medians; a ratio is taken within a round. *Processor seconds* count only the time the process was given: where "
        "the machine was shared, they are the figure to trust.",
        reads(load("read_sites")),
        scan(load("ablation_scan_last_sample"), "Exact ablation scan, the answer in the last column"),
        scan(load("ablation_scan_all_sample"), "Exact ablation scan, answers in all columns"),
        full(load("ablation_scan_last_full")),
        mapping(load("map_time")),
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
    lines += [
        f"| {NAMES[name]} | {r['cpu']:.2f} | {r['cpu_ratio']:.2f} | {r['wall']:.2f} | {r['wall_ratio']:.2f} | {r['peak_mb']} |"
        for name, r in rows.items()
    ]
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
        rows = found[job]["table"]
        ratio = rows["headwise"]["cpu_ratio"]
        sums = {name: values for name, values in found[job]["sums"].items() if values}
        apart = max(abs(a - b) / max(1.0, abs(b)) for v in sums.values() for a, b in zip(v, sums["hooks"], strict=True))
        parts.append(
            f"## {title}\n\n{table(rows, 'bare')}\n\n{verdict(f'at most {limit:.2f} of the bare pass', ratio, ratio <= limit)} "
            f"{rows['bare']['runs']} rounds. Sums of what was read differ between contestants by {apart:.0e} of their size."
        )
    return "\n\n".join([*parts, circumstances(found)])


def scan(found: dict | None, title: str) -> str:
    """Seconds a head, and what bounds them."""
    if found is None:
        return ""
    rows, f, agreement = found["table"], found["flops"], found["agreement"]
    loops = {name: r for name, r in rows.items() if not name.startswith("headwise")}
    gain = {name: 1 / rows[name]["cpu_ratio"] for name in rows if name.startswith("headwise")}
    best = min(loops, key=lambda name: loops[name]["cpu_ratio"])
    over = {name: value * loops[best]["cpu_ratio"] for name, value in gain.items()}
    rates = found["rates"]
    lines = [
        f"## {title}\n",
        f"Seconds a head, {found['heads']} of {found['of']} heads (one a layer), {found['batch'][0]} x {found['batch'][1]} "
        "tokens, each head zeroed.\n",
        table(rows, "hooks_restricted"),
        "",
        verdict(f"1.8 times the fastest loop ({NAMES[best]}), float32", over["headwise"], over["headwise"] >= 1.8),
        verdict("3 times with bfloat16 rows", over["headwise_bf16"], over["headwise_bf16"] >= 3),
        f"Sharing the prefix by itself, with PyTorch's own products, gives {over['headwise_blas']:.2f}; its bound is "
        f"{f['bound']:.2f}, from {f['naive'] / 1e9:.0f} GFLOP a full pass and {f['shared'] / 1e9:.0f} a variant on average"
        f" ({over['headwise_blas'] / f['bound']:.0%} of the bound).",
        "Largest difference of a head's effect on a prompt from the plain loop's: "
        + ", ".join(
            f"{NAMES[n].strip('*')} {a['largest_difference']:.0e}"
            for n, a in agreement.items()
            if n != "hooks_restricted"
        )
        + " nats.\n",
        "| matrix products | rate of the machine, GFLOP a second | reached in the scan | share |",
        "| --- | --- | --- | --- |",
    ]
    kinds = dict(zip(("headwise_blas", "headwise", "headwise_bf16"), rates, strict=True))
    for name, kind in kinds.items():
        reached = f["shared"] / rows[name]["cpu"] / 1e9
        lines.append(f"| {kind} | {rates[kind]:.0f} | {reached:.0f} | {reached / rates[kind]:.0%} |")
    lines += [
        "\nOne thread; the rate is that of a product of two 2048 x 2048 matrices, the best of seven, in the same run. What is "
        "missing to the full rate goes to attention, norms, rotations and activations, which are not matrix products.\n",
        circumstances(found),
    ]
    return "\n".join(lines)


def full(found: dict | None) -> str:
    """All heads once."""
    if found is None:
        return ""
    rows, agreement = found["table"], found["agreement"]["headwise_bf16"]
    total = {name: r["cpu_total"] for name, r in rows.items() if "cpu_total" in r}
    text = (
        f"## All heads\n\n{found['heads']} of {found['of']} heads. Rank correlation of bfloat16 rows with the exact effects: "
        f"{agreement['rank_correlation']:.4f} (goal 0.99, {'met' if agreement['rank_correlation'] >= 0.99 else 'missed'}); "
        f"largest difference {agreement['largest_difference']:.2f} nats on one prompt. "
    )
    if total:
        text += (
            "Processor seconds of the whole scan: "
            + ", ".join(f"{NAMES[n].strip('*')} {s:.0f}" for n, s in total.items())
            + "."
        )
    if "hooks_restricted" in found["agreement"] and "hooks_restricted" in rows:
        text += f" Largest difference of headwise from the plain loop: {found['agreement']['headwise']['largest_difference']:.0e} nats."
    return text + "\n\n" + circumstances(found)


def mapping(found: dict | None) -> str:
    """The main job, and opening."""
    if found is None:
        return ""
    m, o = found["map"], found["open"]
    return (
        f"## `headwise map` on the default model\n\n{m['wall'] / 60:.1f} minutes of wall time, {m['cpu'] / 60:.1f} of processor "
        f"time, peak {m['peak_mb']} MB. Load {m['load'][0]} at its start and {m['load'][1]} at its end (its own two threads "
        f"included). {verdict('at most 8 minutes', m['wall'] / 60, m['wall'] <= 480)} "
        f"{verdict('at most 4 GiB', m['peak_mb'] / 1024, m['peak_mb'] <= 4096)}\n\n"
        f"Opening the default model takes {o['open_model_with_transformers']:.2f} s, {o['with_imports']:.2f} s with the import "
        f"of headwise, {o['cpu_with_imports']:.2f} s of processor time (medians, each in a fresh process; "
        f"least {found['open_least']['with_imports']:.2f}). {verdict('at most 1.5 s', o['with_imports'], o['with_imports'] <= 1.5)}"
        f"\n\n{circumstances(found)}"
    )


if __name__ == "__main__":
    main()
