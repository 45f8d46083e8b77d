"""A plan says what is done with each KV head, carries the evidence that chose it, and tells whether a test accepted it.

A plan belongs to one model: it holds the fingerprint of the weights and refuses others.
"""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from headwise.attach import attach, detach
from headwise.kv_cache import CacheMethod, KVCache, kv_units
from headwise.method import Method, load
from headwise.models import fingerprint, name_of
from headwise.pattern import to_kv_heads
from headwise.score import Score, release
from headwise.store import Turn
from headwise.writing import write_aside

FORMAT = "headwise.plan/1"
FILE = "plan.json"


@dataclass(frozen=True)
class Trial:
    """The acceptance test of a plan on the model it is for.

    Attributes:
        accepted: whether the plan passed; says: the sentence that gives the reason.
        rows: one dict a contestant (full cache, plan, random heads, streaming of equal bytes): name, bytes, qualities.
        rule: what had to hold, fixed before the test ran.
    """

    accepted: bool
    says: str
    rule: str
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What is done with the cache of each KV head of one model.

    Attributes:
        model: name of the model; fingerprint: of its weights; layout: {layer: KV heads whose cache can be chosen}.
        legend: {treatment: cache method}.
        heads: {"L5.G0": treatment}, for every KV head whose cache can be chosen.
        evidence: {"L5.G0": {score: value}}, what chose the treatment.
        trial: the acceptance test, or None where none was run.
        about: budget, length, seed, how heads were ranked, versions, time.

    Raises:
        ValueError: a treatment that the legend does not know.
    """

    model: str
    fingerprint: str
    layout: Mapping[str, int]
    legend: Mapping[str, CacheMethod]
    heads: Mapping[str, str]
    evidence: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    trial: Trial | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for unit, treatment in self.heads.items():
            if treatment not in self.legend:
                known = ", ".join(self.legend)
                raise ValueError(f"{unit} is to be treated as {treatment!r}; the legend of this plan has {known}.")

    @classmethod
    def of(
        cls, model: PreTrainedModel, legend: Mapping[str, CacheMethod], heads: Mapping[str, str], **rest: Any
    ) -> "Plan":
        """A plan for this model. KV heads that are not named get the first treatment of the legend.

        Raises:
            ValueError: a KV head that does not exist.
        """
        KVCache(model, {unit: legend[name] for unit, name in heads.items() if name in legend})
        first = next(iter(legend))
        chosen = {unit: heads.get(unit, first) for unit in kv_units(model)}
        return cls(name_of(model), fingerprint(model), layout_of(model), dict(legend), chosen, **rest)

    @classmethod
    def top(
        cls,
        model: PreTrainedModel,
        score: Score,
        share: float,
        then: "CacheMethod | None" = None,
        rest: "CacheMethod | None" = None,
    ) -> "Plan":
        """The best `share` of KV heads by a score keep everything, or are treated by `then`; the others by `rest`.

        A score over query heads counts for a KV head with the largest value in its group.

        Args:
            then: by default cache.preallocated, which keeps everything; rest: by default cache.duo's sinks and recents.

        Raises:
            ValueError: a share outside 0 to 1, or a score that lacks a KV head.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"The share of heads is {share}; allowed is 0 to 1.")
        values = kv_values(model, score)
        ranked = sorted(values, key=lambda unit: -values[unit])
        best = ranked[: round(share * len(ranked))]
        legend = {"stream": rest or _method("cache.duo"), "full": then or _method("cache.preallocated")}
        evidence = {unit: {score.name: values[unit]} for unit in values}
        return cls.of(model, legend, dict.fromkeys(best, "full"), evidence=evidence, about={"share": share})

    def treatments(self) -> dict[str, CacheMethod]:
        """{"L5.G0": cache method}."""
        return {unit: self.legend[name] for unit, name in self.heads.items()}

    def count(self) -> dict[str, int]:
        """How many KV heads get each treatment."""
        return {name: sum(one == name for one in self.heads.values()) for name in self.legend}

    def share_of_bytes(self, tokens: int) -> float:
        """Key-value bytes at so many tokens, as a share of what keeping everything takes."""
        kept = {name: held_share(method, tokens) for name, method in self.legend.items()}
        return sum(kept[name] for name in self.heads.values()) / max(1, len(self.heads))

    def check(self, model: PreTrainedModel) -> None:
        """Raises ValueError unless the plan is for this very model and names only heads that it has."""
        layout = layout_of(model)
        if dict(self.layout) != layout:
            odd = next(n for n in {**self.layout, **layout} if self.layout.get(n) != layout.get(n))
            made, found = _span(self.layout, odd), _span(layout, odd)
            raise ValueError(f"This plan was made for {self.model} with {made}; {name_of(model)} has {found}.")
        mine = fingerprint(model)
        if self.fingerprint != mine:
            raise ValueError(
                f"This plan was made for {self.model} with weights {self.fingerprint}; {name_of(model)} has weights "
                f"{mine}. Make a plan for it: headwise plan MODEL."
            )
        KVCache(model, self.treatments())

    def attach(self, model: PreTrainedModel, *, force: bool = False) -> None:
        """From now on plain `model.generate(...)` uses the plan; `detach` gives the model back.

        Args:
            force: attach it although its trial rejected it.

        Raises:
            ValueError: a plan of another model, or one that was rejected or never tried, without `force`.
        """
        self.check(model)
        if not force and self.trial is None:
            raise ValueError("This plan was never tried on its model; force=True (--force) attaches it all the same.")
        if not force and self.trial is not None and not self.trial.accepted:
            raise ValueError(
                f"This plan was rejected: {self.trial.says} force=True (--force) attaches it all the same."
            )
        attach(model, self.treatments())

    def detach(self, model: PreTrainedModel) -> None:
        """Give the model back as it was. Raises ValueError when no plan is attached."""
        detach(model)

    def new_cache(self, model: PreTrainedModel, reserve: int = 0) -> KVCache:
        """A fresh cache by this plan, for `past_key_values`; the model must be inside `caching(model)` or attached."""
        self.check(model)
        return KVCache(model, self.treatments(), reserve)

    def data(self) -> dict[str, Any]:
        """The plan as plain data, as it stands in the file."""
        trial = self.trial
        return {
            "format": FORMAT,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "layout": dict(self.layout),
            "legend": {name: as_data(method) for name, method in self.legend.items()},
            "heads": {
                unit: {"treatment": name, "scores": dict(self.evidence.get(unit, {}))}
                for unit, name in self.heads.items()
            },
            "trial": None if trial is None else {f.name: getattr(trial, f.name) for f in fields(trial)},
            "about": {"versions": {"headwise": release(), "transformers": transformers.__version__}, **self.about},
        }

    def save(self, path: "Path | str") -> None:
        """Write as JSON, aside first, so that no reader ever sees half a file."""
        text = json.dumps(self.data(), indent=1, ensure_ascii=False) + "\n"
        write_aside(Path(path), lambda aside: aside.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: "Path | str") -> "Plan":
        """Read a plan.

        Raises:
            ValueError: there is no such file, or it is not a plan that this headwise can read.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"There is no plan {path}. `headwise plan MODEL` makes one.")
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            if held["format"] != FORMAT:
                raise ValueError(f"its format is {held['format']!r}, known is {FORMAT!r}")
            rows = held["heads"]
            return cls(
                model=str(held["model"]),
                fingerprint=str(held["fingerprint"]),
                layout={str(layer): int(count) for layer, count in held["layout"].items()},
                legend={name: from_data(method) for name, method in held["legend"].items()},
                heads={unit: row["treatment"] for unit, row in rows.items()},
                evidence={unit: {k: float(v) for k, v in row["scores"].items()} for unit, row in rows.items()},
                trial=Trial(**held["trial"]) if held["trial"] else None,
                about=held["about"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as problem:
            raise ValueError(f"{path} is not a headwise plan: {problem}") from problem

    def save_pretrained(self, folder: "Path | str") -> None:
        """Write plan.json into a folder, such as the one of the model."""
        self.save(Path(folder) / FILE)

    @classmethod
    def from_pretrained(cls, name: "Path | str") -> "Plan":
        """Read the plan of a folder, or of a hub id.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        if Path(name).is_dir():
            return cls.load(Path(name) / FILE)
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            return cls.load(hf_hub_download(str(name), FILE))
        except (OSError, HfHubHTTPError, HFValidationError) as problem:
            first = str(problem).strip().splitlines()[0]
            raise ValueError(f"{name} is no folder with a {FILE}, and the hub gives none: {first}") from problem

    def push_to_hub(self, name: str, *, private: bool = False) -> str:
        """Upload plan.json to a model repository of the hub, made where there is none; returns its address."""
        from huggingface_hub import HfApi

        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        content = (json.dumps(self.data(), indent=1, ensure_ascii=False) + "\n").encode()
        api.upload_file(path_or_fileobj=content, path_in_repo=FILE, repo_id=name)
        return str(address)


def as_data(method: Method) -> dict[str, Any]:
    """A method as plain data: its name and fields; a field that is a method itself likewise."""
    held = {one.name: getattr(method, one.name) for one in fields(method)}
    plain = {name: as_data(one) if isinstance(one, Method) else one for name, one in held.items()}
    return {"method": method.identity()["name"], "fields": plain}


def from_data(data: Mapping[str, Any]) -> CacheMethod:
    """The cache method that `as_data` wrote down.

    Raises:
        ValueError: no such method, one of another room, or fields that it does not have.
    """
    kind = load(data["method"])
    if not (is_dataclass(kind) and issubclass(kind, CacheMethod)):
        raise ValueError(f"{data['method']} is no cache method")
    known = [one.name for one in fields(kind)]
    for name in data["fields"]:
        if name not in known:
            raise ValueError(f"{data['method']} has no field {name!r}; it has {', '.join(known) or 'none'}")
    values = {k: from_data(v) if isinstance(v, dict) and "method" in v else v for k, v in data["fields"].items()}
    return kind(**values)


def named_method(text: str) -> CacheMethod:
    """A cache method from words: "duo", "duo:sink=16,recent=128", or one inside another "quantised:bits=8,of=(duo)".

    Raises:
        ValueError: no such cache method or field, or a value of another kind.
    """
    name, _, rest = text.partition(":")
    name = name if "." in name else f"cache.{name}"
    given: dict[str, Any] = {}
    # Commas inside brackets belong to the method that stands there.
    for part in filter(None, re.split(r",(?![^(]*\))", rest)):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: write the fields as name=value, such as duo:sink=64,recent=256.")
        if value.startswith("(") and value.endswith(")"):
            given[key.strip()] = as_data(named_method(value[1:-1]))
            continue
        try:
            given[key.strip()] = json.loads(value)
        except ValueError as problem:
            raise ValueError(f"{text!r}: the value of {key} is {value!r}, which is no number.") from problem
    return from_data({"method": name, "fields": given})


@functools.lru_cache(maxsize=64)
def held_share(method: CacheMethod, tokens: int, size: int = 64) -> float:
    """Bytes that one KV head of `size` channels holds after so many tokens, as a share of all its keys and values.

    Measured: a store of the method is given random tokens in chunks of 256, and its tensors are counted.
    """
    store, draw = method.store(tokens), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for start in range(0, tokens, 256):
            q, k, v = torch.randn(3, 1, 1, min(256, tokens - start), size, generator=draw)
            store.attend(q, k, v, Turn(start, rotation=lambda: lambda x, by: x))
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in store.tensors()}
    return sum(held.values()) / (tokens * size * 2 * 4)


def _method(name: str) -> CacheMethod:
    return from_data({"method": name, "fields": {}})


def layout_of(model: PreTrainedModel) -> dict[str, int]:
    """{layer number: KV heads} of the layers whose cache can be chosen."""
    layout: dict[str, int] = {}
    for unit in kv_units(model):
        layer = unit.split(".")[0][1:]
        layout[layer] = layout.get(layer, 0) + 1
    return layout


def _span(layout: Mapping[str, int], odd: str) -> str:
    most = max(layout.values(), default=0)
    return f"{len(layout)} layers of {most} KV heads, {layout.get(odd, 0)} of them in layer {odd}"


def kv_values(model: PreTrainedModel, score: Score) -> dict[str, float]:
    """{"L5.G0": value}: a score of KV heads as it is, one of query heads by the largest value in the group.

    Raises:
        ValueError: the score says nothing of some KV head.
    """
    table = (score if score.kind == "kv" else to_kv_heads(score, model)).table
    values = {unit: value for unit, value in table.select("unit", "value").iter_rows() if value == value}
    missing = [unit for unit in kv_units(model) if unit not in values]
    if missing:
        raise ValueError(f"The score {score.name} says nothing of {missing[0]} and {len(missing) - 1} more KV heads.")
    return {unit: values[unit] for unit in kv_units(model)}
