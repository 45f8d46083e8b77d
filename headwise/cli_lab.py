"""The commands of the lab: ls, run, compare."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.terminal import print_json, print_table, say, sentences, tell

if TYPE_CHECKING:
    from headwise.comparison import Goal
    from headwise.experiment import Experiment

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

lab_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Train small models and hold parts of them: experiments of the lab.",
)


@lab_app.command("ls")
def list_experiments(as_json: AsJson = False) -> None:
    """List the experiments and their conditions."""
    with sentences():
        from headwise.method import catalogue

        rows = [
            {**card.brief(), "summary": card.summary, "conditions": list(one.conditions()), "seeds": list(one.seeds)}
            for card in catalogue("lab")
            if (one := _experiment(card.name)) is not None
        ]
        if as_json:
            print_json(rows)
            return
        table = [(row["name"].split(".")[1], row["seed"], row["summary"], "; ".join(row["conditions"])) for row in rows]
        print_table(("experiment", "row", "what it does", "conditions"), table, stretch=(2, 3))


@lab_app.command("run")
def run_experiment(
    name: Annotated[str, typer.Argument(help="An experiment, such as clamped_induction.")],
    seeds: Annotated[int | None, typer.Option(help="How many seeds. [default: the experiment's own]", min=1)] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this condition; several times for several.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs. [default: lab/<experiment>]")] = None,
    processes: Annotated[int, typer.Option(help="Runs at a time.", min=1)] = 1,
    full: Annotated[bool, typer.Option("--full", help="As large as in the paper.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train all conditions with paired seeds. The same command goes on where it was stopped."""
    with sentences():
        from headwise.view import live

        one = _found(name, full)
        first = one.seeds[0]
        chosen = one.seeds if seeds is None else tuple(range(first, first + seeds))
        folder = out or Path("lab") / name.split(".")[-1]
        page = live.write(folder, one.identity()["name"], one.chosen(only), chosen)
        tell(f"Training {', '.join(only or one.conditions())} with the seeds {', '.join(map(str, chosen))} ...")
        tell(f"Watch it: {page}")
        found = one.run(chosen, folder, only, processes, live.Live())
        rows, grown = one.summary(found), one.grown(found)
        if as_json:
            made = {"experiment": name, "folder": str(folder), "page": str(page), "goal": list(one.goal)}
            print_json(made | {"conditions": rows, "grown": [asdict(each) for each in grown]})
            return
        _print(rows, one.goal)
        for each in grown:
            say(f"{each.condition}, seed {each.seed}: {each.says}")
        say(f"Runs: {folder}. Their curves: {page}")


@lab_app.command("compare")
def compare_runs(
    folder: Annotated[Path, typer.Argument(help="Folder of an experiment that was run.")],
    metric: Annotated[
        str | None, typer.Option(help="What was measured, such as loss. [default: that of the experiment's goal]")
    ] = None,
    below: Annotated[float | None, typer.Option(help="Done is: below this. [default: the experiment's goal]")] = None,
    above: Annotated[float | None, typer.Option(help="Done is: above this. [default: the experiment's goal]")] = None,
    split: Annotated[str, typer.Option(help="The prompts it was measured on.")] = "train",
    as_json: AsJson = False,
) -> None:
    """How soon each condition was done, against the first, seed by seed."""
    with sentences():
        from headwise.comparison import Comparison

        found = Comparison.load(folder)
        metric = metric or (found.goal[0] if found.goal else "loss")
        last = found.last(metric, split)
        metric, side, bound = _goal(found.goal, metric, below, above)
        rows = [{**one.row(), metric: last[one.name]} for one in found.time_to(metric, **{side: bound}, split=split)]
        if as_json:
            print_json(rows)
            return
        _print(rows, (metric, side, bound), value=metric)


def _goal(own: "Goal | None", metric: str, below: float | None, above: float | None) -> "Goal":
    """When a run is done: as the command says, or else by the experiment's own goal for this metric."""
    if below is not None and above is not None:
        raise ValueError(f"--below {below:g} and --above {above:g} were both given; a run is done by one of them.")
    if below is not None:
        return metric, "below", below
    if above is not None:
        return metric, "above", above
    if own is None or own[0] != metric:
        raise ValueError(f"When is {metric} done? Nothing here says; give --below or --above a bound.")
    return own


def _experiment(name: str, full: bool = False) -> "Experiment | None":
    """An experiment of the room; None for what only stands beside them, such as a theory."""
    from headwise.experiment import Experiment
    from headwise.method import load

    cls = load(name)
    return cls(full=full) if issubclass(cls, Experiment) else None


def _found(name: str, full: bool) -> "Experiment":
    from headwise.method import catalogue, find

    names = [card.name.split(".")[1] for card in catalogue("lab") if _experiment(card.name) is not None]
    if name.split(".")[-1] not in names:
        import difflib

        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no experiment {name!r}.{hint} All of them: {', '.join(names)}.")
    one = _experiment(find(f"lab.{name.split('.')[-1]}").name, full)
    assert one is not None
    return one


def _print(rows: list[dict[str, Any]], goal: tuple, value: str = "loss") -> None:
    def number(x: Any) -> str:
        return "-" if x is None or x != x else "never" if x == float("inf") else f"{x:.3g}"

    table = [
        (
            row["condition"],
            number(row["median"]),
            number(row["sooner"]),
            f"{number(row['low'])} to {number(row['high'])}",
            f"{row['wins']} of {len(row['times'])}",
            number(row[value]),
        )
        for row in rows
    ]
    print_table(("condition", "steps", "times sooner", "95 % interval", "seeds sooner", f"last {value}"), table)
    say(
        f"Steps until {goal[0]} is {goal[1]} {goal[2]:.3g}, median over seeds; times sooner than "
        f"{rows[0]['condition']!r}."
    )
