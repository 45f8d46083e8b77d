"""Decoding specialised feature neurons in LLMs with the final projection layer. Davies, 2025. arXiv:2501.02688

Row s110 of the mission. The neurons are the twenty whose first token stands out most among all tokens and is a word;
nothing of how they behave enters the choice. There is one checkpoint only, so the tuning before which and after which
decodings are compared is a short one, done here.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwise.data import HeldOut, NeutralText
from headwise.do import Patch, do
from headwise.features import LmHeadNeurons
from headwise.models import open_model
from headwise.progress import hidden
from headwise.reader import Reader
from headwise.replicate import Outcome, Replication, settle
from headwise.site import Unit
from headwise.stats import auc
from headwise.tap import tap
from headwise.task import Batch
from headwise.weights import Weights


@dataclass(frozen=True)
class LmHeadNeuronDecoding(Replication):
    """Decodes all neurons, clamps the most specialised ones, asks when they are active, and decodes them when tuned."""

    row: ClassVar[str] = "s110"
    claim: ClassVar[str] = (
        "The unembedding, applied to a neuron's weights, names its concept: clamping it brings the concept out, and "
        "the names outlast tuning."
    )
    paper: ClassVar[str] = (
        "Llama 3.1 8B: a clamped 'dog' neuron always makes it talk of dogs; over 75 % of neurons keep their first "
        "token through instruction tuning"
    )

    changed: ClassVar[str] = (
        "in the first record random neurons were judged by the mean of their rises, in which rises and falls of up to "
        "ten nats cancelled (-0.19); it is now the mean of their sizes. When neurons are active was first asked on ten "
        "made-up sentences with each word put in, by the peak over the sentence: most of the words turned out to be of "
        "the kind of 'than' and 'their', which make no sense there, and the peak is often elsewhere (above 0.8 in "
        "none). It is now asked in real text, in the columns that predict the word, for what a neuron writes speaks of "
        "the next token; a second record had 24 windows of text, in which four of the twenty words stood often enough, "
        "and two neurons were above 0.8. No threshold was moved"
    )

    many: ClassVar[int] = 20
    places: ClassVar[int] = 5
    least_z: ClassVar[float] = 5.0
    size: ClassVar[float] = 1.0
    least_rise: ClassVar[float] = 2.0
    most_random: ClassVar[float] = 0.2
    least_auc: ClassVar[float] = 0.8
    least_share: ClassVar[float] = 0.5
    least_stable: ClassVar[float] = 0.75
    tuned_layers: ClassVar[tuple[int, ...]] = (0, 6, 12, 18, 24, 29)
    columns: ClassVar[slice] = slice(4, None)

    def run(self, seed: int = 0) -> Outcome:
        """Weights first, then clamping and activity, then a short tuning."""
        model, tokenizer = open_model("default")
        with tqdm(total=4, desc="s110", disable=hidden(), leave=False) as bar:
            reader = LmHeadNeurons(top=1).fit(model, [])
            bar.update()
            chosen = self._chosen(reader, tokenizer)
            clamped = self._clamped(model, tokenizer, chosen, seed)
            bar.update()
            active = self._active(model, tokenizer, chosen, seed)
            bar.update()
            stable = self._stable(model, tokenizer, seed)
            bar.update()
        return self._judge(reader, tokenizer, chosen, clamped, active, stable)

    def _chosen(self, reader: Reader, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
        """{unit: token} of the neurons with the largest z whose token is a word of four letters or more, one a word."""
        rows = []
        for name, z in reader.tables.items():
            if name.endswith("/z"):
                tokens = reader.tables[name.replace("/z", "/tokens")][:, 0]
                layer = name.removesuffix("/z")
                rows += [(float(v), f"{layer}.N{i}", int(tokens[i])) for i, v in enumerate(z) if v > self.least_z]
        found: dict[str, int] = {}
        words: set[str] = set()
        for _, unit, token in sorted(rows, reverse=True):
            text = tokenizer.decode([token])
            plain = text.strip().lower()
            if text.startswith(" ") and plain.isalpha() and plain.isascii() and len(plain) >= 4 and plain not in words:
                words.add(plain)
                found[unit] = token
            if len(found) == self.many:
                break
        return found

    def _clamped(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chosen: dict, seed: int) -> dict:
        """Mean rise of the token's log-probability on plain prose; the neuron writes as much as the stream holds."""
        batch = NeutralText(length=32).make(tokenizer, 8 if self.full else 4, seed)
        weights, draw = Weights(model), random.Random(f"s110 {seed}")
        places = {unit: Unit.parse(unit) for unit in chosen}
        with torch.no_grad(), tap(model, "resid_post") as t:
            own = self._logprobs(model, batch)
        rise, at_random = {}, {}
        for unit, token in chosen.items():
            layer = places[unit].layer
            norm = float(t[f"L{layer}.resid_post"][:, self.columns].norm(dim=-1).mean())
            written = weights.body.layer(layer).down.weight.detach()
            other = draw.choice([i for i in range(written.shape[1]) if i != places[unit].index])
            for index, into in ((places[unit].index, rise), (other, at_random)):
                value = self.size * norm / float(written[:, index].norm())
                with torch.no_grad(), do(model, Patch(f"L{layer}.N{index}", torch.tensor(value))):
                    into[unit] = float((self._logprobs(model, batch) - own)[..., token].mean())
        return {"rise": rise, "random": at_random}

    def _logprobs(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        return model(**batch.inputs).logits[:, self.columns].float().log_softmax(-1)

    def _active(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chosen: dict, seed: int) -> dict:
        """By neuron whose word stands in real text often enough: how much more active it is there than elsewhere (AUC).

        "due" is the column that predicts the word, "there" the word's own.
        """
        text = HeldOut(length=64).make(tokenizer, 1600 if self.full else 800, seed + 1)
        # For each word the first windows in which it stands; a batch of all would be mostly of other words.
        holds = [(text.ids[:, 1:] == token).any(1).nonzero()[: self.places, 0] for token in chosen.values()]
        text = text.take(torch.cat(holds).unique())
        values: dict[str, list[Tensor]] = {unit: [] for unit in chosen}
        for part in text.chunks(8):
            with torch.no_grad(), tap(model, *chosen) as t:
                model.base_model(**part.inputs)
            for unit in chosen:
                values[unit].append(t[unit].float())
        found = {}
        for unit, token in chosen.items():
            value, here = torch.cat(values[unit])[:, 1:].numpy(), (text.ids[:, 1:] == token).numpy()
            if here.sum() >= self.places:
                due = auc(value[:, :-1].ravel(), here[:, 1:].ravel())
                found[unit] = {"due": due, "there": auc(value.ravel(), here.ravel()), "places": int(here.sum())}
        return found

    def _stable(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict:
        """Share of up-projection neurons of some layers that keep their first token through a short tuning."""
        decoder = LmHeadNeurons(side="up", top=1, layers=self.tuned_layers)
        before = decoder.fit(model, [])
        steps = 30 if self.full else 12
        text = HeldOut(length=96).make(tokenizer, 2 * steps, seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0)
        losses = []
        for step in range(steps):
            ids = text.ids[2 * step : 2 * step + 2]
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        after = decoder.fit(model, [])
        same = [
            (table[:, 0] == after.tables[name][:, 0]).float().mean()
            for name, table in before.tables.items()
            if name.endswith("/tokens")
        ]
        third = max(1, steps // 3)
        return {
            "share": float(torch.stack(same).mean()),
            "steps": steps,
            "loss": [float(np.mean(losses[:third])), float(np.mean(losses[-third:]))],
        }

    def _judge(self, reader: Reader, tokenizer, chosen: dict, clamped: dict, active: dict, stable: dict) -> Outcome:
        rise, others = (list(clamped[key].values()) for key in ("rise", "random"))
        beside = float(np.mean(np.abs(others)))
        hits, there = (
            sum(one[kind] > self.least_auc for one in active.values()) / max(len(active), 1)
            for kind in ("due", "there")
        )
        z = torch.cat([table for name, table in reader.tables.items() if name.endswith("/z")])
        checks = {
            f"clamping raises the word's log-probability by at least {self.least_rise} nats on average": np.mean(rise)
            >= self.least_rise,
            f"random neurons of the same layers move it by less than {self.most_random}": beside < self.most_random,
            f"at least {100 * self.least_share:.0f} % are more active where their word is due (AUC above "
            f"{self.least_auc})": hits >= self.least_share,
            f"at least {100 * self.least_stable:.0f} % of up-projection neurons keep their first token": stable["share"]
            >= self.least_stable,
        }
        words = ", ".join(tokenizer.decode([token]).strip() for token in list(chosen.values())[:6])
        measured = (
            f"{len(z)} neurons decoded, {int((z > self.least_z).sum())} with a token above {self.least_z:.0f} standard "
            f"deviations; {len(chosen)} of them ({words} ...): clamped, their word gains {np.mean(rise):+.2f} nats "
            f"(smallest {min(rise):+.2f}); AUC above {self.least_auc} in {100 * hits:.0f} % where the word is due, in "
            f"{100 * there:.0f} % at the word ({len(active)} neurons whose word stands in the text); "
            f"{100 * stable['share']:.0f} % of up-projection neurons keep their first token through "
            f"{stable['steps']} steps of tuning (loss {stable['loss'][0]:.2f} to {stable['loss'][1]:.2f})"
        )
        baseline = (
            f"random neurons of the same layers that write as much: {beside:.2f} nats up or down "
            f"({np.mean(others):+.2f} on average, largest {max(others):+.2f}); AUC of chance 0.50"
        )
        numbers = {
            "neurons": {
                unit: {
                    "word": tokenizer.decode([token]),
                    "rise": clamped["rise"][unit],
                    "random": clamped["random"][unit],
                    "auc": active.get(unit),
                }
                for unit, token in chosen.items()
            },
            "stable": stable,
        }
        return settle(measured, baseline, checks, numbers)
