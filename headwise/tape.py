"""Tape: what was measured while a model was trained, one row a number."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from headwise.writing import write_aside

COLUMNS = {"step": pl.Int64, "metric": pl.String, "split": pl.String, "unit": pl.String, "value": pl.Float64}


@dataclass
class Tape:
    """Measurements in the order in which they were made.

    Columns of the table: step (updates made before it), metric ("loss", "accuracy", "induction" ...), split (the
    prompts it was measured on: "train" or another split of the lesson; "train | match" under the edits of a progress
    measure named match), unit ("" for the whole model, "L1.H3" for a head), value.
    """

    rows: list[tuple[int, str, str, str, float]] = field(default_factory=list)
    _index: dict[tuple[str, str, str], list[tuple[int, float]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        rows, self.rows = self.rows, []
        for row in rows:
            self.add(*row)

    def add(self, step: int, metric: str, split: str, unit: str, value: float) -> None:
        """Note one number."""
        self.rows.append((step, metric, split, unit, value))
        self._index.setdefault((metric, split, unit), []).append((step, value))

    def points(self, metric: str, split: str = "train", unit: str = "") -> list[tuple[int, float]]:
        """(step, value) in order; empty where nothing was measured. "induction L1.H3" names a head's number too."""
        name, _, at = metric.partition(" ")
        return self._index.get((metric, split, unit)) or self._index.get((name, split, at), [])

    def curve(self, metric: str, split: str = "train", unit: str = "") -> tuple[list[int], list[float]]:
        """Steps and values of one number.

        Raises:
            ValueError: it was never measured; what was is named.
        """
        points = self.points(metric, split, unit)
        if not points:
            known = sorted({(m, s) for m, s, _ in self._index})
            said = "; ".join(f"{m} on {s}" for m, s in known) or "nothing"
            where = f" of {unit}" if unit else ""
            raise ValueError(f"The tape holds no {metric!r}{where} on {split!r}. It holds {said}.")
        return [step for step, _ in points], [value for _, value in points]

    def last(self, metric: str, split: str = "train", unit: str = "") -> float:
        """The latest value. Raises ValueError where there is none."""
        return self.curve(metric, split, unit)[1][-1]

    def heads(self, metric: str, split: str = "train", step: int | None = None) -> dict[str, float]:
        """{unit: value} of a number that every head has, at one step (by default the last)."""
        found: dict[str, float] = {}
        for (name, where, unit), points in self._index.items():
            if name == metric and where == split and unit:
                hit = [value for at, value in points if step is None or at == step]
                if hit:
                    found[unit] = hit[-1]
        return found

    def time_to(
        self, metric: str, *, below: float | None = None, above: float | None = None, split: str = "train"
    ) -> float:
        """The first measured step at which the metric is below (or above) a bound; infinity where it never is."""
        if (below is None) == (above is None):
            raise ValueError(f"The time to a {metric} needs exactly one of below= and above=.")
        for step, value in self._walk(metric, split):
            if (below is not None and value < below) or (above is not None and value > above):
                return float(step)
        return float("inf")

    def _walk(self, metric: str, split: str) -> Iterator[tuple[int, float]]:
        return zip(*self.curve(metric, split), strict=True)

    def frame(self) -> pl.DataFrame:
        """All of it as a table."""
        return pl.DataFrame(self.rows, schema=COLUMNS, orient="row")

    def save(self, path: Path, about: "dict[str, Any] | None" = None) -> None:
        """Write as parquet, aside and then renamed."""
        table = self.frame()
        notes = {str(key): str(value) for key, value in (about or {}).items()}
        write_aside(path, lambda p: table.write_parquet(p, compression="snappy", metadata=notes or None))

    @classmethod
    def load(cls, path: Path) -> "Tape":
        """Read a tape. Raises ValueError when the file is none."""
        try:
            table = pl.read_parquet(path, hive_partitioning=False).select(list(COLUMNS))
        except (pl.exceptions.PolarsError, OSError) as problem:
            raise ValueError(f"{path} is not a tape of a training run: {problem}") from problem
        return cls(rows=list(table.iter_rows()))

    @staticmethod
    def notes(path: Path) -> dict[str, str]:
        """What was noted of the run beside its rows: seed, lesson, and whether it is done."""
        return pl.read_parquet_metadata(path)
