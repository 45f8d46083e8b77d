"""Several conditions trained with paired seeds, and how much sooner each is done than the first.

    compare({"none": [], "match": [Edit("L1.pattern", pattern("match"))]}, model=config, lesson=lesson, seeds=(5, 6, 7))

A seed decides weights and prompts in every condition alike, so that conditions are compared seed by seed.
"""

import json
import multiprocessing
import pickle
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from headwise.edits import Edit
from headwise.lesson import Lesson
from headwise.progress import hidden
from headwise.stats import interval
from headwise.tape import Tape
from headwise.tiny import TinyConfig
from headwise.training import Change, Run, Training, Watch, train
from headwise.writing import write_aside

Goal = tuple[str, str, float]


@dataclass(frozen=True)
class Condition:
    """All that a run is made of, but its seed. See `train`."""

    model: TinyConfig
    lesson: Lesson
    training: Training = field(default_factory=Training)
    edits: "Sequence[Change]" = ()
    progress: "Mapping[str, Sequence[Edit]]" = field(default_factory=dict)

    def run(self, seed: int, folder: "Path | None" = None, watch: Watch | None = None) -> Run:
        """Train it."""
        return train(
            self.model,
            self.lesson,
            self.training,
            self.edits,
            seed=seed,
            folder=folder,
            progress=self.progress,
            watch=watch,
        )


@dataclass(frozen=True)
class Sooner:
    """When a condition was done, against the first condition.

    Attributes:
        times: steps for each seed; infinity where it never was.
        median: of the times.
        ratio: how many times sooner than the first, geometric mean over pairs of a seed; `low`, `high`: its 95 %
            bootstrap interval over seeds (NaN for one seed). NaN where either was never done.
        wins: seeds in which it was sooner than the first.
    """

    name: str
    times: list[float]
    median: float
    ratio: float
    low: float
    high: float
    wins: int

    def row(self) -> dict[str, Any]:
        """The same as a row of a table, whose first column is the condition."""
        keys = ("times", "median", "low", "high", "wins")
        return {"condition": self.name, "sooner": self.ratio, **{key: getattr(self, key) for key in keys}}


@dataclass
class Comparison:
    """Tapes of all runs, by condition and seed.

    Attributes:
        tapes: {condition: {seed: tape}}.
        runs: the same with their models; empty where they were read from a folder.
        goal: (metric, "below" or "above", bound) by which a run is done; None where nobody said.
    """

    tapes: dict[str, dict[int, Tape]]
    runs: dict[str, dict[int, Run]] = field(default_factory=dict)
    goal: "Goal | None" = None

    @property
    def names(self) -> list[str]:
        return list(self.tapes)

    @property
    def seeds(self) -> list[int]:
        """The seeds that every condition has."""
        return sorted(set.intersection(*(set(runs) for runs in self.tapes.values())))

    def tape(self, name: str, seed: int | None = None) -> Tape:
        """One tape, by default of the first seed. Raises ValueError when there is no such run."""
        if name not in self.tapes or (seed is not None and seed not in self.tapes[name]):
            raise ValueError(f"There is no run {name!r} with seed {seed}; there are {', '.join(self.names)}.")
        runs = self.tapes[name]
        return runs[min(runs) if seed is None else seed]

    def last(self, metric: str, split: str = "train", missing: Any = ...) -> dict[str, Any]:
        """{condition: the last value, mean over seeds}; `missing` where it was not measured, if that is given."""
        found = {}
        for name, runs in self.tapes.items():
            if missing is not ... and not all(tape.points(metric, split) for tape in runs.values()):
                found[name] = missing
            else:
                found[name] = float(np.mean([tape.last(metric, split) for tape in runs.values()]))
        return found

    def time_to(
        self,
        metric: str,
        *,
        below: float | None = None,
        above: float | None = None,
        split: str = "train",
        names: "Sequence[str] | None" = None,
    ) -> list[Sooner]:
        """How soon each condition had the metric below (or above) a bound, in steps and against the first."""
        names, seeds = list(names or self.names), self.seeds
        found = {
            name: [self.tapes[name][seed].time_to(metric, below=below, above=above, split=split) for seed in seeds]
            for name in names
        }
        return [_sooner(name, found[names[0]], times) for name, times in found.items()]

    @classmethod
    def load(cls, folder: "Path | str") -> "Comparison":
        """The finished runs that `compare` kept in a folder. Raises ValueError where there are none."""
        found: dict[str, dict[int, Tape]] = {}
        index = Path(folder) / "comparison.json"
        try:
            kept = json.loads(index.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            raise ValueError(f"{folder} holds no comparison; `headwise lab run NAME --out FOLDER` makes one.") from None
        for name, place in kept["conditions"].items():
            for file in sorted((Path(folder) / place).glob("seed=*/tape.parquet")):
                if Tape.notes(file).get("done") == str(False):
                    continue
                found.setdefault(name, {})[int(file.parent.name.removeprefix("seed="))] = Tape.load(file)
        if not found:
            raise ValueError(f"{folder} holds no finished run yet.")
        goal = kept.get("goal")
        return cls(found, goal=goal and (goal[0], goal[1], float(goal[2])))


def _sooner(name: str, base: list[float], times: list[float]) -> Sooner:
    both = np.array([base, times], dtype=np.float64)
    ratio = low = high = float("nan")
    if np.isfinite(both).all() and (both > 0).all():
        logs = np.log(both[0] / both[1])
        ratio = float(np.exp(logs.mean()))
        low, high = (float(np.exp(end[0])) for end in interval(logs[:, None]))
    return Sooner(name, times, float(np.median(times)), ratio, low, high, int((both[1] < both[0]).sum()))


def compare(
    conditions: "Mapping[str, Condition | Sequence[Change]]",
    *,
    model: TinyConfig | None = None,
    lesson: Lesson | None = None,
    training: Training | None = None,
    seeds: Sequence[int] = (5, 6, 7),
    folder: "Path | str | None" = None,
    processes: int = 1,
    watch: Watch | None = None,
    goal: Goal | None = None,
) -> Comparison:
    """Train every condition with every seed.

    Args:
        conditions: by name; lists of edits where all share `model`, `lesson` and `training`. The first is the base.
        seeds: of weights and prompts.
        folder: keeps every run as <condition>/seed=<k>/, and a second call goes on from there.
        processes: runs at a time; two on a machine of two cores. The curves do not depend on it.
        watch: shown every run after each of its measurements, in the process that trains it.
        goal: (metric, "below" or "above", bound) by which a run is done; kept in the folder.

    Raises:
        ValueError: a list of edits without a model and a lesson, or edits that cannot be sent to another process.
    """
    whole = {name: _whole(name, one, model, lesson, training) for name, one in conditions.items()}
    places = {name: place_of(name) for name in whole}
    if folder is not None:
        text = json.dumps({"conditions": places, "seeds": list(seeds), "goal": goal}, indent=2)
        write_aside(Path(folder) / "comparison.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    jobs = [
        (name, seed, one, None if folder is None else Path(folder) / place_of(name, seed), watch)
        for name, one in whole.items()
        for seed in seeds
    ]
    runs: dict[str, dict[int, Run]] = {name: {} for name in whole}
    with tqdm(total=len(jobs), desc="runs", disable=hidden(), leave=False) as bar:
        for (name, seed, *_), run in zip(jobs, _each(jobs, processes), strict=True):
            runs[name][seed] = run
            bar.update()
    tapes = {name: {seed: run.tape for seed, run in by.items()} for name, by in runs.items()}
    return Comparison(tapes, runs, goal)


def place_of(name: str, seed: int | None = None) -> str:
    """The folder of a condition, or of its run with one seed, inside that of the comparison."""
    folder = name.replace(" ", "-").replace("/", "-")
    return folder if seed is None else f"{folder}/seed={seed}"


def _whole(name: str, one: Any, model: Any, lesson: Any, training: Any) -> Condition:
    if isinstance(one, Condition):
        return one
    if model is None or lesson is None:
        raise ValueError(f"The condition {name!r} is a list of edits; give compare() a model and a lesson too.")
    return Condition(model, lesson, training or Training(), one)


def _each(jobs: list[tuple], processes: int) -> Iterator[Run]:
    if processes < 2 or len(jobs) < 2:
        yield from map(_job, jobs)
        return
    try:
        pickle.dumps(jobs)
    except (pickle.PicklingError, AttributeError, TypeError) as problem:
        raise ValueError(
            f"These conditions cannot be sent to another process ({problem}); use functions with a name of their own, "
            "or processes=1."
        ) from problem
    # Forked children of a process that has used torch's threads may hang.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        # Long runs first, so that no process is left alone with one at the end.
        longest = sorted(range(len(jobs)), key=lambda i: -jobs[i][2].training.steps)
        begun = {i: pool.submit(_job, jobs[i]) for i in longest}
        try:
            for i in range(len(jobs)):
                yield begun[i].result()
        finally:
            # Where one failed or somebody stopped, those that wait need not begin.
            for future in begun.values():
                future.cancel()


def _job(job: tuple) -> Run:
    _, seed, one, folder, watch = job
    return one.run(seed, folder, watch)
