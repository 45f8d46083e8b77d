"""The command line. Commands import what they need when they run, so that help and lists answer at once."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise import __version__
from headwise.cli_cache import bench_command, plan_command
from headwise.cli_decode import generate_command
from headwise.cli_draft import draft_app
from headwise.cli_lab import lab_app
from headwise.cli_why import why_command
from headwise.progress import hidden
from headwise.terminal import (
    INTERRUPTED,
    claim_entry,
    print_json,
    print_ladder,
    print_roles,
    print_scores,
    print_table,
    say,
    sentences,
    stop,
    tell,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.atlas import Atlas
    from headwise.claim import Claim, Role
    from headwise.score import Score

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="What every attention head of a transformer does, proved by intervening.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"headwise {__version__}")
        raise typer.Exit()


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """What every attention head of a transformer does, proved by intervening."""


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Model = Annotated[str, typer.Argument(help="'default', a hub id, a model folder, or a .gguf file.")]
Count = Annotated[int, typer.Option(help="How many prompts.", min=2)]
PROMPTS_HELP = (
    "How many prompts of each task; claims are proved on half of them. "
    "[default: 64 for induction, 24 needles, 8 repeated sequences, else 40; 32 with methods]"
)
FOLDER_HELP = "Folder of the atlas. [default: atlas/<model>, atlas/<organisation>--<model> for a hub id]"
Seed = Annotated[int, typer.Option(help="Seed of the prompts.")]
Dtype = Annotated[str, typer.Option(help="Type of the weights: float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda.")]


@app.command("ls")
def list_methods(
    room: Annotated[str | None, typer.Argument(help="Only this room, such as heads or data.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, each with its paper."""
    with sentences():
        from headwise.method import catalogue

        cards = catalogue(room)
        if as_json:
            print_json([card.brief() for card in cards])
            return
        rows = [(card.name, card.title, str(card.year or ""), card.arxiv) for card in cards]
        print_table(("method", "paper", "year", "arXiv"), rows, stretch=(1,))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A method, such as heads.induction.")], as_json: AsJson = False
) -> None:
    """Show one method: what it computes, its options, and how to cite it."""
    with sentences():
        from headwise.method import find

        card = find(name)
        if as_json:
            print_json({**card.brief(), "summary": card.summary, "fields": card.fields, "class": card.class_name})
            return
        say(f"{card.name}: {card.summary}")
        for option, kind in card.fields.items():
            say(f"    {option}: {kind}")
        paper = f"{card.authors}, {card.year}. {card.title}." if card.year else f"{card.title}."
        say(f"Paper: {paper}" + (f" arXiv:{card.arxiv}" if card.arxiv else ""))
        say(f"Python: headwise.{card.room}.{card.class_name}()")


@app.command("map")
def map_command(
    model: Model = "default",
    methods: Annotated[list[str] | None, typer.Argument(help="Only these scores, without claims.")] = None,
    task: Annotated[str | None, typer.Option(help="Data task for these scores; by default what each wants.")] = None,
    n: Annotated[int | None, typer.Option(help=PROMPTS_HELP, min=4)] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help=FOLDER_HELP)] = None,
    thorough: Annotated[bool, typer.Option("--thorough", help="Scan every head on every task.")] = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Find out what every head does, prove it, and write an atlas and a report. A second run goes on from the first."""
    with sentences():
        from headwise.method import find, find_task

        cards = [find(name) for name in methods or []]
        wrong = [card.name for card in cards if card.room != "heads"]
        if wrong:
            raise ValueError(f"{wrong[0]} does not score heads. `headwise ls heads` lists what does.")
        if task is not None:
            if not cards:
                raise ValueError(
                    "--task goes with methods, such as: headwise map default heads.induction --task induction"
                )
            find_task(task)
        tell(f"Opening {model} ...")
        opened, tokenizer = _open(model, dtype, device)
        folder = out or Path("atlas") / _folder(model, opened)
        if cards:
            atlas, scores = _score(opened, tokenizer, folder, [card.name for card in cards], task, n or 32, seed)
            if not as_json:
                print_scores(scores)
        else:
            atlas = _map(opened, tokenizer, folder, thorough, n, seed)
            atlas.note(source=model)
            if not as_json:
                print_roles(atlas)
        if as_json:
            units = [{key: head[key] for key in ("unit", "role", "verdict", "scores")} for head in atlas.heads()]
            print_json({"atlas": str(atlas.path), "model": atlas.about["model"], "units": units})
            return
        say(f"Atlas:  {atlas.path}")
        if not cards:
            say(f"Report: {atlas.path / 'report.html'}")


@app.command()
def prove(
    model: Model,
    unit: Annotated[str, typer.Argument(help="A head, such as L5.H1.")],
    role: Annotated[str, typer.Argument(help="What it is said to do, such as induction.")],
    n: Count = 24,
    seed: Seed = 1,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Test one claim: is this head needed, and is it enough, beyond random heads of its layer?"""
    with sentences():
        from headwise.claim import role as find_role

        part = find_role(role)
        if not part.task:
            raise ValueError(
                f"The role {part.name!r} has no task that would show it, so it can be seen but not proved."
            )
        opened, tokenizer = _open(model, dtype, device)
        claim = _prove(opened, tokenizer, unit, part, n, seed)
        if as_json:
            print_json({"model": _name(opened), **claim_entry(claim)})
            return
        print_ladder(claim)


@app.command()
def report(
    atlas: Annotated[Path, typer.Argument(help="Folder of an atlas.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File. [default: report.html in the atlas]")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the report of an atlas: one file that opens anywhere, without a network."""
    with sentences():
        from headwise.atlas import Atlas
        from headwise.view.report import write

        path = write(Atlas(atlas), out or atlas / "report.html")
        if as_json:
            print_json({"atlas": str(atlas), "report": str(path)})
        else:
            say(f"Report: {path}")


@app.command()
def replicate(
    name: Annotated[
        str | None, typer.Argument(help="A replication, by file name or row; all of them by default.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="More prompts, and so more minutes.")] = False,
    seed: Seed = 0,
    record: Annotated[Path | None, typer.Option(help="Folder that keeps each result as a JSON file.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Print a Markdown table.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the replications: does a paper's claim hold here? Prints the paper's number, ours and the baseline."""
    with sentences():
        from headwise import replicate as room

        rows, failed = [], []
        for one in room.names() if name is None else [room.find(name).name]:
            tell(f"Replicating {one} ...")
            try:
                rows.append(room.run(one, full=full, seed=seed, record=record))
            except ValueError as error:
                failed.append(f"{one} could not be run: {error}")
        if as_json:
            print_json(rows)
        elif table:
            say(room.markdown(rows))
        elif rows:
            columns = ("seed", "claim", "paper", "measured", "baseline", "outcome")
            print_table(columns, [tuple(str(row[key]) for key in columns) for row in rows], stretch=(1, 2, 3, 4))
        if failed:
            raise ValueError(" ".join(failed))


app.command("plan")(plan_command)
app.command("bench")(bench_command)
app.add_typer(draft_app, name="draft")
app.command("why")(why_command)
app.add_typer(lab_app, name="lab")
app.command("generate")(generate_command)


def main() -> None:
    """Run the command line; every expected failure is one sentence on stderr and a number other than 0."""
    if hidden():
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app()
    except KeyboardInterrupt:
        stop(INTERRUPTED, 130)
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. Nothing may be flushed to it on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


# What the commands do


def _open(name: str, dtype: str, device: str) -> "tuple[PreTrainedModel, Any]":
    from headwise.models import open_model

    return open_model(name, dtype=dtype, device=device)


def _name(model: "PreTrainedModel") -> str:
    from headwise.models import name_of

    return name_of(model)


def _folder(opened_as: str, model: "PreTrainedModel") -> str:
    from headwise.models import folder_of

    return folder_of(opened_as, model)


def _map(model: "PreTrainedModel", tokenizer: Any, folder: Path, thorough: bool, n: int | None, seed: int) -> "Atlas":
    from headwise.mapping import Job, map_model
    from headwise.view.report import write

    job = Job(thorough=thorough, seed=seed)
    if n is not None:
        job = replace(job, prompts=n)
    atlas = map_model(model, tokenizer, folder, job=job)
    write(atlas, atlas.path / "report.html")
    return atlas


def _score(
    model: "PreTrainedModel",
    tokenizer: Any,
    folder: Path,
    methods: list[str],
    task: str | None,
    n: int,
    seed: int,
) -> "tuple[Atlas, list[Score]]":
    """Scores of the chosen methods, each on its own task unless one is named, kept in the atlas as they come.

    What the atlas has of the same method, prompts and weights is not measured again.
    """
    from headwise.atlas import Atlas
    from headwise.mapping import PICTURES, fit_pictures
    from headwise.method import find_task, load
    from headwise.score import provenance

    atlas = Atlas.of(model, folder, tokenizer)
    scores = []
    for name in methods:
        method: Any = load(name)()
        wanted = task or method.needs
        batch = None
        if wanted:
            card = find_task(PICTURES if task is None and model.main_input_name == "pixel_values" else wanted)
            _check_task(model, tokenizer, name, card.name.split(".")[1], method.evidence)
            maker: Any = load(card.name)()
            batch = maker.make(tokenizer, n, seed).to(model.device)
            batch = fit_pictures(batch, model) if card.name == f"data.{PICTURES}" else batch
        score = atlas.made(provenance(method, model, batch))
        if score is None:
            tell(f"{name} on {wanted or 'the weights'} ...")
            score = method.score(model, batch)
            atlas.add(score)
        scores.append(score)
    return atlas, scores


def _check_task(model: "PreTrainedModel", tokenizer: Any, method: str, task: str, evidence: str) -> None:
    """Refuse prompts that this model cannot read or answer.

    Raises:
        ValueError: there is no tokenizer, an encoder is asked to continue text, or pictures have too many classes.
    """
    from headwise.mapping import PICTURES

    exact = evidence in ("needed", "enough", "mediated")
    if model.main_input_name == "pixel_values" and task == PICTURES:
        classes = model.config.num_labels or 0
        if exact and classes < 10:
            raise ValueError(
                f"{_name(model)} tells {classes} classes apart and the pictures of {task} have ten, so "
                f"{method}, which measures the answer, has none here. Methods that read patterns work."
            )
        return
    if not hasattr(tokenizer, "encode"):
        raise ValueError(f"{_name(model)} has no tokenizer, so the prompts of {task} cannot be made for it.")
    if exact and not model.can_generate():
        raise ValueError(
            f"{_name(model)} is an encoder ({type(model).__name__}) and does not continue text, so {method} on {task}, "
            "which measures the next token, has no answer here. Methods that read patterns work, such as heads.entropy."
        )


def _prove(model: "PreTrainedModel", tokenizer: Any, unit: str, part: "Role", n: int, seed: int) -> "Claim":
    from headwise.anatomy import anatomy, nearest_unit
    from headwise.mapping import task_of
    from headwise.method import load
    from headwise.verify import prove as prove_units

    units = anatomy(model).units()
    if unit not in units:
        raise ValueError(f"{unit!r} is not a head of {_name(model)}.{nearest_unit(unit, units)}")
    _check_task(model, tokenizer, f"the role {part.name}", part.task, "needed")
    seer: Any = load(f"heads.{part.score}")()
    held_out = task_of(part.task).make(tokenizer, n, seed).to(model.device)
    # What nominates the head is measured on other prompts than what proves it.
    looked = task_of(seer.needs).make(tokenizer, min(n, 8), seed + 1).to(model.device) if seer.needs else None
    tell(f"heads.{part.score} on {seer.needs or 'the weights'} ...")
    seen = seer.score(model, looked)
    tell(f"{unit} and random heads of its layer on {part.task} ...")
    return prove_units(model, held_out, part.name, [unit], seen=seen)[0]
