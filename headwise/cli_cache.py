"""The commands that make and measure caches: plan, bench."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.cli_decode import bench_drafts
from headwise.terminal import print_json, print_table, say, sentences, tell

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.atlas import Atlas
    from headwise.bench import Cost
    from headwise.kv_cache import CacheMethod
    from headwise.packing import Packed
    from headwise.plan import Plan
    from headwise.planning import Making
    from headwise.quality import Quality

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
MODEL_HELP = "'default', a hub id, a model folder, or a .gguf file."
TREATMENT_HELP = "A cache method with its fields, such as duo:sink=64,recent=256."


def plan_command(
    model: Annotated[str, typer.Argument(help=f"The folder of an atlas, or {MODEL_HELP}")] = "default",
    share: Annotated[float, typer.Option("--bytes", help="Key-value bytes, as a share of the full cache.")] = 0.4,
    at: Annotated[int, typer.Option(help="Tokens of context for which the bytes are counted.")] = 8192,
    test_at: Annotated[int, typer.Option(help="Tokens of the prompts by which heads are chosen and tried.")] = 1024,
    then: Annotated[str, typer.Option(help="What the chosen heads get. " + TREATMENT_HELP)] = "preallocated",
    rest: Annotated[
        list[str] | None,
        typer.Option(help="What the others may get; rankings are compared with the first. " + TREATMENT_HELP),
    ] = None,
    ranking: Annotated[
        list[str] | None,
        typer.Option(
            help="Rank heads by this: duo_gate, reach, razor_induction, retrieval or need. May be repeated: "
            "all are tried, alone and fused into one. [default: duo_gate, reach and need]"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="File. [default: plans/<bytes>.json in the atlas]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts and random heads.")] = 0,
    thorough: Annotated[bool, typer.Option("--thorough", help="More prompts in the acceptance test.")] = False,
    dtype: Annotated[str, typer.Option(help="Type of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Decide which KV heads keep a full cache, and let a test on the model accept or reject it."""
    with sentences():
        from headwise.plan import named_method
        from headwise.planning import USUAL, Making, make_plan
        from headwise.view.report import write

        making = Making(
            bytes=share,
            at=at,
            test_at=test_at,
            then=named_method(then),
            rankings=tuple(ranking) if ranking else USUAL,
            seed=seed,
            thorough=thorough,
        )
        if rest:
            making = replace(making, rest=tuple(named_method(text) for text in rest))
        opened, tokenizer, atlas = _model_and_atlas(model, dtype, device)
        plan = make_plan(opened, tokenizer, making, atlas)
        path = out or atlas.path / "plans" / f"{share:g}.json"
        plan.save(path)
        write(atlas, atlas.path / "report.html")
        if as_json:
            print_json({"plan": str(path), **plan.data()})
        else:
            _print_plan(plan, making)
            say(f"Plan: {path}")


def bench_command(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "default",
    methods: Annotated[
        list[str] | None,
        typer.Argument(
            help="Cache methods, such as cache.duo or pages:budget=1024; or drafts, such as decode.copyspec."
        ),
    ] = None,
    plan: Annotated[
        list[Path] | None, typer.Option(help="A plan: its heads keep what it says. May be repeated.")
    ] = None,
    at: Annotated[int, typer.Option(help="Tokens of the prompt.", min=64)] = 2048,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens decoded in each round. [default: 16, and 64 for drafts]", min=1)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds, contestants in turn.", min=1)] = 5,
    quality: Annotated[bool, typer.Option("--quality/--no-quality", help="Measure answers too.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Measure plans although a test rejected them.")] = False,
    dtype: Annotated[str, typer.Option(help="Type of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda.")] = "cpu",
    packed: Annotated[
        bool, typer.Option("--packed", help="Each once more, with packed weights (see generate).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure caches, or drafts, side by side: seconds, bytes and answers, with transformers' own beside them."""
    with sentences():
        from headwise.packing import Packed
        from headwise.plan import Plan, named_method
        from headwise.view.report import write

        drafts = [text for text in methods or [] if text.startswith("decode.")]
        if drafts and drafts != methods:
            raise ValueError(f"{', '.join(methods or [])}: caches and drafts are measured one kind at a time.")
        chosen = {} if drafts else {text: named_method(text.removeprefix("cache.")) for text in methods or []}
        plans = {path.stem: Plan.load(path) for path in plan or []}
        opened, tokenizer, atlas = _model_and_atlas(model, dtype, device)
        for name, one in plans.items():
            one.check(opened)
            if not force and (one.trial is None or not one.trial.accepted):
                raise ValueError(f"Plan {name} was not accepted by a test; --force measures it all the same.")
        weights = Packed(opened) if packed else None
        if drafts:
            bench_drafts(opened, tokenizer, drafts, plans, weights, (tokens or 64, rounds, seed), as_json)
            return
        rows = _bench(opened, tokenizer, chosen, plans, weights, (at, tokens or 16, rounds, seed), quality)
        atlas.add_bench(rows)
        write(atlas, atlas.path / "report.html")
        if as_json:
            print_json(rows)
            return
        shown = ("cache", "bytes", "share", "prefill_s", "decode_ms", "peak_mb", "kept", "nll")
        table = [tuple(_cell(row[key]) for key in shown) for row in rows]
        print_table(("cache", "bytes", "share", "prefill s", "ms a token", "peak MB", "answers kept", "nats"), table)


def _model_and_atlas(name: str, dtype: str, device: str) -> "tuple[PreTrainedModel, Any, Atlas]":
    """A model by name, or the one that an atlas is of, with its atlas."""
    from headwise.atlas import Atlas
    from headwise.models import folder_of, open_model

    if (Path(name) / "atlas.json").is_file():
        atlas = Atlas(name)
        source = str(atlas.about.get("source") or atlas.about["model"])
        tell(f"Opening {source} ...")
        model, tokenizer = open_model(source, dtype=dtype, device=device)
        return model, tokenizer, Atlas.of(model, Path(name), tokenizer)
    tell(f"Opening {name} ...")
    model, tokenizer = open_model(name, dtype=dtype, device=device)
    atlas = Atlas.of(model, Path("atlas") / folder_of(name, model), tokenizer)
    atlas.note(source=name)
    return model, tokenizer, atlas


def _bench(
    model: "PreTrainedModel",
    tokenizer: Any,
    methods: "dict[str, CacheMethod]",
    plans: "dict[str, Plan]",
    packed: "Packed | None",
    how: tuple[int, int, int, int],
    with_quality: bool,
) -> list[dict[str, Any]]:
    from headwise import quality as worth
    from headwise.bench import cost, dynamic, static
    from headwise.data import HeldOut
    from headwise.kv_cache import KVCache, kv_units
    from headwise.matmul import FEW, fast_matmul

    at, tokens, rounds, seed = how
    most = at + tokens * (rounds + 1) + 1
    units = kv_units(model)
    treatments = {name: dict.fromkeys(units, method) for name, method in methods.items()}
    treatments |= {f"plan {name}": one.treatments() for name, one in plans.items()}
    caches: dict[str, Any] = {"DynamicCache": dynamic(model), "StaticCache": static(model, most)}
    caches |= {name: lambda chosen=chosen: KVCache(model, chosen, most) for name, chosen in treatments.items()}
    # Packed weights change the time of a cache, not what it answers.
    again = {} if packed is None else {f"{name}, packed": name for name in caches}
    caches |= {name: caches[own] for name, own in again.items()}
    # What `attach` does: ours multiply the quick way, peers run in the model as it is.
    inside: dict[str, Any] = dict.fromkeys(treatments, lambda: fast_matmul(model, few=FEW))
    inside |= dict.fromkeys(again, lambda: packed)
    ids = HeldOut(length=at).make(tokenizer, 1, seed).ids
    costs = {one.name: one for one in cost(model, caches, ids, tokens=tokens, rounds=rounds, inside=inside)}
    found: dict[str, Quality] = {}
    if with_quality:
        asked: dict[str, Any] = {"DynamicCache": None}
        asked |= {name: lambda chosen=chosen: KVCache(model, chosen) for name, chosen in treatments.items()}
        found = worth.compare(model, tokenizer, asked, at, seed)
    full = costs["DynamicCache"]
    best = found.get("DynamicCache")
    return [_bench_row(name, one, full, found.get(again.get(name, name)), best) for name, one in costs.items()]


def _bench_row(name: str, one: "Cost", full: "Cost", mine: "Quality | None", best: "Quality | None") -> dict[str, Any]:
    return {
        "cache": name,
        "at": one.at,
        "bytes": one.bytes,
        "share": one.bytes / full.bytes,
        "prefill_s": one.prefill,
        "decode_ms": 1000 * one.decode,
        "peak_mb": None if one.peak is None else one.peak / 2**20,
        "kept": None if mine is None or best is None else mine.kept(best),
        "retrieval": None if mine is None else mine.retrieval,
        "nll": None if mine is None else mine.nll,
    }


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _print_plan(plan: "Plan", making: "Making") -> None:
    trial = plan.trial
    if trial is not None:
        columns = ("cache", "bytes", "answers kept", "retrieval", "nats")
        rows = [
            (
                row["name"],
                f"{row['share']:.0%}",
                "-" if row["kept"] is None else f"{row['kept']:.0%}",
                f"{row['retrieval']:.2f}",
                f"{row['nll']:.3f}",
            )
            for row in trial.rows
        ]
        print_table(columns, rows)
    counts = ", ".join(f"{count} {name}" for name, count in plan.count().items())
    say(
        f"{len(plan.heads)} KV heads: {counts} (by {plan.about['ranking']}); {plan.share_of_bytes(making.at):.0%} of "
        f"the bytes at {making.at} tokens."
    )
    if trial is not None:
        say(f"{'Accepted' if trial.accepted else 'Rejected'}. {trial.says}")
        say(f"Rule: {trial.rule}")
