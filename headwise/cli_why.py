"""The command that explains an answer: why."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from headwise.terminal import print_json, print_table, say, sentences, tell

if TYPE_CHECKING:
    from headwise.task import Task
    from headwise.why import Reason
    from headwise.why_task import TaskReason


def why_command(
    model: Annotated[str, typer.Argument(help="'default', a hub id, a model folder, or a .gguf file.")],
    prompt: Annotated[str | None, typer.Argument(help="What the model reads.")] = None,
    answer: Annotated[str | None, typer.Option(help="What it says.")] = None,
    instead: Annotated[str | None, typer.Option(help="What it might say instead.")] = None,
    contrast: Annotated[
        str | None, typer.Option(help="The prompt with the reason changed, of as many tokens. [default: made up]")
    ] = None,
    task: Annotated[str | None, typer.Option(help="A data task in place of a prompt, such as ioi.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="A file of prompts in place of one: JSON lines.")] = None,
    n: Annotated[int | None, typer.Option(help="Prompts of the task. [default: 16, or all of the file]", min=1)] = None,
    target: Annotated[float, typer.Option(help="Share of the difference that the graph must carry alone.")] = 0.8,
    draws: Annotated[int, typer.Option(help="Random circuits of each kind to compare with.", min=0)] = 20,
    top: Annotated[int, typer.Option(help="Edges in the table.", min=1)] = 16,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File for the graph, as parquet.")] = None,
    atlas: Annotated[
        Path | None, typer.Option(help="Atlas whose report shows the graph; begun if need be. [default: atlas/<model>]")
    ] = None,
    view: Annotated[bool, typer.Option(help="Keep the graph in the atlas and write its report.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of prompts, random contrasts and circuits.")] = 0,
    dtype: Annotated[str, typer.Option(help="Type of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say why a model answers A instead of B, or can do a task: the graph that carries it, and how much it explains."""
    with sentences():
        words = {"answer": answer, "instead": instead, "contrast": contrast}
        prompts = _prompts(prompt, words, task, pairs, n)
        from headwise.models import open_model
        from headwise.why import Why
        from headwise.why_task import WhyTask

        opened, tokenizer = open_model(model, dtype=dtype, device=device)
        tell("Looking for the graph ...")
        if prompts is None:
            asked = Why(target=target, draws=draws, seed=seed)
            reason = asked.ask(opened, tokenizer, prompt or "", answer or "", instead or "", contrast)
        else:
            reason = WhyTask(target=target, draws=draws, seed=seed).ask(opened, tokenizer, *prompts)
        if out is not None:
            reason.kept().save(out)
        page = _kept(model, opened, tokenizer, reason, atlas) if view else None
        if as_json:
            print_json(reason.data())
            return
        _print_reason(reason, top)
        if out is not None:
            say(f"Graph: {out}")
        if page is not None:
            say(f"Circuit view: {page}#&graph={reason.name}")


def _prompts(
    prompt: str | None, words: dict[str, str | None], task: str | None, pairs: Path | None, n: int | None
) -> "tuple[Task, int] | None":
    """The task that is asked about, and how many prompts of it; None for one prompt.

    Raises:
        ValueError: none of prompt, task and file is given, or several are; or options that do not go together.
    """
    from headwise.method import find_task, load

    given = [name for name, one in (("a prompt", prompt), ("--task", task), ("--pairs", pairs)) if one is not None]
    if len(given) != 1:
        raise ValueError(f"why needs one of a prompt, --task and --pairs; given: {', '.join(given) or 'none of them'}.")
    if prompt is not None:
        missing = [f"--{name}" for name in ("answer", "instead") if words[name] is None]
        if missing or n is not None:
            wrong = f"lacks {' and '.join(missing)}" if missing else "takes no --n"
            raise ValueError(
                f"A prompt {wrong}: write headwise why default 'Two and two make' --answer four --instead five."
            )
        return None
    extra = [f"--{name}" for name, one in words.items() if one is not None]
    if extra:
        raise ValueError(f"Only a prompt takes {' and '.join(extra)}; a task has answers of its own.")
    if pairs is not None:
        from headwise.data import Pairs

        mine = Pairs(str(pairs))
        return mine, n or len(mine.read())
    return cast("type[Task]", load(find_task(task or "").name))(), n or 16


def _kept(opened_as: str, model: Any, tokenizer: Any, reason: "Reason | TaskReason", folder: Path | None) -> Path:
    """Put the graph into the atlas of its model, and hand back the report that shows it."""
    from headwise.atlas import Atlas
    from headwise.models import folder_of
    from headwise.view.report import write

    atlas = Atlas.of(model, folder or Path("atlas") / folder_of(opened_as, model), tokenizer)
    if "source" not in atlas.about:
        atlas.note(source=opened_as)
    atlas.add_graph(reason.name, reason.kept())
    return write(atlas, atlas.path / "report.html")


def _print_question(reason: "Reason | TaskReason") -> None:
    from headwise.why_task import TaskReason

    worth = reason.worth
    if isinstance(reason, TaskReason):
        say(f"{reason.task}: {reason.metric} {worth.clean:.3g}, against {worth.corrupt:.3g} on corrupt prompts,")
        say(f"on {len(reason.held)} prompts that the model gets right.")
        return
    changed = {
        "given": "your contrast",
        "exchanged": "the two exchanged in the prompt",
        "random": "random tokens where it matters most",
    }
    say(f"{reason.answer!r} instead of {reason.instead!r}: {reason.metric} {worth.clean:.3g},")
    say(f"against {worth.corrupt:.3g} with {changed[reason.how]}: {reason.contrast[0]!r}")


def _print_reason(reason: "Reason | TaskReason", top: int) -> None:
    _print_question(reason)
    worth = reason.worth
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
