"""Score: one number per unit, with real layer numbers, an interval, its evidence and how it was made."""

import dataclasses
import hashlib
import json
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from torch import Tensor

from headwise import stats
from headwise.method import Method
from headwise.site import Unit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.task import Batch

EVIDENCE = ("seen", "read", "needed", "enough", "mediated", "grown")
LETTERS = {"head": "H", "kv": "G", "neuron": "N", "layer": ""}
COLUMNS = {
    "unit": pl.String,
    "layer": pl.Int64,
    "index": pl.Int64,
    "value": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "n": pl.Int64,
}


@dataclass(frozen=True)
class Score:
    """A table with one row a unit.

    Attributes:
        name: what the number is called, e.g. "induction".
        table: columns unit, layer, index, value, low, high (95 % bootstrap over prompts, NaN where there is one), n.
        kind: head, kv, neuron or layer.
        evidence: the rung of the ladder this number stands on.
        about: provenance: method and fields, task, model, weight fingerprint, versions.
        step: training step of the model.
    """

    name: str
    table: pl.DataFrame
    kind: str = "head"
    evidence: str = "seen"
    about: dict[str, Any] = field(default_factory=dict)
    step: int = 0

    def __post_init__(self) -> None:
        if self.evidence not in EVIDENCE:
            raise ValueError(f"{self.evidence!r} is not a rung of evidence: {', '.join(EVIDENCE)}.")
        if self.kind not in LETTERS:
            raise ValueError(f"{self.kind!r} is not a kind of unit: {', '.join(LETTERS)}.")
        if not re.fullmatch(r"[a-z0-9_]+", self.name):
            raise ValueError(f"{self.name!r} cannot name a score: use small letters, digits and underscores.")
        if list(self.table.columns) != list(COLUMNS):
            raise ValueError(
                f"A score has the columns {', '.join(COLUMNS)}; this one has {', '.join(self.table.columns)}."
            )

    @classmethod
    def of_heads(
        cls,
        method: Method,
        model: "PreTrainedModel",
        batch: "Batch | None",
        values: dict[int, Tensor],
        *,
        name: str | None = None,
        evidence: str | None = None,
        kind: str = "head",
        stack: str = "",
    ) -> "Score":
        """Make a score from values by layer, each [B, units] (one row a prompt) or [units] (read from weights)."""
        columns = {
            str(Unit(stack, layer, LETTERS[kind], i)): rows[:, i]
            for layer, value in values.items()
            for rows in [np.atleast_2d(value.detach().float().cpu().numpy())]
            for i in range(rows.shape[1])
        }
        return cls.of_units(method, model, batch, columns, name=name, evidence=evidence, kind=kind)

    @classmethod
    def of_units(
        cls,
        method: Method,
        model: "PreTrainedModel",
        batch: "Batch | None",
        values: "dict[str, Tensor | np.ndarray]",
        *,
        name: str | None = None,
        evidence: str | None = None,
        kind: str = "head",
    ) -> "Score":
        """Make a score from values by unit, each [B] (one a prompt) or [1] (read from weights)."""
        units = list(values)
        rows = (
            np.stack([np.asarray(v, dtype=np.float64).reshape(-1) for v in values.values()], 1)
            if units
            else np.empty((0, 0))
        )
        low, high = stats.interval(rows)
        places = [Unit.parse(unit) for unit in units]
        table = pl.DataFrame(
            {
                "unit": units,
                "layer": [p.layer for p in places],
                "index": [p.index for p in places],
                "value": rows.mean(0) if units else [],
                "low": low if units else [],
                "high": high if units else [],
                "n": [len(rows)] * len(units),
            },
            schema=COLUMNS,
        )
        return cls(
            name=name or method.identity()["name"].split(".")[-1],
            table=table,
            kind=kind,
            evidence=evidence or getattr(method, "evidence", "seen"),
            about=provenance(method, model, batch),
        )

    def __getitem__(self, unit: str) -> float:
        hit = self.table.filter(pl.col("unit") == unit)
        if hit.is_empty():
            raise ValueError(
                f"{self.name} has no unit {unit!r}; it has {len(self.table)} units, "
                f"such as {', '.join(self.table['unit'][:3])}."
            )
        return float(hit["value"][0])

    def frame(self) -> pl.DataFrame:
        """The table."""
        return self.table

    def top(self, k: int) -> list[str]:
        """The k units with the highest values, best first; units without a value never appear."""
        return (
            self.table.filter(pl.col("value").is_not_nan())
            .sort("value", descending=True, maintain_order=True)["unit"][:k]
            .to_list()
        )

    @property
    def layers(self) -> list[int]:
        """The real layer numbers that have a value."""
        return self.table["layer"].unique().sort().to_list()

    def matrix(self) -> np.ndarray:
        """[layers, units] values, NaN where a layer has fewer units. Rows follow `layers`."""
        width = int(self.table["index"].max() or 0) + 1 if len(self.table) else 0
        grid = np.full((len(self.layers), width), np.nan)
        place = {layer: i for i, layer in enumerate(self.layers)}
        for layer, index, value in self.table.select("layer", "index", "value").iter_rows():
            grid[place[layer], index] = value
        return grid

    @property
    def key(self) -> str:
        """Hash of how the number was made: the same key means it need not be made again."""
        fixed = {k: v for k, v in self.about.items() if k not in ("when", "versions", "machine")}
        return hashlib.sha256(
            json.dumps([self.name, self.step, fixed], sort_keys=True, default=str).encode()
        ).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write the table as parquet, with everything else as JSON in the file's metadata."""
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "table"}
        self.table.write_parquet(path, compression="snappy", metadata={"headwise": json.dumps(rest, default=str)})

    @classmethod
    def load(cls, path: Path) -> "Score":
        """Read a score. Raises ValueError when the file is not one."""
        try:
            rest = json.loads(pl.read_parquet_metadata(path)["headwise"])
            table = pl.read_parquet(path, hive_partitioning=False)
        except (KeyError, json.JSONDecodeError, pl.exceptions.PolarsError, OSError) as problem:
            raise ValueError(f"{path} is not a headwise score: {problem}") from problem
        return cls(table=table.select(list(COLUMNS)), **rest)


def provenance(method: Method, model: "PreTrainedModel", batch: "Batch | None") -> dict[str, Any]:
    """How a number was made: method, task, model, fingerprint, versions, time."""
    from datetime import UTC, datetime

    import torch
    import transformers

    from headwise.models import fingerprint, name_of

    return {
        "method": method.identity(),
        "task": dict(batch.about) | {"rows": len(batch)} if batch is not None else None,
        "model": name_of(model),
        "fingerprint": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {
            "headwise": release(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def release() -> str:
    """The version of headwise that is installed, "source" when it is run without being installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("headwise")
    except PackageNotFoundError:
        return "source"
