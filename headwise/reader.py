"""Reader: what was fitted to a model's activations or read from its weights, and says what a value inside it means.

    reader = hw.features.LogitLens().fit(model, [])
    reader.read(model, batch)["L23"].argmax(-1)     # what layer 23 would say in place of the last one
    reader.save("atlas/model/readers/logit_lens")

A reader is a set of affine maps, each from the values at one site. What comes out are numbers of its own, or vectors
that the model's own last norm and unembedding turn into logits. It belongs to the weights it was made with.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headwise.anatomy import anatomy
from headwise.do import Patch, do
from headwise.method import Method
from headwise.models import context_length, fingerprint, name_of
from headwise.probe import evaluating, probe_inputs
from headwise.scan import noting_tuples, skipping
from headwise.score import EVIDENCE, provenance
from headwise.tap import tap
from headwise.task import Batch
from headwise.writing import write_aside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
ENDS = ("values", "logits")
_NAME = r"[a-z0-9_-]+"


@dataclass(frozen=True)
class Map:
    """An affine map of the values at one site.

    Attributes:
        site: an address such as "L5.resid_post"; its values are [..., D].
        weight: [D, K], or None for the values themselves.
        bias: [K], or None.
    """

    site: str
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """Values [..., D] -> [..., K], in float32."""
        values = values.float()
        if self.weight is not None:
            values = values @ self.weight.to(values.device)
        return values if self.bias is None else values + self.bias.to(values.device)


@dataclass(frozen=True)
class Reader:
    """Maps from sites of one model, and what was measured of them.

    Attributes:
        name: what it is called, and its folder in an atlas: small letters, digits, hyphens, underscores.
        maps: {name: map}; names are free, such as "L5" or "L2.H3>L5.H1".
        ends: "values" where the outputs stand for themselves, "logits" where they enter the model's last norm.
        outputs: names of the K outputs, where they have any.
        tables: other tensors, such as the tokens that each neuron writes.
        found: what was measured while fitting, in types that JSON knows.
        evidence: the rung of the ladder on which it stands.
        about: provenance: method and fields, tasks, model, weight fingerprint, versions.

    Raises:
        ValueError: another name, ending or rung than these.
    """

    name: str
    maps: dict[str, Map]
    ends: str = "values"
    outputs: tuple[str, ...] = ()
    tables: dict[str, Tensor] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    evidence: str = "read"
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(_NAME, self.name):
            raise ValueError(f"{self.name!r} cannot name a reader: use small letters, digits, hyphens and underscores.")
        if self.ends not in ENDS:
            raise ValueError(f"A reader ends in {' or '.join(ENDS)}, not in {self.ends!r}.")
        if self.evidence not in EVIDENCE:
            raise ValueError(f"{self.evidence!r} is not a rung of evidence: {', '.join(EVIDENCE)}.")

    @classmethod
    def of(
        cls,
        method: "FeatureMethod",
        model: "PreTrainedModel",
        batches: Sequence[Batch],
        maps: Mapping[str, Map],
        **more: Any,
    ) -> "Reader":
        """A reader with the name, the rung and the provenance of the method that made it."""
        tasks = [dict(batch.about) | {"rows": len(batch)} for batch in batches]
        about = provenance(method, model, None) | {"task": tasks or None}
        name = method.identity()["name"].split(".")[-1]
        return cls(name=name, maps=dict(maps), evidence=method.evidence, about=about, **more)

    def belongs(self, model: "PreTrainedModel") -> None:
        """Raises ValueError when the reader was made with other weights."""
        mark = fingerprint(model)
        if self.about.get("fingerprint") != mark:
            raise ValueError(
                f"The reader {self.name} belongs to {self.about.get('model')} with weights "
                f"{self.about.get('fingerprint')}, not to {name_of(model)} with weights {mark}; fit it again."
            )

    def __getitem__(self, name: str) -> Map:
        if name not in self.maps:
            have = ", ".join(list(self.maps)[:4]) or "none"
            raise ValueError(f"The reader {self.name} has no map {name!r}; it has {len(self.maps)}, such as {have}.")
        return self.maps[name]

    @torch.no_grad()
    def read(self, model: "PreTrainedModel", batch: Batch, names: Sequence[str] = (), rows: int = 8) -> dict:
        """What the maps give on prompts.

        Args:
            names: only these maps; all by default.
            rows: prompts run at a time.

        Returns:
            {map: [B, P, K]} at the columns `batch.at`; K is the vocabulary where the reader ends in logits.

        Raises:
            ValueError: a map that it does not have, or a model with other weights.
        """
        self.belongs(model)
        chosen = {name: self[name] for name in names or self.maps}
        values = states(model, [batch], [one.site for one in chosen.values()], rows, flat=False)
        found = {name: one(values[one.site]) for name, one in chosen.items()}
        if self.ends == "values":
            return found
        with ending(model) as end:
            return {name: torch.cat([end(part) for part in value.split(rows)]) for name, value in found.items()}

    def save(self, folder: Path | str) -> None:
        """Write reader.safetensors and config.json into a folder, each aside first and then under its name."""
        folder = Path(folder)
        tensors = {f"table/{name}": value for name, value in self.tables.items()}
        for name, one in self.maps.items():
            parts = {"weight": one.weight, "bias": one.bias}
            tensors |= {f"map/{name}/{part}": value for part, value in parts.items() if value is not None}
        config = {
            "format": FORMAT,
            "name": self.name,
            "ends": self.ends,
            "outputs": list(self.outputs),
            "sites": {name: one.site for name, one in self.maps.items()},
            "evidence": self.evidence,
            "found": self.found,
            "about": self.about,
        }
        text = json.dumps(config, indent=2, default=str)
        held = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        mark = {"config": hashlib.sha256(text.encode()).hexdigest()}
        write_aside(folder / "reader.safetensors", lambda path: save_file(held, path, metadata=mark))
        write_aside(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, folder: Path | str) -> "Reader":
        """Read a reader. Raises ValueError when the folder holds none, half of one, or one of a newer headwise."""
        folder = Path(folder)
        try:
            text = (folder / "config.json").read_text(encoding="utf-8")
            config = json.loads(text)
            with safe_open(folder / "reader.safetensors", framework="pt") as data:
                mark = (data.metadata() or {}).get("config")
                held = {name: data.get_tensor(name) for name in data.keys()}  # noqa: SIM118 (safe_open is no dict)
            made = config.pop("format")
            sites = config.pop("sites")
            if made > FORMAT:
                raise ValueError(f"its format is {made}, newer than this headwise")
            if mark != hashlib.sha256(text.encode()).hexdigest():
                raise ValueError("its two files were not written together")
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as problem:
            raise ValueError(f"{folder} is not a headwise reader: {problem}") from problem
        maps = {n: Map(site, held.get(f"map/{n}/weight"), held.get(f"map/{n}/bias")) for n, site in sites.items()}
        tables = {name[6:]: value for name, value in held.items() if name.startswith("table/")}
        return cls(**config | {"maps": maps, "tables": tables, "outputs": tuple(config["outputs"])})


@torch.no_grad()
def states(
    model: "PreTrainedModel", batches: Sequence[Batch], sites: Sequence[str], rows: int = 8, flat: bool = True
) -> dict[str, Tensor]:
    """Values of the residual stream (or of neurons) at the columns `batch.at`, in float32 on the CPU.

    Args:
        flat: columns of all prompts below one another, without those that do not count (`batch.weight`).

    Returns:
        {site: [N, D]}, or {site: [B, P, D]} where not flat.

    Raises:
        ValueError: no prompts at all.
    """
    if not batches:
        raise ValueError("There are no prompts to read activations on; give at least one batch.")
    parts: dict[str, list[Tensor]] = {site: [] for site in sites}
    for batch in batches:
        for part in batch.chunks(rows):
            part = part.to(model.device)
            with tap(model, *parts) as t:
                model.base_model(**part.inputs)
            row = torch.arange(len(part), device=model.device)[:, None]
            for site, held in parts.items():
                value = t[site][row, part.at].float().cpu()
                if flat:
                    counts = torch.ones_like(part.at) if part.weight is None else part.weight
                    value = value[(counts != 0).cpu()]
                held.append(value)
    return {site: torch.cat(held) for site, held in parts.items()}


@contextmanager
def ending(model: "PreTrainedModel") -> Iterator[Any]:
    """The model's own way from its last residual stream to logits, as a function; gradients flow through it.

    The function takes [..., D] and gives [..., V]: the model runs with its blocks passed by, and the values in place of
    what the last of them hands on. So norms, biases and caps of the logits are the model's.
    """
    body = anatomy(model)
    blocks = body.blocks[""]
    last = f"L{max(blocks)}.resid_post"
    with noting_tuples(body) as tuples, evaluating(model):
        model(**probe_inputs(model))

    def end(values: Tensor) -> Tensor:
        given = values.reshape(1, -1, values.shape[-1]).to(model.device)
        # Positions are of no matter here, but some models have only so many.
        room = context_length(model) or given.shape[1]
        found = []
        for part in given.split(room, 1):
            ids = torch.zeros(part.shape[:2], dtype=torch.long, device=model.device)
            with do(model, Patch(last, part.to(model.dtype))):
                found.append(model(input_ids=ids).logits[0])
        return torch.cat(found).float().unflatten(0, values.shape[:-1]).to(values.device)

    with ExitStack() as stack:
        stack.enter_context(skipping(body, max(blocks) + 1, tuples))
        yield end


@dataclass(frozen=True)
class FeatureMethod(Method):
    """Base of the features room: a reader fitted to activations, or read from weights.

    Class attributes: `evidence`, the rung of the ladder on which it stands; `needs`, the data task it wants, "" when it
    reads weights only.
    """

    evidence: ClassVar[str] = "read"
    needs: ClassVar[str] = "neutral"

    def fit(self, model: "PreTrainedModel", batches: Sequence[Batch]) -> Reader:
        """The reader of this model, fitted on the columns `at` of these prompts."""
        raise TypeError(f"{type(self).__name__} does not say how it is fitted.")


def layers_of(model: "PreTrainedModel", wanted: Sequence[int]) -> list[int]:
    """The wanted layers, all blocks where none is named. Raises ValueError for one that the model does not have."""
    have = sorted(anatomy(model).blocks[""])
    for number in wanted:
        if number not in have:
            raise ValueError(f"This model has the layers {have[0]} to {have[-1]}, not {number}.")
    return list(wanted) or have
