"""A Mathematical Framework for Transformer Circuits. Elhage et al., 2021. https://transformer-circuits.pub/2021/framework

An induction head told from weights: its queries match keys that an earlier previous-token head has written, and tokens
match themselves in that matching, which shows as positive eigenvalues.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from headwise.method import HeadMethod
from headwise.score import Score
from headwise.tap import per_row
from headwise.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.task import Batch


@dataclass(frozen=True)
class Composition(HeadMethod):
    """Prefix matching by composition: how well a token's query fits the key that previous-token heads made of it.

    For each previous-token head below, the eigenvalues of token -> QK -> (OV of that head) -> token are summed and
    divided by the sum of their sizes, from -1 to 1; the score is the mean over these heads, weighted by how much of
    the key they make.

    Fields:
        writers: how many previous-token heads are used, the strongest ones.
        threshold: least attention to the previous token that makes a previous-token head.
    """

    writers: int = 8
    threshold: float = 0.3

    evidence: ClassVar[str] = "read"

    @torch.no_grad()
    def score(self, model: "PreTrainedModel", batch: "Batch") -> Score:
        """One number per head; NaN where no previous-token head lies below.

        Raises:
            ValueError: the model has no previous-token head above the threshold, or does not offer its weights.
        """
        weights = Weights(model)
        chosen = self._writers(model, batch)
        tokens = weights.tokens - weights.tokens.mean(0)
        between = tokens.T @ tokens
        written = {place: weights.ov(*place) for place in chosen}
        values = {}
        for layer in weights.layers:
            row = []
            for head in range(weights.heads(layer)):
                qk = weights.qk(layer, head)
                matches, sizes = [], []
                for (below, _), ov in written.items():
                    if below < layer:
                        match = qk @ ov.T
                        eigenvalues = (between @ match).eigenvalues()
                        matches.append(eigenvalues.real.sum() / eigenvalues.abs().sum().clamp_min(1e-30))
                        sizes.append(match.norm() / (qk.norm() * ov.norm() + 1e-30))
                row.append(_weighted(matches, sizes))
            values[layer] = torch.stack(row)
        return Score.of_heads(self, model, batch, values)

    def _writers(self, model: "PreTrainedModel", batch: "Batch") -> list[tuple[int, int]]:
        """Layer and head of the strongest previous-token heads."""
        strength: dict[tuple[int, int], float] = {}
        for layer, value in per_row(model, batch, "pattern", _to_previous).items():
            strength |= {(layer, head): share for head, share in enumerate(value.mean(0).tolist())}
        best = sorted(strength, key=lambda place: -strength[place])[: self.writers]
        found = [place for place in best if strength[place] >= self.threshold]
        if not found:
            raise ValueError(
                f"No head gives {self.threshold} of its attention to the previous token (the best gives "
                f"{max(strength.values()):.2f}), so no key can be made from it; lower the threshold to look anyway."
            )
        return found


def _to_previous(pattern: Tensor) -> Tensor:
    return pattern.diagonal(-1, -2, -1).mean(-1)


def _weighted(matches: list[Tensor], sizes: list[float]) -> Tensor:
    if not matches:
        return torch.tensor(float("nan"), dtype=torch.float64)
    size = torch.tensor(sizes, dtype=torch.float64)
    return (torch.stack(matches) * size).sum() / size.sum().clamp_min(1e-30)
