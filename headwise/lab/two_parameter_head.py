"""The mechanistic basis of data dependence and abrupt learning in an in-context classification task. Reddy, 2023.
arXiv:2312.03002

Row s074 of the mission. The paper's own equations could not be had; these are derived anew from its description.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from headwise.data import Exemplars
from headwise.lesson import generator
from headwise.method import Method
from headwise.tape import Tape
from headwise.task import Batch


@dataclass(frozen=True)
class TwoParameterHead(Method):
    """An induction head of two numbers under a classifier: how far it looks back, and how surely it matches.

    First layer: softmax(look_back x [key is the token before]) gathers what stood before each token. Second layer:
    softmax(match x (gathered . query)) gathers tokens for the query. ReLU layers classify query and gathered.

    Fields:
        steps, batch, lr: of Adam; `every`: steps from one measurement to the next.
        hidden: width of the two ReLU layers.
        lesson: what it is taught.
    """

    row: ClassVar[str] = "s074"

    steps: int = 1500
    batch: int = 128
    lr: float = 1e-2
    every: int = 25
    hidden: int = 128
    lesson: Exemplars = field(default_factory=lambda: Exemplars(classes=4096))

    def train(self, seed: int = 0) -> Tape:
        """Metrics "accuracy" on "train" and "new classes"; "look_back" and "match", the two numbers, on "train"."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = self.network()
        tape = Tape()
        optimiser = torch.optim.Adam(net.parameters(), lr=self.lr, fused=True)
        held = {split: self.lesson.on(split).make(None, 1024, seed=seed + 1) for split in ("train", "new classes")}
        for step in range(self.steps + 1):
            if step % self.every == 0:
                self._note(net, held, tape, step)
            batch = self.lesson.draw(self.batch, generator(seed, 7, step))
            loss = self.lesson.loss(net(batch), batch).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return tape

    def network(self) -> "Network":
        """A fresh one, with both numbers at 0."""
        return Network(self.lesson.dim, self.hidden, self.lesson.labels)

    def landscape(self, net: "Network", grid: Tensor, rows: int = 512, seed: int = 0) -> Tensor:
        """The loss over both numbers [G, G] (look_back down, match across) under the trained classifier."""
        batch = self.lesson.make(None, rows, seed=seed)
        found = torch.empty(len(grid), len(grid))
        before = net.look_back.data.clone(), net.match.data.clone()
        with torch.no_grad():
            for i, back in enumerate(grid):
                for j, match in enumerate(grid):
                    net.look_back.fill_(back)
                    net.match.fill_(match)
                    found[i, j] = self.lesson.loss(net(batch), batch).mean()
            net.look_back.copy_(before[0])
            net.match.copy_(before[1])
        return found

    def _note(self, net: "Network", held: dict[str, Batch], tape: Tape, step: int) -> None:
        with torch.no_grad():
            for split, batch in held.items():
                lesson = replace(self.lesson, split=split)
                logits = net(batch)
                tape.add(step, "loss", split, "", float(lesson.loss(logits, batch).mean()))
                for name, value in lesson.metrics(logits, batch).items():
                    tape.add(step, name, split, "", float(value.mean()))
        for name in ("look_back", "match"):
            tape.add(step, name, "train", "", float(getattr(net, name).detach()))


class Network(nn.Module):
    """The head and its classifier."""

    def __init__(self, dim: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.look_back, self.match = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.classify = nn.Sequential(
            nn.Linear(2 * dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        )

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, 1, labels] for the last position."""
        tokens = batch.inputs["inputs_embeds"]
        length = tokens.shape[1]
        before = torch.eye(length).roll(1, 0).tril(-1)
        unseen = torch.ones(length, length).triu(1).bool()
        first = (self.look_back * before).masked_fill(unseen, -torch.inf).softmax(-1)
        gathered = first @ tokens
        scores = self.match * (gathered[:, :-1] @ tokens[:, -1:, :].transpose(1, 2))[..., 0]
        second = scores.softmax(-1)[:, None] @ tokens[:, :-1]
        return self.classify(torch.cat([tokens[:, -1], second[:, 0]], -1))[:, None]
