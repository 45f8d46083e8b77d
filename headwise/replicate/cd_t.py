"""Mechanistic Interpretation through Contextual Decomposition in Transformers. Hsu et al., 2024. arXiv:2407.00886

Row s100 of the mission, on indirect objects. Every node of the default model is worth what the answer loses without its
relevant part, one pass a node. The heads worth most are a circuit: all others are set to what they are on the corrupt
prompt, on prompts that chose nothing. Toy circuits are those of planted models.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel

from headwise.circuits import CDT
from headwise.data import IOI, Induction, Planted
from headwise.decompose import Decomposition
from headwise.do import Patch, do
from headwise.models import open_model
from headwise.paths import prepare
from headwise.replicate import Outcome, Replication, settle
from headwise.scan import effects
from headwise.stats import spearman
from headwise.tap import tap
from headwise.task import Batch, answer_logits, logit_diff


@dataclass(frozen=True)
class ContextualDecomposition(Replication):
    """Ranks heads by decomposition, keeps the best fifth, and looks for planted edges."""

    row: ClassVar[str] = "s100"
    claim: ClassVar[str] = "A fifth of the heads, ranked by one decomposed pass each, does most of the task alone."
    paper: ClassVar[str] = "a more faithful circuit than path patching's for pathology reports, in half the time"

    share: ClassVar[float] = 0.2
    least_kept: ClassVar[float] = 0.8
    least_rank: ClassVar[float] = 0.6
    most_apart: ClassVar[float] = 1e-5
    fewer: ClassVar[float] = 5.0

    def run(self, seed: int = 0) -> Outcome:
        """Faithfulness of the heads worth most, held-out, beside that of as many heads drawn at random."""
        model, tokenizer = open_model("default")
        few = IOI().make(tokenizer, 8 if self.full else 4, seed)
        (paths,) = prepare(model, few, logit_diff, len(few))
        one = Decomposition(paths)
        heads = [name for name in paths.sources if ".H" in name]
        worth = dict(zip(heads, one.lost([(name, None) for name in heads]).mean(1).tolist(), strict=True))
        apart = {name: max(one.apart((name, None)).values()) for name in ("embed", "L0.H0", "L12.mlp", "L20.H3")}
        exact = effects(model, few, heads, "resample", logit_diff, label="s100 exact")
        rank = spearman([worth[name] for name in heads], [float(exact.of(name).mean()) for name in heads])
        held = IOI().make(tokenizer, 16, seed + 1)
        count = int(self.share * len(heads))
        best = sorted(heads, key=lambda name: -worth[name])[:count]
        draw = np.random.default_rng(seed)
        rivals = [list(draw.permutation(heads)[:count]) for _ in range(5)]
        kept = self._alone(model, held, heads, [best, *rivals])
        found, runs = self._planted(seed), len(paths.edges.all()) / len(paths.sources)
        return self._judge(kept[0], kept[1:], rank, apart, runs, found, count, len(heads))

    def _alone(self, model: PreTrainedModel, batch: Batch, heads: list[str], circuits: list[list[str]]) -> list[float]:
        """Share of the gap that is left when all heads but those of a circuit are as on the corrupt prompt."""
        with torch.no_grad():
            with tap(model, "z") as other:
                corrupt = float(logit_diff(answer_logits(model, batch, batch.corrupt), batch).mean())
            clean = float(logit_diff(answer_logits(model, batch), batch).mean())
            found = []
            for circuit in circuits:
                with do(model, *[Patch(name, other) for name in heads if name not in set(circuit)]):
                    value = float(logit_diff(answer_logits(model, batch), batch).mean())
                found.append((value - corrupt) / (clean - corrupt))
        return found

    def _planted(self, seed: int) -> dict[str, float]:
        """Precision and recall of edges above a tenth of the largest, over three planted models and two tasks."""
        hits = kept = there = 0
        for i in range(3):
            planted = Planted().build(seed + i)
            for task, must, may in planted_chains(planted.truth):
                graph = CDT().find(planted.model, task.make(planted.tokenizer, 4, seed))
                edges = set(graph.above(0.1 * max(abs(graph[edge]) for edge in graph.edges)).edges)
                hits, kept, there = hits + len(must & edges), kept + len(edges - may), there + len(must)
        return {"precision": hits / kept, "recall": hits / there}

    def _judge(self, kept, rivals, rank, apart, runs, found, count, heads) -> Outcome:
        checks = {
            f"{count} of {heads} heads keep at least {self.least_kept:.0%} of the logit difference": kept
            >= self.least_kept,
            "random heads keep less": kept > max(rivals),
            f"rank correlation with exact patching of single heads is above {self.least_rank}": rank > self.least_rank,
            f"parts add up to the value within {self.most_apart:.0e}": max(apart.values()) <= self.most_apart,
            f"path patching takes at least {self.fewer:.0f} times as many passes": runs >= self.fewer,
            "planted edges are found, all and no others": min(found.values()) == 1.0,
        }
        measured = (
            f"{count} of {heads} heads keep {kept:.0%} of the logit difference; rank correlation {rank:.2f}; parts add "
            f"up within {max(apart.values()):.0e}; planted edges: precision {found['precision']:.2f}, recall "
            f"{found['recall']:.2f}"
        )
        baseline = f"random heads keep {np.mean(rivals):.0%} (best of {len(rivals)}: {max(rivals):.0%})"
        numbers = {"kept": kept, "random": rivals, "rank": rank, "apart": apart, "edges_a_node": runs, **found}
        return settle(measured, baseline, checks, numbers)


def planted_chains(truth: dict[str, str], share: int = 1) -> list[tuple[Induction | IOI, set, set]]:
    """By task: the edges that were planted, and those of the same circuit that may show or not.

    Args:
        truth: role by unit; share: query heads that read one KV head.
    """
    at = {role: unit for unit, role in truth.items()}

    def of(role: str, side: str) -> str:
        layer, head = at[role].split(".H")
        return f"{layer}.G{int(head) // share}.{side}"

    before, after = at["previous token"], at["induction"]
    ways = {("embed", of("previous token", "v")), (before, of("induction", "k")), (after, "logits")}
    copy, ignore, mover = at["duplicate token"], at["subject inhibition"], at["name mover"]
    names = {("embed", f"{copy}.q"), (copy, of("subject inhibition", "k")), (ignore, f"{mover}.q"), (mover, "logits")}
    # The mover's keys hold names too: another name there matters where it is less like the ignored one.
    return [(Induction(), ways, set()), (IOI(), names, {("embed", of("name mover", "k"))})]
