"""PALBERT: Teaching ALBERT to Ponder. Balagansky and Gavrilov, 2022. arXiv:2204.03276

Row s155 of the mission. A small BERT learns here to follow arrows, where the paper has ALBERT and GLUE: each of eight
nodes points to one, and the question is where one, two or three steps from a node lead. A step needs what the one
before it found, so that more steps need more layers.
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

NODES, STEPS, LAYERS, WIDTH = 8, 3, 6, 64
START = NODES * NODES
COUNT = START + NODES
VOCAB = COUNT + STEPS


def questions(rows: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [rows, 2 + NODES], where the steps lead [rows], and how many more than one they are [rows].

    A row is the node to start from, the number of steps, and an arrow for each node in random order; an arrow from a to
    b is one token, a * NODES + b.
    """
    goal = torch.randint(NODES, (rows, NODES), generator=draw)
    start, more = (torch.randint(size, (rows, 1), generator=draw) for size in (NODES, STEPS))
    reached = start
    for step in range(STEPS):
        reached = torch.where(step <= more, goal.gather(1, reached), reached)
    order = torch.rand(rows, NODES, generator=draw).argsort(1)
    arrows = (torch.arange(NODES) * NODES + goal).gather(1, order)
    return torch.cat([start + START, more + COUNT, arrows], 1), reached[:, 0], more[:, 0]


@dataclass(frozen=True)
class PonderExit(Replication):
    """Accuracy and layers by Q-exit, by PonderNet, by exits drawn from the same chances and by the last layer."""

    row: ClassVar[str] = "s155"
    claim: ClassVar[str] = (
        "A fixed exit at the middle of the learned chances beats drawing the exit from them, as PonderNet does."
    )
    paper: ClassVar[str] = "significantly better than PonderNet, and than PABEE on many GLUE tasks"

    changed: ClassVar[str] = (
        "the first run had another task, of which the encoder learned a third, at every layer alike, so that it told "
        "nothing; a task that needs depth came in its place, and a condition that its learning must meet. On another "
        "seed, with a fifth of the weight of the prior and longer training, no answer was wrong by any exit; both were "
        "changed before the second run. That had no PonderNet of its own: its exits were drawn from PALBERT's chances, "
        "and were right as often as Q-exit's but for 0.2 points. An encoder with PonderNet's own chances, read by one "
        "layer from one state, stands first now. The other thresholds are those of the first."
    )

    least_gain: ClassVar[float] = 1.0
    most_layers: ClassVar[float] = 0.7
    most_lost: ClassVar[float] = 0.5
    least_rank: ClassVar[float] = 0.5
    least_depth: ClassVar[float] = 20.0

    def run(self, seed: int = 0) -> Outcome:
        """Train an encoder with PALBERT's chances and one with PonderNet's, and read them out on held-out questions."""
        method = PALBERT()
        (model, heads, draw), (other, theirs, _) = (self._trained(deep, seed) for deep in (True, False))
        ids, labels, hard = questions(4000 if self.full else 2000, draw)
        with torch.no_grad():
            chances, logits = heads(model(input_ids=ids, output_hidden_states=True).hidden_states)
            with method.stopping(model, heads) as depths:
                stopped = heads.classify(model(input_ids=ids).last_hidden_state[:, 0])
            rival, said = theirs(other(input_ids=ids, output_hidden_states=True).hidden_states)
        right = (logits.argmax(-1) == labels[:, None]).float()
        at = method.leaves(chances)
        drawn = [right.gather(1, method.drawn(chances, draw)[:, None]).mean() for _ in range(20)]
        rights = (said.argmax(-1) == labels[:, None]).float()
        places = [method.drawn(rival, draw)[:, None] for _ in range(20)]
        found = {
            "last": 100 * float(right[:, -1].mean()),
            "q-exit": 100 * float(right.gather(1, at[:, None]).mean()),
            "drawn": 100 * float(torch.stack(drawn).mean()),
            "spread": 100 * float(torch.stack(drawn).std()),
            "ponder net": 100 * float(torch.stack([rights.gather(1, one) for one in places]).mean()),
            "ponder net, last": 100 * float(rights[:, -1].mean()),
            "ponder net, layers": float(torch.stack(places).double().mean()) + 1,
            "layers": depths.mean,
            "rank": spearman(at.double().numpy(), hard.double().numpy()),
        }
        by_difficulty = [float((at[hard == level] + 1).double().mean()) for level in range(3)]
        by_layer = [100 * float(value) for value in right.mean(0)]
        agree = bool((stopped.argmax(-1) == logits[torch.arange(len(at)), at].argmax(-1)).all())
        agree &= bool(np.isclose(depths.mean, float((at + 1).double().mean())))
        return self._judge(found, by_difficulty, by_layer, agree, len(ids))

    def _trained(self, deep: bool, seed: int) -> tuple[BertModel, PonderHeads, torch.Generator]:
        """An encoder with heads, and the generator that goes on where training left it; the same questions for both."""
        torch.manual_seed(seed)
        draw, method = torch.Generator().manual_seed(seed), PALBERT()
        size = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
        config = BertConfig(vocab_size=VOCAB, num_attention_heads=4, **size, hidden_dropout_prob=0.0)
        config.attention_probs_dropout_prob = 0.0
        model, heads = BertModel(config, add_pooling_layer=False), PonderHeads(WIDTH, NODES, deep)
        steps = 6000 if self.full else 2500
        weights = [*model.parameters(), *heads.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
        for step in tqdm(range(steps), desc="s155 training", disable=hidden(), leave=False):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1.0, (step + 1) / 100) * (1.02 - step / steps)
            ids, labels, _ = questions(96, draw)
            chances, logits = heads(model(input_ids=ids, output_hidden_states=True).hidden_states)
            loss = method.loss(chances, logits, labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
        return model.eval(), heads, draw

    def _judge(self, found: dict, by_difficulty: list[float], by_layer: list[float], agree: bool, n: int) -> Outcome:
        share = found["layers"] / LAYERS
        checks = {
            f"Q-exit is right at least {self.least_gain:.0f} point more often than PonderNet": found["q-exit"]
            - found["ponder net"]
            >= self.least_gain,
            f"and than exits drawn from the same chances, by {self.least_gain:.0f} point": found["q-exit"]
            - found["drawn"]
            >= self.least_gain,
            f"it runs at most {self.most_layers:.0%} of the layers": share <= self.most_layers,
            f"and is at most {self.most_lost} points below the last layer": found["last"] - found["q-exit"]
            <= self.most_lost,
            f"exits rank questions by their steps (Spearman above {self.least_rank})": found["rank"] > self.least_rank,
            f"the last layer is right at least {self.least_depth:.0f} points more often than the first": by_layer[-1]
            - by_layer[0]
            >= self.least_depth,
            "an encoder that really stops gives the same answers": agree,
        }
        levels = ", ".join(f"{value:.1f}" for value in by_difficulty)
        measured = (
            f"Q-exit {found['q-exit']:.1f} % right after {found['layers']:.1f} of {LAYERS} layers ({levels} by "
            f"steps, rank {found['rank']:.2f}); {n} questions"
        )
        baseline = (
            f"PonderNet {found['ponder net']:.1f} % after {found['ponder net, layers']:.1f} layers (its last layer "
            f"{found['ponder net, last']:.1f} %); exits drawn from the same chances {found['drawn']:.1f} % (spread "
            f"over draws {found['spread']:.2f}, where Q-exit has none), the last layer {found['last']:.1f} %"
        )
        numbers = {**found, "by difficulty": by_difficulty, "by layer": by_layer}
        return settle(measured, baseline, checks, numbers)
