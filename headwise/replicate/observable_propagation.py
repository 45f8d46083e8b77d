"""Observable Propagation: A Data-Efficient Approach to Uncover Feature Vectors in Transformers. Dunefsky and Cohan,
2023. arXiv:2312.16291

Row s059 of the mission. The observable is the logit of "she" minus that of "he"; ten prompts give the scales of the
norms and nothing else. All that is measured is measured on other prompts.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headwise.data import Pronouns
from headwise.direct import direct_attribution
from headwise.do import Add, do
from headwise.features import ObsProp
from headwise.features.obs_prop import amounts, column_scale, first_column
from headwise.models import open_model
from headwise.progress import hidden
from headwise.reader import Reader
from headwise.replicate import Outcome, Replication, settle
from headwise.scan import effects
from headwise.stats import spearman
from headwise.tap import tap
from headwise.task import Batch, answer_logits, logit_diff
from headwise.weights import Weights


@dataclass(frozen=True)
class ObservablePropagation(Replication):
    """Predicts what heads and pairs of heads add to an observable, ranks heads by it, and steers along its vectors."""

    row: ClassVar[str] = "s059"
    claim: ClassVar[str] = (
        "A feature vector for a path of heads follows from weights and few examples, tells what the path adds to a "
        "difference of logits, and steers it better than a probe on the same examples."
    )
    paper: ClassVar[str] = "surpasses probes where data are few; norms hardly turn the vectors (no single figure)"
    changed: ClassVar[str] = (
        "the first run took the scale of each norm from the column of the answer alone and failed, with correlations "
        "of 0.23 over heads and 0.18 over pairs: the first column, on which attention rests, is divided by up to 150 "
        "times more. Scales are now those of the columns that heads attend to, the first apart, on the same ten "
        "prompts; what is predicted is compared with the same numbers as before, by the same thresholds."
    )

    examples: ClassVar[int] = 10
    least_single: ClassVar[float] = 0.9
    least_pair: ClassVar[float] = 0.9
    least_rank: ClassVar[float] = 0.6
    strength: ClassVar[float] = 0.5
    draws: ClassVar[int] = 20

    def run(self, seed: int = 0) -> Outcome:
        """Fit on ten prompts, measure on others."""
        model, tokenizer = open_model("default")
        dev = Pronouns().make(tokenizer, self.examples, seed)
        held = Pronouns().make(tokenizer, 64 if self.full else 32, seed + 1)
        she, he = (int(x) for x in (dev.answer[0, 0], dev.foil[0, 0]))
        with tqdm(total=4, desc="s059", disable=hidden(), leave=False) as bar:
            reader = ObsProp(plus=(she,), minus=(he,), chains=2).fit(model, [dev])
            bar.update()
            paths = self._paths(model, reader, held, she, he)
            bar.update()
            ranks = self._ranks(model, reader, held)
            bar.update()
            steering = self._steered(model, reader, dev, held, (she, he), seed)
            bar.update()
        return self._judge(paths, ranks, steering, len(held))

    def _paths(self, model: PreTrainedModel, reader: Reader, held: Batch, she: int, he: int) -> dict:
        """Correlation of predicted and actual contributions, all heads and prompts together; and of pairs of heads."""
        weights = Weights(model)
        toward = (weights.readout[she] - weights.readout[he]).expand(len(held), 1, -1)
        actual = direct_attribution(weights, held, toward)
        said, did = predicted(model, reader, held), {}
        for layer, values in actual.items():
            did |= {f"L{layer}.H{i}": values[:, i] for i in range(values.shape[1])}
        units = list(did)
        single = torch.stack([said[u] for u in units]), torch.stack([did[u] for u in units])
        size = single[1].abs().mean(1)
        best = size.topk(10).indices.tolist()
        inside = [float(np.corrcoef(single[0][i], single[1][i])[0, 1]) for i in best]
        names = [name for name in reader.maps if ">" in name]
        guess, real = pair_contributions(weights, reader, held, names)
        return {
            "single": float(np.corrcoef(single[0].flatten(), single[1].flatten())[0, 1]),
            "inside_best": float(np.median(inside)),
            "pairs": float(np.corrcoef(guess.flatten(), real.flatten())[0, 1]),
            "paths": [len(units), len(names)],
            "best": {units[i]: float(single[1][i].abs().mean()) for i in best[:5]},
        }

    def _ranks(self, model: PreTrainedModel, reader: Reader, held: Batch) -> dict:
        """Heads by what the reader says that the name changes, against what the answer loses without the name there."""
        sign = torch.where(held.answer[:, 0] == reader.found["plus"][0], 1.0, -1.0)
        clean, corrupt = (predicted(model, reader, one) for one in (held, held.flipped()))
        coefficient = {name: float(((clean[name] - corrupt[name]) * sign).mean()) for name in clean}
        lost = effects(model, held, list(clean), "resample", logit_diff, prompts=16)
        ablated = {name: float(lost.of(name).mean()) for name in clean}
        sizes = [np.abs(list(one.values())) for one in (coefficient, ablated)]
        order = sorted(ablated, key=lambda u: -abs(ablated[u]))
        top = max(coefficient, key=lambda u: abs(coefficient[u]))
        last = {u for u in clean if int(u[1:].split(".")[0]) >= 15}
        late = [np.abs([one[u] for u in clean if u in last]) for one in (coefficient, ablated)]
        return {
            "spearman": spearman(*sizes),
            "spearman_upper_half": spearman(*late),
            "top": top,
            "top_says": coefficient[top],
            "top_rank_in_ablation": order.index(top) + 1,
            "heads": len(clean),
        }

    def _steered(
        self, model: PreTrainedModel, reader: Reader, dev: Batch, held: Batch, words: tuple[int, int], seed: int
    ) -> dict:
        """Mean change of the observable when every column gets a vector of equal length, at one layer."""
        said = predicted(model, reader, dev)
        sign = torch.where(dev.answer[:, 0] == words[0], 1.0, -1.0)
        top = max(said, key=lambda u: float((said[u] * sign).mean()))
        site = reader[top].site
        with torch.no_grad(), tap(model, site) as t:
            model.base_model(**dev.inputs)
        values = t[site][:, 1:].float()
        inside = values.mean(1)
        size = self.strength * float(values.norm(dim=-1).mean())
        vectors = {"observable": reader[top].weight[:, 0], "probe": _probe(inside, sign)}
        vectors["difference of means"] = inside[sign > 0].mean(0) - inside[sign < 0].mean(0)
        draw = random.Random(f"s059 {seed}")
        for i in range(self.draws):
            generator = torch.Generator().manual_seed(draw.randrange(2**31))
            vectors[f"random {i}"] = torch.randn(inside.shape[1], generator=generator)
        moved = {name: self._moved(model, held, site, size * v / v.norm(), words) for name, v in vectors.items()}
        random_moves = [abs(v) for k, v in moved.items() if k.startswith("random")]
        return {
            "head": top,
            "observable": moved["observable"],
            "probe": moved["probe"],
            "difference of means": moved["difference of means"],
            "random_mean": float(np.mean(random_moves)),
            "random_max": max(random_moves),
        }

    def _moved(self, model: PreTrainedModel, held: Batch, site: str, vector: Tensor, words: tuple[int, int]) -> float:
        """Half the difference between both directions: what the vector does, without what any disturbance does."""
        sides = []
        for way in (1, -1):
            with torch.no_grad(), do(model, Add(site, way * vector)):
                logits = answer_logits(model, held)[:, 0].float()
            sides.append(float((logits[:, words[0]] - logits[:, words[1]]).mean()))
        return (sides[0] - sides[1]) / 2

    def _judge(self, paths: dict, ranks: dict, steering: dict, n: int) -> Outcome:
        checks = {
            f"predicted and actual contributions of single heads correlate by at least {self.least_single}": paths[
                "single"
            ]
            >= self.least_single,
            f"those of pairs of heads by at least {self.least_pair}": paths["pairs"] >= self.least_pair,
            f"rank correlation of the heads' coefficients with ablation above {self.least_rank}": ranks["spearman"]
            > self.least_rank,
            "steering along the vector moves the observable more than along a probe on the same examples": steering[
                "observable"
            ]
            > max(steering["probe"], steering["difference of means"]),
        }
        measured = (
            f"correlation {paths['single']:.2f} over {paths['paths'][0]} heads and {n} prompts (within the ten largest "
            f"heads, median {paths['inside_best']:.2f}), {paths['pairs']:.2f} over {paths['paths'][1]} pairs; rank "
            f"correlation with ablation {ranks['spearman']:.2f} (heads of the upper half "
            f"{ranks['spearman_upper_half']:.2f}), the first head {ranks['top']} is number "
            f"{ranks['top_rank_in_ablation']} of {ranks['heads']} there; steering at {steering['head']} moves the "
            f"observable by {steering['observable']:+.2f} logits"
        )
        baseline = (
            f"probe on the same {self.examples} examples {steering['probe']:+.2f}, difference of means "
            f"{steering['difference of means']:+.2f}, random vectors of that length {steering['random_mean']:.2f} "
            f"(largest {steering['random_max']:.2f})"
        )
        return settle(measured, baseline, checks, {"paths": paths, "ranks": ranks, "steering": steering})


@torch.no_grad()
def predicted(model: PreTrainedModel, reader: Reader, batch: Batch) -> dict[str, Tensor]:
    """{head: [B]} what the reader says each head adds at the answer: its pattern there, times its readings."""
    singles = [name for name in reader.maps if ">" not in name]
    with tap(model, "pattern", "resid_pre") as t:
        model.base_model(**batch.inputs)
    rows, first = torch.arange(len(batch)), first_column(batch)
    found = {}
    for name in singles:
        layer, index = name.split(".H")
        pattern = t[f"{layer}.pattern"][rows, int(index), batch.at[:, 0]].float()
        found[name] = (pattern * amounts(reader, name, t[reader[name].site], first)).sum(-1)
    return found


@torch.no_grad()
def pair_contributions(weights: Weights, reader: Reader, batch: Batch, names: list[str]) -> tuple[Tensor, Tensor]:
    """[pairs, B] predicted and actual contributions of "L2.H3>L5.H1": one head's pattern over another head's output.

    Actual is what the first head wrote on each prompt, through the second's weights, under the norms' own scales.
    """
    model, rows, at = weights.model, torch.arange(len(batch)), batch.at[:, 0]
    last = f"L{max(weights.layers)}.resid_post"
    with tap(model, "pattern", "z", "resid_pre", last) as t:
        model.base_model(**batch.inputs)
    end = weights.final.scale(t[last][rows, at])[:, 0]
    toward = weights.readout[reader.found["plus"][0]] - weights.readout[reader.found["minus"][0]]
    scales = {n: weights.pre_norm(n).scale(t[f"L{n}.resid_pre"]) for n in weights.layers}
    guesses, actual, first = [], [], first_column(batch)
    for name in names:
        (one, i), (two, j) = (part.split(".H") for part in name.split(">"))
        number, layer = int(one[1:]), int(two[1:])
        behind = t[f"{two}.pattern"][rows, int(j), at].float()
        before = t[f"{one}.pattern"][:, int(i)].float()
        given = amounts(reader, name, t[f"{one}.resid_pre"], first)
        guesses.append(torch.einsum("bm,bmk,bk->b", behind * column_scale(reader, two, first), before, given))
        ov = weights.ov(layer, int(j))
        reach = weights.o(number, int(i)) @ (ov.A @ (ov.B @ toward))
        read = (t[f"{one}.z"][:, :, int(i)].float() @ reach) / scales[layer][..., 0]
        actual.append((behind * read).sum(-1) / end)
    return torch.stack(guesses), torch.stack(actual)


def _probe(inside: Tensor, sign: Tensor) -> Tensor:
    """Direction of a ridge probe for the sign, on values [n, D]."""
    given = inside - inside.mean(0)
    gram = given @ given.T
    return given.T @ torch.linalg.solve(gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram)), sign)
