"""The Local Interaction Basis: Identifying Computationally-Relevant and Sparsely Interacting Features in Neural
Networks. Bushnaq et al., 2024. arXiv:2405.10928

Row s024 of the mission. A transformer of one block is trained here to add two numbers modulo 31; then the edges between
the residual stream in front of its MLP and behind it are cut, the weakest first. On the default model, where edges are
too many to be cut one by one, it is counted how many of them hold nine tenths of what each direction takes in: shares,
for two bases measure the lengths of their directions differently.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from headwise.data import HeldOut
from headwise.do import Patch, do
from headwise.features import LIB
from headwise.features.lib import interactions
from headwise.models import open_model
from headwise.progress import hidden
from headwise.reader import Reader, states
from headwise.replicate import Outcome, Replication, settle
from headwise.task import Batch, answer_logits

P = 31
PLACES = ("L0.resid_mid", "L0.resid_post")


def sums() -> Batch:
    """All pairs of numbers below 31, "a b =", with their sum modulo 31 as the answer."""
    a, b = (x.flatten() for x in torch.meshgrid(torch.arange(P), torch.arange(P), indexing="ij"))
    ids = torch.stack([a, b, torch.full_like(a, P)], 1)
    return Batch({"input_ids": ids}, at=torch.full((len(ids), 1), 2), answer=((a + b) % P)[:, None])


def trained_to_add(seed: int, steps: int) -> tuple[LlamaForCausalLM, float, float]:
    """A block of four heads and an MLP, trained on four fifths of the pairs; its accuracy on them and on the rest."""
    torch.manual_seed(seed)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "max_position_embeddings": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=P + 1, **size, **heads, **ends, tie_word_embeddings=False))
    batch = sums()
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    seen, unseen = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=steps)
    model.train()
    for _ in tqdm(range(steps), desc="s024 training", disable=hidden(), leave=False):
        logits = model(input_ids=batch.ids[seen], logits_to_keep=1).logits[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, batch.answer[seen, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        right = (answer_logits(model, batch)[:, 0].argmax(-1) == batch.answer[:, 0]).float()
    return model, float(right[seen].mean()), float(right[unseen].mean())


@dataclass(frozen=True)
class LocalInteractionBasis(Replication):
    """Counts the interactions that a network needs, in this basis and in that of principal axes."""

    row: ClassVar[str] = "s024"
    claim: ClassVar[str] = (
        "In the local interaction basis fewer interactions carry modular addition than in principal axes; on language "
        "models it is no substantial gain."
    )
    paper: ClassVar[str] = "sparser on modular addition and CIFAR-10; no substantial improvement on language models"

    changed: ClassVar[str] = (
        "nine tenths were those of the sum over all edges of the default model, though directions differ in length; "
        "they are those of each direction's own edges; no threshold was moved"
    )

    least_accuracy: ClassVar[float] = 0.99
    most_ratio: ClassVar[float] = 0.7
    least_model_ratio: ClassVar[float] = 0.7
    layer: ClassVar[int] = 12

    def run(self, seed: int = 0) -> Outcome:
        """The small model first, then one layer of the default model."""
        model, train, test = trained_to_add(seed, 6000 if self.full else 3000)
        batch = sums()
        reader = LIB(places=PLACES, probes=64, rows=len(batch), drop=1e-4).fit(model, [batch])
        small: dict = {"train": train, "test": test}
        for kind in ("", " pca"):
            source, target = (place + kind for place in PLACES)
            table = interactions(model, reader, batch, source, target, rows=len(batch))
            needed, curve = self._needed(model, reader, batch, source, target, table)
            small[kind.strip() or "lib"] = {
                "directions": list(table.shape),
                "edges": table.numel(),
                "needed": needed,
                "share": needed / table.numel(),
                "curve": curve,
                "ninetenths": _holding(table),
            }
        return self._judge(small, self._default(seed))

    def _needed(
        self, model: PreTrainedModel, reader: Reader, batch: Batch, source: str, target: str, table: Tensor
    ) -> tuple[int, list]:
        """The smallest number of edges, largest first, with which the accuracy is still 99 %; found by bisection."""
        order = table.flatten().argsort(descending=True)
        low, high, curve = 0, len(order), []
        while high - low > max(1, low // 50):
            middle = (low + high) // 2
            kept = torch.zeros(len(order), dtype=torch.bool)
            kept[order[:middle]] = True
            right = cut_accuracy(model, reader, batch, source, target, kept.view(table.shape))
            curve.append([middle, right])
            low, high = (low, middle) if right >= self.least_accuracy else (middle, high)
        return high, sorted(curve)

    def _default(self, seed: int) -> dict:
        """Around the MLP of one layer: how many edges hold nine tenths of the squared interaction of every target."""
        model, tokenizer = open_model("default")
        windows = HeldOut(length=96).make(tokenizer, 16 if self.full else 10, seed)
        keep = slice(8, None)
        batch = Batch(windows.inputs, at=windows.at[:, keep].clone(), answer=windows.answer[:, keep])
        places = tuple(f"L{self.layer}.{kind}" for kind in ("resid_mid", "resid_post"))
        reader = LIB(places=places, probes=4, rows=2, drop=1e-5, seed=seed).fit(model, [batch])
        few = Batch(
            {k: v[:1] for k, v in batch.inputs.items()}, at=batch.at[:1, :48].clone(), answer=batch.answer[:1, :48]
        )
        found = {}
        for kind in ("", " pca"):
            table = interactions(model, reader, few, *(place + kind for place in places), steps=2, rows=1)
            found[kind.strip() or "lib"] = {"edges": table.numel(), "ninetenths": _holding(table)}
        return found

    def _judge(self, small: dict, default: dict) -> Outcome:
        lib, pca = small["lib"], small["pca"]
        ratio = lib["needed"] / pca["needed"]
        apart = default["lib"]["ninetenths"] / default["pca"]["ninetenths"]
        checks = {
            f"modular addition: at most {self.most_ratio} times the interactions of principal axes for "
            f"{100 * self.least_accuracy:.0f} % accuracy": ratio <= self.most_ratio,
            f"the small model adds at least {100 * self.least_accuracy:.0f} % of its pairs": small["train"]
            >= self.least_accuracy,
            f"default model: no gain of that size (at least {self.least_model_ratio} times)": apart
            >= self.least_model_ratio,
        }
        measured = (
            f"modular addition ({100 * small['train']:.0f} % right on pairs seen, {100 * small['test']:.0f} % on "
            f"others): {lib['needed']} of {lib['edges']} interactions are needed, {ratio:.2f} times those of principal "
            f"axes; default model, layer {self.layer}: {default['lib']['ninetenths']} edges hold nine tenths of what "
            f"each direction takes in, {apart:.2f} times those of principal axes"
        )
        baseline = (
            f"principal axes: {pca['needed']} of {pca['edges']} interactions on modular addition, "
            f"{default['pca']['ninetenths']} of {default['pca']['edges']} edges on the default model"
        )
        return settle(measured, baseline, checks, {"modular": small, "default_model": default, "ratio": [ratio, apart]})


@torch.no_grad()
def cut_accuracy(model: PreTrainedModel, reader: Reader, batch: Batch, source: str, target: str, kept: Tensor) -> float:
    """Accuracy where each direction of the target is computed from those source directions alone that its edges keep.

    The others stand at their mean over all prompts; so does what a basis has dropped at the source.
    """
    first, then = reader[source], reader[target]
    own = states(model, [batch], [first.site, then.site], rows=len(batch), flat=False)
    given = first(own[first.site])
    middle = own[first.site].mean((0, 1))
    back = reader.tables[f"{source}/back"]
    made = then(own[then.site])
    for j in range(kept.shape[0]):
        value = (given * kept[j]) @ back + middle
        whole = torch.cat([value.new_zeros(len(value), 2, value.shape[-1]), value], 1)
        changed = Patch(first.site, whole, positions=[2])
        with do(model, changed):
            made[..., j] = then(_behind(model, batch, then.site))[..., j]
    centre = own[then.site].mean((0, 1))
    end = made @ reader.tables[f"{target}/back"] + centre
    whole = torch.cat([end.new_zeros(len(end), 2, end.shape[-1]), end], 1)
    with do(model, Patch(then.site, whole, positions=[2])):
        said = answer_logits(model, batch)[:, 0].argmax(-1)
    return float((said == batch.answer[:, 0]).float().mean())


def _behind(model: PreTrainedModel, batch: Batch, site: str) -> Tensor:
    return states(model, [batch], [site], rows=len(batch), flat=False)[site]


def _holding(table: Tensor, share: float = 0.9) -> int:
    """How many edges [targets, sources] hold this share of the sum of squares of their target, the largest first."""
    squares = table.square().sort(1, descending=True).values.cumsum(1)
    return int((squares < share * squares[:, -1:]).sum()) + int((squares[:, -1] > 0).sum())
