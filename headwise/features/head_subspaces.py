"""Does Circuit Analysis Interpretability Scale? Evidence from Multiple Choice Capabilities in Chinchilla.
Lieberum et al., 2023. arXiv:2307.09458

Row s109 of the mission. What a head asks, offers and hands on is kept in a few directions, those in which its queries,
keys and values differ most on the prompts. If it does as well with them alone, they are what it works with there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.anatomy import anatomy
from headwise.direct import predicts
from headwise.do import Intervention
from headwise.listen import Place
from headwise.reader import FeatureMethod, Reader
from headwise.site import Site, Unit
from headwise.tap import tap
from headwise.task import Batch

SIDES = ("q", "k", "v")


@dataclass(frozen=True)
class HeadSubspaces(FeatureMethod):
    """The few directions in which a head's queries, keys and values differ most on the prompts, and their means.

    Queries are those of the columns that predict answers, keys and values those of all columns but padding and the
    first, which takes attention that is not needed. Tables "L5.H1.q", "L5.G0.k" and "L5.G0.v" hold the mean [d] above
    the directions [rank, d].

    Fields:
        rank: directions of each.
        heads: only these heads, and the KV heads that they read; all by default.
    """

    rank: int = 3
    heads: tuple[str, ...] = ()

    row: ClassVar[str] = "s109"
    needs: ClassVar[str] = "multiple_choice"

    def fit(self, model: PreTrainedModel, batches: Sequence[Batch]) -> Reader:
        """Tables by place; `found` has the share of the variance that each keeps.

        Raises:
            ValueError: no prompts, a rank below 1, no such head, or a model that does not predict next tokens.
        """
        predicts(model, "features.head_subspaces")
        if self.rank < 1:
            raise ValueError(f"rank = {self.rank} keeps no direction; allowed are 1 and more.")
        if not batches:
            raise ValueError("There are no prompts to read activations on; give at least one batch.")
        values = self._values(model, batches)
        tables, kept = {}, {}
        for name, rows in values.items():
            mean = rows.mean(0)
            _, size, directions = torch.linalg.svd(rows - mean, full_matrices=False)
            tables[name] = torch.cat([mean[None], directions[: self.rank]])
            total = size.square().sum().clamp_min(1e-30)
            kept[name] = round(float(size[: self.rank].square().sum() / total), 6)
        body = anatomy(model)
        units = [Unit.parse(name) for name in self.heads or body.units()]
        reads = {str(unit): body.group(unit.layer, unit.index) for unit in units}
        return Reader.of(self, model, batches, {}, tables=tables, found={"variance": kept, "reads": reads})

    def _values(self, model: PreTrainedModel, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """[N, d] by place."""
        body = anatomy(model)
        chosen = self.heads or tuple(body.units())
        found: dict[str, list[Tensor]] = {}
        sites = sorted({f"L{Unit.parse(name).layer}.{side}" for name in chosen for side in SIDES})
        for batch in (part.to(model.device) for one in batches for part in one.chunks(8)):
            with torch.no_grad(), tap(model, *sites) as t:
                model.base_model(**batch.inputs)
            row = torch.arange(len(batch), device=model.device)[:, None]
            seen = batch.inputs.get("attention_mask", torch.ones_like(batch.ids))
            counts = (seen.cumsum(1) > 1) & (seen > 0)
            done: set[str] = set()
            for name in chosen:
                unit = Unit.parse(name)
                group = body.group(unit.layer, unit.index)
                asked = t[f"L{unit.layer}.q"][:, unit.index][row, batch.at]
                found.setdefault(f"{name}.q", []).append(asked.flatten(0, 1).float().cpu())
                for side in ("k", "v"):
                    key = f"L{unit.layer}.G{group}.{side}"
                    if key not in done:
                        done.add(key)
                        value = t[f"L{unit.layer}.{side}"][:, group]
                        found.setdefault(key, []).append(value[counts[:, -value.shape[1] :]].float().cpu())
        return {name: torch.cat(rows) for name, rows in found.items()}


@dataclass(frozen=True, eq=False)
class Keep(Intervention):
    """Keep what a value has in some directions, and its mean in all others. Source: the mean, then orthonormal rows."""

    source: Tensor

    def new(self, value: Tensor, site: Site, place: Place) -> Tensor:
        """The value in its subspace."""
        mean, rows = self.source[0].to(value), self.source[1:].to(value)
        return mean + ((value - mean) @ rows.T) @ rows


def compressed(
    reader: Reader, heads: Sequence[str], sides: Sequence[str] = SIDES, columns: list[int] | None = None
) -> list[Keep]:
    """What keeps these heads in the reader's directions: their queries of the last column, their keys and values.

    Keys and values belong to a KV head, so that all heads that read it are kept in them.

    Args:
        columns: of keys and values, all by default; better without the first, which takes attention that is not needed.

    Raises:
        ValueError: the reader has no directions of a head.
    """
    places: dict[str, None] = {}
    for name in heads:
        layer = name.split(".")[0]
        if f"{name}.q" not in reader.tables:
            have = [key.removesuffix(".q") for key in reader.tables if key.endswith(".q")]
            raise ValueError(f"The reader {reader.name} has no directions of {name}; it has {', '.join(have[:4])} ....")
        places |= {f"{name}.q": None} if "q" in sides else {}
        places |= {f"{layer}.G{reader.found['reads'][name]}.{side}": None for side in ("k", "v") if side in sides}
    return [Keep(place, reader.tables[place], positions=[-1] if place.endswith(".q") else columns) for place in places]
