"""Sparse Autoencoders Enable Scalable and Reliable Circuit Identification in Language Models. O'Neill and Bui, 2024.
arXiv:2405.12522

A sparse autoencoder is trained on what the heads write on a few prompts that the model can answer and a few that it
cannot; the strongest feature of each head is its code on a prompt, an integer. A head belongs to the circuit when its
codes on the one kind of prompts do not appear on the other.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwise.method import HeadMethod
from headwise.score import Score
from headwise.tap import tap
from headwise.task import Batch
from headwise.weights import Weights


@dataclass(frozen=True)
class DiscreteSAE(HeadMethod):
    """Share of prompts on which the head's code, its strongest feature, is one that no prompt of the other kind has.

    Prompts are those of the batch and their corrupt twins, 5 to 10 of each, read in the answer's column. 0 where both
    kinds share all codes, 1 where they share none.

    Fields:
        features: size of the dictionary that all heads share.
        sparsity: weight of the features' sizes beside the squared error.
        steps: of training, on all heads and prompts at once.
        seed: of the dictionary's first values.
    """

    features: int = 200
    sparsity: float = 0.02
    steps: int = 100
    seed: int = 0

    row: ClassVar[str] = "s103"
    evidence: ClassVar[str] = "seen"
    needs: ClassVar[str] = "ioi"

    def score(self, model: PreTrainedModel, batch: Batch) -> Score:
        """One number per head and prompt pair. Raises ValueError without corrupt prompts, or with a field below 1."""
        for name in ("features", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} trains nothing; allowed are 1 and more.")
        batch = batch.to(model.device)
        sides = [self.written(model, one) for one in (batch, batch.flipped())]
        codes = self.codes(torch.stack([torch.cat(list(side.values()), 1) for side in sides]))
        values = unshared(codes)
        widths = [value.shape[1] for value in sides[0].values()]
        parts = dict(zip(sides[0], values.split(widths, 1), strict=True))
        return Score.of_heads(self, model, batch, parts)

    def written(self, model: PreTrainedModel, batch: Batch) -> dict[int, Tensor]:
        """{layer: [B, H, D]} what each head writes in the answer's first column."""
        weights, found = Weights(model), {}
        with torch.no_grad(), tap(model, "z") as t:
            model.base_model(**batch.inputs)
        rows = torch.arange(len(batch), device=batch.at.device)
        for n, z in t.by_layer("z").items():
            out = torch.stack([weights.o(n, h) for h in range(z.shape[2])])
            # A pooled answer (images) has no column of its own beyond the first.
            found[n] = torch.einsum("bhd,hdD->bhD", z[rows, batch.at[:, 0]].float(), out)
        return found

    def codes(self, values: Tensor) -> Tensor:
        """[2, B, heads] integer codes of what heads write on both kinds of prompts, [2, B, heads, D]."""
        x = values.flatten(0, 2)
        x = x / x.square().mean().sqrt().clamp_min(1e-30)
        draw = torch.Generator().manual_seed(self.seed)
        middle = x.mean(0)
        first = torch.randn(x.shape[1], self.features, generator=draw).to(x.device) / x.shape[1] ** 0.5
        read, write = nn.Parameter(first.clone()), nn.Parameter(first.T.clone())
        shift, bias = nn.Parameter(middle.clone()), nn.Parameter(torch.zeros(self.features, device=x.device))
        optimizer = torch.optim.Adam([read, write, shift, bias], lr=1e-2)
        with torch.enable_grad():
            for _ in range(self.steps):
                feature = torch.relu((x - shift) @ read + bias)
                error = (feature @ write + shift - x).square().mean()
                loss = error + self.sparsity * feature.mean(0).sum() / x.shape[1] ** 0.5
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            return torch.relu((x - shift) @ read + bias).argmax(-1).view(values.shape[:3])


def unshared(codes: Tensor) -> Tensor:
    """[B, heads] share of a pair of prompts whose code the other kind never has: 0, 0.5 or 1. codes [2, B, heads]."""
    clean, corrupt = codes
    own = [~(mine[:, None] == other[None]).any(1) for mine, other in ((clean, corrupt), (corrupt, clean))]
    return torch.stack(own).float().mean(0)
