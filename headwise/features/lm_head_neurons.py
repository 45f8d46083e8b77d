"""Decoding specialised feature neurons in LLMs with the final projection layer. Davies, 2025. arXiv:2501.02688

Row s110 of the mission.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwise.probe import Layer
from headwise.reader import FeatureMethod, Reader
from headwise.task import Batch
from headwise.weights import Weights

SIDES = ("down", "up", "gate")
AT_ONCE = 512


@dataclass(frozen=True)
class LmHeadNeurons(FeatureMethod):
    """For each neuron of an MLP, the tokens that the unembedding reads from its weights, and how far they stand out.

    Tables by layer: "L3/tokens" and "L3/values" [F, top], the tokens and their logits a unit of the neuron; "L3/z" [F],
    the first of them in standard deviations over the vocabulary. The gain of the last norm is folded in. A neuron is
    clamped by `Patch("L3.N7", torch.tensor(10.0))`.

    Fields:
        side: "down", what a neuron writes; "up" or "gate", what it is made of.
        top: tokens that are kept.
        layers: which; all by default.
    """

    row: ClassVar[str] = "s110"
    needs: ClassVar[str] = ""
    side: str = "down"
    top: int = 5
    layers: tuple[int, ...] = ()

    def fit(self, model: PreTrainedModel, batches: Sequence[Batch]) -> Reader:
        """A reader without maps; prompts are not used.

        Raises:
            ValueError: an unknown side, or a model whose neurons or unembedding cannot be read.
        """
        if self.side not in SIDES:
            raise ValueError(f"A neuron has the sides {', '.join(SIDES)}, not {self.side!r}.")
        weights = Weights(model)
        readout = weights.readout
        tables: dict[str, Tensor] = {}
        for number in self.layers or weights.layers:
            if weights.post_norm(number) is not None:
                raise ValueError(
                    f"Layer {number} of this {weights.body.model_type} has a norm behind its MLP, so a neuron's own "
                    "share of the logits cannot be told from its weights."
                )
            vectors = _vectors(weights.body.layer(number), self.side, readout.shape[1])
            tables |= {f"L{number}/{name}": table for name, table in _decoded(vectors, readout, self.top).items()}
        return Reader.of(self, model, [], {}, tables=tables)


def _vectors(layer: Layer, side: str, width: int) -> Tensor:
    """[F, D] the weights of each neuron on the side of the residual stream."""
    if layer.down is None or layer.mlp is None:
        raise ValueError(
            f"The MLP of layer {layer.number} has no single down projection, so it has no neurons to read."
        )
    if side == "down":
        return _matrix(layer.down)
    found: dict[str, Tensor] = {}
    for name, module in layer.mlp.named_modules():
        matrix = _matrix(module) if module is not layer.down and hasattr(module, "weight") else None
        if matrix is not None and matrix.ndim == 2 and matrix.shape == (width, layer.neurons):
            found["gate" if "gate" in name else "up"] = matrix.T
    if side not in found:
        raise ValueError(
            f"The MLP of layer {layer.number} has no {side} projection of its own; it has "
            f"{', '.join(['down', *found])}."
        )
    return found[side]


def _matrix(module: nn.Module) -> Tensor:
    """[in, out] of a Linear or a Conv1D."""
    weight = module.get_parameter("weight").detach().float()
    return weight if type(module).__name__ == "Conv1D" else weight.T


def _decoded(vectors: Tensor, readout: Tensor, top: int) -> dict[str, Tensor]:
    parts = []
    for part in vectors.split(AT_ONCE):
        logits = part @ readout.T
        values, tokens = logits.topk(min(top, logits.shape[-1]), dim=-1)
        spread = logits.std(-1).clamp_min(1e-30)
        parts.append((tokens.int().cpu(), values.cpu(), ((values[:, 0] - logits.mean(-1)) / spread).cpu()))
    tokens, values, z = (torch.cat(one) for one in zip(*parts, strict=True))
    return {"tokens": tokens, "values": values, "z": z}


def strongest(reader: Reader, token: int, n: int = 1) -> list[str]:
    """The neurons whose first token is this one, those it stands out in most first: ["L3.N7", ...], at most n."""
    found: list[tuple[float, str]] = []
    for name, tokens in reader.tables.items():
        if name.endswith("/tokens"):
            layer = name.removesuffix("/tokens")
            z = reader.tables[f"{layer}/z"]
            found += [(float(z[i]), f"{layer}.N{i}") for i in (tokens[:, 0] == token).nonzero()[:, 0].tolist()]
    return [unit for _, unit in sorted(found, reverse=True)[:n]]
