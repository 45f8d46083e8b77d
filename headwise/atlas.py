"""Atlas: all that is known of one model, as a folder of plain files.

    atlas/<model>/atlas.json                                    model, weight fingerprint, layers, heads, tokenizer
    atlas/<model>/scores/step=<k>/score=<name>/<hash>.parquet   unit, layer, index, value, low, high, n
    atlas/<model>/claims.parquet   readouts.parquet   patterns/<prompt>.safetensors
    atlas/<model>/graphs/<name>.parquet                         edges between places, what they are worth
    atlas/<model>/readers/<name>/                               config.json, reader.safetensors

Files are written aside and renamed, so a crash leaves what was there. Two atlases of one model merge by copying.
"""

import difflib
import hashlib
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from safetensors import safe_open
from safetensors.numpy import save_file

from headwise.claim import ROLES, Claim, Rung
from headwise.graph import Graph
from headwise.reader import Reader
from headwise.score import Score
from headwise.writing import write_aside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
_CLAIMS = {
    "unit": pl.String, "role": pl.String, "verdict": pl.String, "step": pl.String, "score": pl.String,
    "value": pl.Float64, "low": pl.Float64, "high": pl.Float64, "null": pl.Float64, "p": pl.Float64,
    "p_holm": pl.Float64, "n": pl.Int64, "share": pl.Float64, "passed": pl.Boolean,
}  # fmt: skip
_READOUTS = {
    "unit": pl.String, "circuit": pl.String, "source": pl.String, "target": pl.String,
    "value": pl.Float64, "rank": pl.Int64,
}  # fmt: skip


BENCH = {
    "cache": pl.String,
    "at": pl.Int64,
    "bytes": pl.Int64,
    "share": pl.Float64,
    "prefill_s": pl.Float64,
    "decode_ms": pl.Float64,
    "peak_mb": pl.Float64,
    "kept": pl.Float64,
    "retrieval": pl.Float64,
    "nll": pl.Float64,
    "when": pl.String,
}


@dataclass(frozen=True)
class Atlas:
    """A folder of scores, claims, patterns and read-outs of one model.

    Raises:
        ValueError: the folder is no atlas, or was written by a newer headwise.
    """

    path: Path

    def __init__(self, path: "str | Path") -> None:
        object.__setattr__(self, "path", Path(path))
        about = self.about
        if about.get("format", 0) > FORMAT:
            raise ValueError(
                f"{path} was written by headwise {about.get('version')}, newer than this one; upgrade headwise."
            )

    @classmethod
    def of(cls, model: "PreTrainedModel", path: "str | Path", tokenizer: Any = None, step: int = 0) -> "Atlas":
        """Open the atlas of this model at `path`, or begin one. Other training steps of it have other weights.

        Raises:
            ValueError: the folder holds the atlas of other weights (at step 0), or of another architecture.
        """
        from headwise.anatomy import anatomy
        from headwise.models import fingerprint, name_of
        from headwise.score import release

        path = Path(path)
        mark = fingerprint(model)
        if (path / "atlas.json").exists():
            atlas = cls(path)
            if step != 0 and atlas.about["layers"] == anatomy(model).layers:
                return atlas
            if atlas.about["fingerprint"] != mark:
                raise ValueError(
                    f"{path} is the atlas of {atlas.about['model']} with weights {atlas.about['fingerprint']}, "
                    f"not of {name_of(model)} "
                    f"with weights {mark}. Choose another folder (map: --out, why: --atlas)."
                )
            return atlas
        body = anatomy(model)
        about = {
            "format": FORMAT,
            "model": name_of(model),
            "model_type": body.model_type,
            "fingerprint": mark,
            "layers": body.layers,
            "heads": {str(n): body.heads(n) for n in body.layers},
            "kv_heads": {str(n): body.kv_heads(n) for n in body.layers},
            "tokenizer": _tokenizer_mark(tokenizer),
            "version": release(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_aside(path / "atlas.json", lambda p: p.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8"))
        return cls(path)

    @property
    def about(self) -> dict[str, Any]:
        """The content of atlas.json."""
        file = self.path / "atlas.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{self.path} is not an atlas: it has no atlas.json. `headwise map` makes one.") from None
        except (json.JSONDecodeError, UnicodeDecodeError, NotADirectoryError) as problem:
            raise ValueError(f"{file} cannot be read as an atlas: {problem}") from problem

    def note(self, **facts: Any) -> None:
        """Add facts to atlas.json, such as how well the model does each task; None takes a fact away."""
        about = {key: fact for key, fact in (self.about | facts).items() if fact is not None}
        write_aside(
            self.path / "atlas.json", lambda p: p.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        )

    # Scores

    def _score_file(self, score: Score) -> Path:
        return self.path / "scores" / f"step={score.step}" / f"score={score.name}" / f"{score.key}.parquet"

    def add(self, score: Score) -> None:
        """Keep a score. One made in the same way before is replaced by it.

        Raises:
            ValueError: the score was measured on other weights (at the same training step).
        """
        mark = score.about.get("fingerprint")
        if score.step == 0 and mark is not None and mark != self.about["fingerprint"]:
            raise ValueError(
                f"The score {score.name} belongs to weights {mark}; this atlas holds {self.about['fingerprint']}."
            )
        write_aside(self._score_file(score), score.save)

    def names(self, step: int = 0) -> list[str]:
        """Names of the scores that are kept."""
        folder = self.path / "scores" / f"step={step}"
        return sorted(p.name.removeprefix("score=") for p in folder.glob("score=*") if any(p.glob("*.parquet")))

    def score(self, name: str, step: int = 0) -> Score:
        """The newest score of that name. Raises ValueError with the nearest name when there is none."""
        files = sorted(
            (self.path / "scores" / f"step={step}" / f"score={name}").glob("*.parquet"), key=lambda p: p.stat().st_mtime
        )
        if not files:
            names = self.names(step)
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"This atlas has no score {name!r} at step {step}; it has {', '.join(names) or 'none'}.{hint}"
            )
        return Score.load(files[-1])

    def made(self, about: dict[str, Any], step: int = 0) -> Score | None:
        """The score that was made in just this way (method, fields, task, weights), if it is kept."""
        wanted = _identity(about)
        for file in (self.path / "scores" / f"step={step}").glob("score=*/*.parquet"):
            note = json.loads(pl.read_parquet_metadata(file).get("headwise", "{}"))
            if _identity(note.get("about", {})) == wanted:
                return Score.load(file)
        return None

    def frame(self, name: str | None = None, step: int = 0) -> pl.DataFrame:
        """One score's table, or every score's with a column `score`."""
        if name is not None:
            return self.score(name, step).table
        frames = [self.score(n, step).table.with_columns(score=pl.lit(n)) for n in self.names(step)]
        return pl.concat(frames) if frames else pl.DataFrame()

    # Plans and measurements of caches

    def plans(self) -> dict[str, Path]:
        """{name: file} of the plans that are kept."""
        return {file.stem: file for file in sorted((self.path / "plans").glob("*.json"))}

    def add_bench(self, rows: list[dict[str, Any]]) -> None:
        """Keep measurements of caches; those of the same cache and length are replaced.

        Columns: cache, at (tokens), bytes, share (of the full cache's), prefill_s, decode_ms (a token), peak_mb,
        kept (share of the full cache's right answers), retrieval, nll (nats a token), when.
        """
        when = datetime.now(UTC).isoformat(timespec="seconds")
        new = pl.DataFrame([{**row, "when": when} for row in rows], schema=BENCH)
        old = self.bench().join(new.select("cache", "at"), on=("cache", "at"), how="anti")
        table = pl.concat([old, new])
        write_aside(self.path / "bench.parquet", lambda p: table.write_parquet(p, compression="snappy"))

    def bench(self) -> pl.DataFrame:
        """Measurements of caches, one row a cache and length; empty where none were made."""
        file = self.path / "bench.parquet"
        return pl.read_parquet(file) if file.is_file() else pl.DataFrame(schema=BENCH)

    # Graphs and readers

    def add_graph(self, name: str, graph: Graph) -> None:
        """Keep a graph of this model under a name; one of the same name is replaced.

        Raises:
            ValueError: a name that cannot be a file's, or a graph of other weights.
        """
        if not re.fullmatch(r"[a-z0-9_-]+", name):
            raise ValueError(f"{name!r} cannot name a graph: use small letters, digits, hyphens and underscores.")
        self._own(f"graph {name}", graph.about)
        graph.save(self.path / "graphs" / f"{name}.parquet")

    def graphs(self) -> dict[str, Path]:
        """{name: file} of the graphs that are kept."""
        return {file.stem: file for file in sorted((self.path / "graphs").glob("*.parquet"))}

    def graph(self, name: str) -> Graph:
        """A graph that is kept. Raises ValueError with the nearest name when there is none."""
        files = self.graphs()
        self._known("graph", name, list(files))
        return Graph.load(files[name])

    def add_reader(self, reader: Reader) -> None:
        """Keep a reader of this model; one of the same name is replaced. Raises ValueError for one of other weights."""
        self._own(f"reader {reader.name}", reader.about)
        reader.save(self.path / "readers" / reader.name)

    def readers(self) -> list[str]:
        """Names of the readers that are kept."""
        return sorted(p.parent.name for p in (self.path / "readers").glob("*/config.json"))

    def reader(self, name: str) -> Reader:
        """A reader that is kept. Raises ValueError with the nearest name when there is none."""
        self._known("reader", name, self.readers())
        return Reader.load(self.path / "readers" / name)

    def _own(self, what: str, about: dict[str, Any]) -> None:
        if about.get("fingerprint") != self.about["fingerprint"]:
            raise ValueError(
                f"The {what} belongs to weights {about.get('fingerprint')}; this atlas holds "
                f"{self.about['fingerprint']}."
            )

    def _known(self, what: str, name: str, names: list[str]) -> None:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"This atlas has no {what} {name!r}; it has {', '.join(names) or 'none'}.{hint}")

    # Claims

    def add_claims(self, claims: list[Claim], only_of: "set[str] | frozenset[str]" = frozenset()) -> None:
        """Keep claims; a claim on the same unit and role is replaced. Verdicts are stored as they were settled.

        Args:
            only_of: roles of which nothing but `claims` is to remain.
        """
        fresh = {(c.unit, c.role) for c in claims}
        before = [c for c in self.claims() if (c.unit, c.role) not in fresh and c.role not in only_of]
        kept = before + list(claims)
        rows = [row for claim in kept for row in claim.rows()]
        abouts = {f"{c.unit}|{c.role}": c.about for c in kept}
        table = pl.DataFrame(rows, schema=_CLAIMS)
        note = {"headwise": json.dumps(abouts, default=str)}
        write_aside(self.path / "claims.parquet", lambda p: table.write_parquet(p, compression="snappy", metadata=note))

    def claims(self, role: str | None = None, unit: str | None = None) -> list[Claim]:
        """The claims, of one role or one unit if given, in the order they were added."""
        file = self.path / "claims.parquet"
        if not file.exists():
            return []
        abouts = json.loads(pl.read_parquet_metadata(file).get("headwise", "{}"))
        found: dict[tuple[str, str], Claim] = {}
        for row in pl.read_parquet(file).iter_rows(named=True):
            key = (row.pop("unit"), row.pop("role"))
            verdict = row.pop("verdict")
            if role in (None, key[1]) and unit in (None, key[0]):
                claim = found.setdefault(key, Claim(*key, verdict=verdict, about=abouts.get("|".join(key), {})))
                claim.rungs.append(Rung(**row))
        return list(found.values())

    def heads(self) -> list[dict[str, Any]]:
        """One entry a head: unit, layer, index, role ("unknown" unless proved), all proved roles, verdict, scores."""
        proved: dict[str, list[str]] = {}
        verdicts: dict[str, set[str]] = {}
        for claim in self.claims():
            verdicts.setdefault(claim.unit, set()).add(claim.verdict)
            if claim.verdict == "proved":
                proved.setdefault(claim.unit, []).append(claim.role)
        order = [r.name for r in ROLES]
        values: dict[str, dict[str, float]] = {}
        for name in self.names():
            for unit, value in self.score(name).table.select("unit", "value").iter_rows():
                values.setdefault(unit, {})[name] = value
        entries = []
        for layer, count in ((n, self.about["heads"][str(n)]) for n in self.about["layers"]):
            for index in range(count):
                unit = f"L{layer}.H{index}"
                roles = sorted(proved.get(unit, []), key=lambda r: order.index(r) if r in order else len(order))
                said = verdicts.get(unit, set())
                verdict = "proved" if roles else "refuted" if said == {"refuted"} else "unknown"
                entries.append(
                    {
                        "unit": unit,
                        "layer": layer,
                        "index": index,
                        "role": roles[0] if roles else "unknown",
                        "roles": roles,
                        "verdict": verdict,
                        "scores": values.get(unit, {}),
                    }
                )
        return entries

    # Patterns and read-outs

    def add_pattern(self, prompt: str, tokens: list[str], text: str, patterns: dict[int, np.ndarray]) -> None:
        """Keep the attention patterns of one prompt: {layer: uint8 [H, Tq, Tk]}, 255 for a weight of 1."""
        if not re.fullmatch(r"[a-z0-9_-]+", prompt):
            raise ValueError(f"{prompt!r} cannot name a prompt: use small letters, digits, hyphens and underscores.")
        arrays = {f"L{layer}": np.ascontiguousarray(p, dtype=np.uint8) for layer, p in patterns.items()}
        note = {"tokens": json.dumps(tokens), "text": text}
        write_aside(self.path / "patterns" / f"{prompt}.safetensors", lambda p: save_file(arrays, p, metadata=note))

    def patterns(self) -> list[str]:
        """Names of the prompts whose patterns are kept."""
        return sorted(p.stem for p in (self.path / "patterns").glob("*.safetensors"))

    def pattern(self, prompt: str) -> tuple[list[str], str, dict[int, np.ndarray]]:
        """Tokens, text and {layer: uint8 [H, Tq, Tk]} of one prompt. Raises ValueError when it is not kept."""
        file = self.path / "patterns" / f"{prompt}.safetensors"
        if not file.exists():
            raise ValueError(
                f"This atlas keeps no patterns of {prompt!r}; it has {', '.join(self.patterns()) or 'none'}."
            )
        with safe_open(file, framework="numpy") as data:
            note = data.metadata()
            arrays = {int(k[1:]): data.get_tensor(k) for k in data.keys()}  # noqa: SIM118 (safe_open is no dict)
        return json.loads(note["tokens"]), note["text"], dict(sorted(arrays.items()))

    def add_readouts(self, table: pl.DataFrame) -> None:
        """Keep what heads read and write in tokens: unit, circuit ("ov" or "qk"), source, target, value, rank."""
        table = table.select(list(_READOUTS)).cast(_READOUTS)
        write_aside(self.path / "readouts.parquet", lambda p: table.write_parquet(p, compression="snappy"))

    def has_readouts(self) -> bool:
        """Whether read-outs are kept."""
        return (self.path / "readouts.parquet").exists()

    def readouts(self) -> pl.DataFrame:
        """The read-outs; an empty table when there are none."""
        file = self.path / "readouts.parquet"
        return pl.read_parquet(file) if file.exists() else pl.DataFrame(schema=_READOUTS)


def _identity(about: dict[str, Any]) -> str:
    fixed = {k: v for k, v in about.items() if k not in ("when", "versions")}
    return json.dumps(fixed, sort_keys=True, default=str)


def _tokenizer_mark(tokenizer: Any) -> str:
    """Hash of the vocabulary, "" where the model has none."""
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return ""
    words = "\n".join(f"{i}\t{w}" for w, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(words.encode()).hexdigest()[:16]
