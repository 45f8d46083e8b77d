"""Does Circuit Analysis Interpretability Scale? Evidence from Multiple Choice Capabilities in Chinchilla.
Lieberum et al., 2023. arXiv:2307.09458

Row s109 of the mission. The default model cannot answer with letters, so the same steps are taken on indirect objects:
nodes that write the answer straight to the logits, the heads among them, and their queries, keys and values kept in
three directions each, found on other prompts. Countries in place of persons are the wider distribution. Not covered:
letters themselves, and what the directions mean.
"""

import random
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwise.data import IOI, MultipleChoice
from headwise.data.ioi import drawn, in_order, said
from headwise.data.layout import lay_out, one_token_words
from headwise.data.words import CAPITALS
from headwise.decompose import Decomposition
from headwise.do import Intervention, do
from headwise.features import HeadSubspaces as Method
from headwise.features.head_subspaces import compressed
from headwise.models import open_model
from headwise.paths import prepare
from headwise.reader import Reader
from headwise.replicate import Outcome, Replication, settle
from headwise.replicate.runs import logits_of
from headwise.task import Batch, answer_logits, correct, logit_diff


@dataclass(frozen=True)
class HeadSubspaces(Replication):
    """Finds the nodes that say the name, and keeps their heads in three directions each."""

    row: ClassVar[str] = "s109"
    claim: ClassVar[str] = "A few directions of its heads' queries, keys and values carry a behaviour."
    paper: ClassVar[str] = "no loss in 3 directions on letters A to D in 70B Chinchilla; random labels lose"

    rank: ClassVar[int] = 3
    heads: ClassVar[int] = 5
    nodes: ClassVar[int] = 10
    least_kept: ClassVar[float] = 0.8
    least_right: ClassVar[float] = 0.95
    most_random: ClassVar[float] = 0.5
    least_said: ClassVar[float] = 0.8

    def run(self, seed: int = 0) -> Outcome:
        """What the heads are worth in their own directions, in random ones, and with other words than names."""
        model, tokenizer = open_model("default")
        n = 128 if self.full else 64
        dev, held = (even(IOI().make(tokenizer, n, seed + i)) for i in (0, 1))
        other = even(countries(tokenizer, n, seed + 2))
        (paths,) = prepare(model, dev.take(slice(0, 8)), logit_diff)
        straight = Decomposition(paths).lost_at_the_end([(name, None) for name in paths.sources]).mean(1)
        worth = dict(zip(paths.sources, straight.tolist(), strict=True))
        order = sorted(worth, key=lambda name: -worth[name])
        said_by = sum(worth[name] for name in order[: self.nodes]) / sum(worth.values())
        heads = [name for name in order if ".H" in name][: self.heads]
        reader = Method(rank=self.rank, heads=tuple(heads)).fit(model, [dev])
        found = {
            name: self._kept(model, batch, reader, heads, seed)
            for name, batch in (("names", held), ("countries", other))
        }
        letters = MultipleChoice().make(tokenizer, 32, seed)
        right = 100 * float((logits_of(model, letters).argmax(-1) == letters.answer[:, 0]).float().mean())
        return self._judge(found, said_by, heads, right, (len(held), len(other)))

    def _kept(self, model, batch: Batch, reader: Reader, heads: list[str], seed: int) -> dict[str, float]:
        """Share of what the heads are worth, above their means alone, and percent right."""
        columns = list(range(1, batch.ids.shape[1]))
        none = replace(reader, tables={name: table[:1] for name, table in reader.tables.items()})
        draw = torch.Generator().manual_seed(seed)
        tables = {}
        for name, table in reader.tables.items():
            rows = torch.linalg.qr(torch.randn(table.shape[1], self.rank, generator=draw))[0].T
            tables[name] = torch.cat([table[:1], rows])
        ways = {"own": reader, "none": none, "random": replace(reader, tables=tables)}
        values = {"whole": self._measured(model, batch, [])}
        for name, one in ways.items():
            values[name] = self._measured(model, batch, compressed(one, heads, columns=columns))
        gap = values["whole"][0] - values["none"][0]
        shares = {name: (values[name][0] - values["none"][0]) / gap for name in ("own", "random")}
        return {**shares, "worth": gap, **{f"right_{name}": value[1] for name, value in values.items()}}

    def _measured(self, model: PreTrainedModel, batch: Batch, changes: list[Intervention]) -> tuple[float, float]:
        """Mean logit difference, and percent of prompts whose answer beats its foil."""
        with torch.no_grad(), do(model, *changes):
            logits = torch.cat([answer_logits(model, part) for part in batch.chunks(16)])
        return float(logit_diff(logits, batch).mean()), 100 * float(correct(logits, batch).mean())

    def _judge(self, found: dict, said_by: float, heads: list[str], letters: float, n: tuple[int, int]) -> Outcome:
        names, wider = found["names"], found["countries"]
        checks = {
            f"in {self.rank} directions the heads keep {self.least_kept:.0%} of what they are worth": names["own"]
            >= self.least_kept,
            f"{self.least_right:.0%} of the right answers stay": names["right_own"]
            >= self.least_right * names["right_whole"],
            f"{self.rank} random directions keep less than {self.most_random:.0%}": names["random"] < self.most_random,
            f"{self.nodes} nodes write {self.least_said:.0%} of the logit difference": said_by >= self.least_said,
            "on other words than names they keep less": wider["own"] < names["own"],
        }
        measured = (
            f"{', '.join(heads)} in {self.rank} directions of query, key and value keep {names['own']:.0%} of the "
            f"{names['worth']:.2f} logits that they are worth ({names['right_own']:.0f} % right of "
            f"{names['right_whole']:.0f} %; {n[0]} prompts), with countries for names {wider['own']:.0%} of "
            f"{wider['worth']:.2f} ({n[1]} prompts); {self.nodes} nodes write {said_by:.0%} of the difference. "
            f"Letters: the model is right in {letters:.0f} %"
        )
        baseline = f"random directions keep {names['random']:.0%}; the heads' means alone 0 %"
        return settle(measured, baseline, checks, {"found": found, "said": said_by, "heads": heads, "letters": letters})


def countries(tokenizer: PreTrainedTokenizerBase, n: int, seed: int) -> Batch:
    """The prompts of `data.ioi` with countries in place of persons."""
    task, draw = IOI(), random.Random(f"countries {seed}")
    names = one_token_words(tokenizer, list(CAPITALS), 8, "countries")
    clean, corrupt = [], []
    for row in range(n):
        (io, s, other), template, words = drawn(draw, names, 3)
        who = in_order(row, io, s)
        clean.append(said(tokenizer, template, who, s, words, (io, s)))
        corrupt.append(said(tokenizer, template, who, other, words, (io, s)))
    return lay_out(task, tokenizer, clean, corrupt, n, seed)


def even(batch: Batch) -> Batch:
    """The prompts that have the most common length, without padding."""
    lengths = batch.inputs["attention_mask"].sum(1).tolist()
    usual = max(sorted(set(lengths)), key=lengths.count)
    chosen = batch.take([i for i, one in enumerate(lengths) if one == usual])
    cut = chosen.ids.shape[1] - usual

    def trimmed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value[:, cut:] for name, value in inputs.items()}

    spans = {name: value - cut for name, value in chosen.spans.items()}
    more = {"at": chosen.at - cut, "spans": spans, "corrupt": trimmed(chosen.corrupt)}
    return replace(chosen, inputs=trimmed(chosen.inputs), **more)
