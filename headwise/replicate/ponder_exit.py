"""PALBERT: Teaching ALBERT to Ponder. Balagansky and Gavrilov, 2022. arXiv:2204.03276

Row s155 of the mission. A small BERT is trained here on questions of three difficulties, where the paper has ALBERT and
GLUE: a sign that gives the answer away, a token asked for that stands in the text or does not, and two of them whose
answers must be compared.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import BertConfig, BertModel

from headwise.decode import PALBERT
from headwise.decode.palbert import PonderHeads
from headwise.progress import hidden
from headwise.replicate import Outcome, Replication, settle
from headwise.stats import spearman

WORDS, LENGTH, LAYERS, WIDTH = 24, 10, 6, 48
CLS, NONE, YES, NO = WORDS, WORDS + 1, WORDS + 2, WORDS + 3


def questions(rows: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [rows, 4 + LENGTH], labels [rows] and difficulties 0 to 2 [rows].

    A row is CLS, a sign or none, two words asked for (one or none), and a text.
    """
    hard = torch.randint(3, (rows,), generator=draw)
    label = torch.randint(2, (rows,), generator=draw)
    text = torch.rand(rows, WORDS, generator=draw).argsort(1)[:, : LENGTH + 2]
    text, absent = text[:, :LENGTH], text[:, LENGTH:]
    place = torch.rand(rows, LENGTH, generator=draw).argsort(1)[:, :2]
    there = text.gather(1, place)
    # Of two words, the answer is whether both or neither stand in the text.
    first = torch.randint(2, (rows,), generator=draw)
    second = torch.where(label == 1, first, 1 - first)
    one = torch.where(torch.where(hard == 1, label, first) == 1, there[:, 0], absent[:, 0])
    two = torch.where(second == 1, there[:, 1], absent[:, 1])
    none = torch.full_like(one, NONE)
    sign = torch.where(hard == 0, torch.where(label == 1, YES, NO), none)
    asked = torch.stack([torch.where(hard > 0, one, none), torch.where(hard > 1, two, none)], 1)
    ids = torch.cat([torch.full((rows, 1), CLS), sign[:, None], asked, text], 1)
    return ids, label, hard


@dataclass(frozen=True)
class PonderExit(Replication):
    """Accuracy and layers by Q-exit, by PonderNet's drawn exits and by the last layer."""

    row: ClassVar[str] = "s155"
    claim: ClassVar[str] = "A fixed exit at the middle of the learned chances beats drawing the exit from them."
    paper: ClassVar[str] = "significantly better than PonderNet, and than PABEE on many GLUE tasks"

    least_gain: ClassVar[float] = 1.0
    most_layers: ClassVar[float] = 0.7
    most_lost: ClassVar[float] = 0.5
    least_rank: ClassVar[float] = 0.5

    def run(self, seed: int = 0) -> Outcome:
        """Train one encoder with its chances, and read it out in three ways on held-out questions."""
        torch.manual_seed(seed)
        draw, method = torch.Generator().manual_seed(seed), PALBERT(weight=0.1)
        size = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
        config = BertConfig(vocab_size=WORDS + 4, num_attention_heads=4, **size, hidden_dropout_prob=0.0)
        config.attention_probs_dropout_prob = 0.0
        model, heads = BertModel(config, add_pooling_layer=False), PonderHeads(WIDTH, 2)
        steps = 4000 if self.full else 2000
        weights = [*model.parameters(), *heads.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
        for step in tqdm(range(steps), desc="s155 training", disable=hidden(), leave=False):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1.0, (step + 1) / 100) * (1.02 - step / steps)
            ids, labels, _ = questions(64, draw)
            chances, logits = heads(model(input_ids=ids, output_hidden_states=True).hidden_states)
            loss = method.loss(chances, logits, labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
        model.eval()
        ids, labels, hard = questions(4000 if self.full else 2000, draw)
        with torch.no_grad():
            chances, logits = heads(model(input_ids=ids, output_hidden_states=True).hidden_states)
            with method.stopping(model, heads) as depths:
                stopped = heads.classify(model(input_ids=ids).last_hidden_state[:, 0])
        right = (logits.argmax(-1) == labels[:, None]).float()
        at = method.leaves(chances)
        drawn = [right.gather(1, method.drawn(chances, draw)[:, None]).mean() for _ in range(20)]
        found = {
            "last": 100 * float(right[:, -1].mean()),
            "q-exit": 100 * float(right.gather(1, at[:, None]).mean()),
            "drawn": 100 * float(torch.stack(drawn).mean()),
            "spread": 100 * float(torch.stack(drawn).std()),
            "layers": depths.mean,
            "rank": spearman(at.double().numpy(), hard.double().numpy()),
        }
        by_difficulty = [float((at[hard == level] + 1).double().mean()) for level in range(3)]
        by_layer = [100 * float(value) for value in right.mean(0)]
        agree = bool((stopped.argmax(-1) == logits[torch.arange(len(at)), at].argmax(-1)).all())
        agree &= bool(np.isclose(depths.mean, float((at + 1).double().mean())))
        return self._judge(found, by_difficulty, by_layer, agree, len(ids))

    def _judge(self, found: dict, by_difficulty: list[float], by_layer: list[float], agree: bool, n: int) -> Outcome:
        gain, share = found["q-exit"] - found["drawn"], found["layers"] / LAYERS
        checks = {
            f"Q-exit is right at least {self.least_gain:.0f} point more often than drawn exits": gain
            >= self.least_gain,
            f"it runs at most {self.most_layers:.0%} of the layers": share <= self.most_layers,
            f"and is at most {self.most_lost} points below the last layer": found["last"] - found["q-exit"]
            <= self.most_lost,
            f"exits rank questions by difficulty (Spearman above {self.least_rank})": found["rank"] > self.least_rank,
            "an encoder that really stops gives the same answers": agree,
        }
        levels = ", ".join(f"{value:.1f}" for value in by_difficulty)
        measured = (
            f"Q-exit {found['q-exit']:.1f} % right after {found['layers']:.1f} of {LAYERS} layers ({levels} by "
            f"difficulty, rank {found['rank']:.2f}); {n} questions"
        )
        baseline = (
            f"drawn exits {found['drawn']:.1f} % (spread over draws {found['spread']:.2f}, where Q-exit has none), the "
            f"last layer {found['last']:.1f} %"
        )
        numbers = {**found, "by difficulty": by_difficulty, "by layer": by_layer}
        return settle(measured, baseline, checks, numbers)
