"""Mask: units and how loudly each still speaks, 0 = silent, 1 = as it was.

The common currency of roles, circuits and edits.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from headwise.do import Scale
from headwise.score import Score
from headwise.site import Unit
from headwise.writing import write_aside

FORMAT = "headwise.mask/1"


@dataclass(frozen=True)
class Mask:
    """A set of units, each with a strength by which its output is multiplied.

    Units are heads ("L5.H1"), neurons ("L3.N1021") and sublayers ("L5.mlp", "L5.attn"). Algebra goes by units: where
    both sides have a unit, `|` keeps the smaller strength and `&` the larger.

    Attributes:
        units: strength of each unit; units that are not named keep strength 1 and are no members.
    """

    units: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fixed: dict[str, float] = {}
        for text, strength in sorted(self.units.items(), key=lambda item: _order(item[0])):
            if not isinstance(strength, (int, float)) or not math.isfinite(strength):
                raise ValueError(f"The strength of {text} is {strength!r}; it must be a finite number, 0 for silent.")
            fixed[str(_known(text))] = float(strength)
        object.__setattr__(self, "units", MappingProxyType(fixed))

    @classmethod
    def of(cls, units: Iterable[str], strength: float = 0.0) -> "Mask":
        """The given units, all with the same strength."""
        return cls(dict.fromkeys(units, strength))

    @classmethod
    def top(cls, score: Score, k: int, strength: float = 0.0) -> "Mask":
        """The k best units of a score. Raises ValueError when it has fewer with a value."""
        best = score.top(k)
        if k < 1 or len(best) < k:
            raise ValueError(
                f"{score.name} has {len(best) if k > 0 else len(score.table)} units to take; {k} were asked for."
            )
        return cls.of(best, strength)

    def __len__(self) -> int:
        return len(self.units)

    def __iter__(self) -> Iterator[str]:
        return iter(self.units)

    def __contains__(self, unit: object) -> bool:
        return unit in self.units

    def __getitem__(self, unit: str) -> float:
        """Strength of a unit, 1 for one that is no member."""
        return self.units.get(str(_known(unit)), 1.0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and dict(self.units) == dict(other.units)

    def __hash__(self) -> int:
        return hash(tuple(self.units.items()))

    def __or__(self, other: "Mask") -> "Mask":
        """Units of either side."""
        both = {u: min(self[u], other[u]) for u in self.units.keys() & other.units.keys()}
        return Mask({**self.units, **other.units, **both})

    def __and__(self, other: "Mask") -> "Mask":
        """Units of both sides."""
        return Mask({u: max(self[u], other[u]) for u in self.units.keys() & other.units.keys()})

    def __sub__(self, other: "Mask") -> "Mask":
        """Units of this side only."""
        return Mask({u: s for u, s in self.units.items() if u not in other.units})

    def jaccard(self, other: "Mask") -> float:
        """Units in common as a share of units in either; 1 for two empty masks."""
        either = self.units.keys() | other.units.keys()
        return len(self.units.keys() & other.units.keys()) / len(either) if either else 1.0

    def do(self) -> list[Scale]:
        """The interventions that apply the mask inside a `do` block. Units of strength 1 need none."""
        return [Scale(unit, strength) for unit, strength in self.units.items() if strength != 1.0]

    def save(self, path: Path | str) -> None:
        """Write as JSON, aside first, so that no reader ever sees half a file."""
        text = json.dumps({"format": FORMAT, "units": dict(self.units)}, indent=1) + "\n"
        write_aside(Path(path), lambda aside: aside.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: Path | str) -> "Mask":
        """Read a mask. Raises ValueError when the file is not one."""
        try:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
            if held["format"] != FORMAT:
                raise ValueError(f"its format is {held['format']!r}, known is {FORMAT!r}")
            return cls(held["units"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            raise ValueError(f"{path} is not a headwise mask: {problem}") from problem


def _known(text: str) -> Unit:
    unit = Unit.parse(text)
    if unit.letter not in ("H", "N", "mlp", "attn"):
        raise ValueError(f"{text} cannot be masked; a mask holds heads (L5.H1), neurons (L3.N7), L5.mlp and L5.attn.")
    return unit


def _order(text: str) -> tuple[str, int, str, int]:
    unit = _known(text)
    return unit.stack, unit.layer, unit.letter, unit.index
