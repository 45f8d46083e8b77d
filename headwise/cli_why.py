"""The command that explains an answer: why."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.terminal import print_json, print_table, say, sentences, tell

if TYPE_CHECKING:
    from headwise.why import Reason


def why_command(
    model: Annotated[str, typer.Argument(help="'default', a hub id, a model folder, or a .gguf file.")],
    prompt: Annotated[str, typer.Argument(help="What the model reads.")],
    answer: Annotated[str, typer.Option(help="What it says.")],
    instead: Annotated[str, typer.Option(help="What it might say instead.")],
    contrast: Annotated[
        str | None, typer.Option(help="The prompt with the reason changed, of as many tokens. [default: made up]")
    ] = None,
    target: Annotated[float, typer.Option(help="Share of the difference that the graph must carry alone.")] = 0.8,
    draws: Annotated[int, typer.Option(help="Random circuits of each kind to compare with.", min=0)] = 20,
    top: Annotated[int, typer.Option(help="Edges in the table.", min=1)] = 16,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File for the graph, as parquet.")] = None,
    atlas: Annotated[
        Path | None, typer.Option(help="Atlas whose report shows the graph; begun if need be. [default: atlas/<model>]")
    ] = None,
    view: Annotated[bool, typer.Option(help="Keep the graph in the atlas and write its report.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of random contrasts and circuits.")] = 0,
    dtype: Annotated[str, typer.Option(help="Type of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say why a model answers A instead of B: the graph that carries it, and how much of it the graph explains."""
    with sentences():
        from headwise.models import open_model
        from headwise.why import Why

        opened, tokenizer = open_model(model, dtype=dtype, device=device)
        tell("Looking for the graph ...")
        asked = Why(target=target, draws=draws, seed=seed)
        reason = asked.ask(opened, tokenizer, prompt, answer, instead, contrast)
        if out is not None:
            reason.kept().save(out)
        page = _kept(model, opened, tokenizer, reason, atlas) if view else None
        if as_json:
            print_json(reason.data())
        else:
            _print_reason(reason, top)
            if out is not None:
                say(f"Graph: {out}")
            if page is not None:
                say(f"Circuit view: {page}#&graph={reason.name}")


def _kept(opened_as: str, model: Any, tokenizer: Any, reason: "Reason", folder: Path | None) -> Path:
    """Put the graph into the atlas of its model, and hand back the report that shows it."""
    from headwise.atlas import Atlas
    from headwise.models import folder_of
    from headwise.view.report import write

    atlas = Atlas.of(model, folder or Path("atlas") / folder_of(opened_as, model), tokenizer)
    if "source" not in atlas.about:
        atlas.note(source=opened_as)
    atlas.add_graph(reason.name, reason.kept())
    return write(atlas, atlas.path / "report.html")


def _print_reason(reason: "Reason", top: int) -> None:
    worth = reason.worth
    changed = {
        "given": "your contrast",
        "exchanged": "the two exchanged in the prompt",
        "random": "random tokens where it matters most",
    }
    say(f"{reason.answer!r} instead of {reason.instead!r}: {reason.metric} {worth.clean:.3g},")
    say(f"against {worth.corrupt:.3g} with {changed[reason.how]}: {reason.contrast[0]!r}")
    gap = worth.clean - worth.corrupt
    graph = reason.graph.top(top)
    table = graph.table.sort(graph.table["weight"].abs(), descending=True)
    rows = [
        (reason.named(s), t, f"{w / gap:+.0%}") for s, t, w in table.select("source", "target", "weight").iter_rows()
    ]
    print_table(("from", "to", "share, estimated"), rows)
    if len(reason.graph) > top:
        say(f"and {len(reason.graph) - top} smaller edges.")
    lost = sorted(worth.losses.items(), key=lambda item: -abs(item[1]))[:6]
    if lost:
        say("Without a node the graph loses: " + ", ".join(f"{reason.named(n)} {loss:.0%}" for n, loss in lost) + ".")
    say(worth.sentence())
    say(reason.tested())
