"""Replicas: many small networks of one shape that are trained side by side, one for each seed or setting.

Each has weights, inputs and a gradient of its own; the sum of their losses keeps them apart. One product of stacks of
matrices is about as fast as one product for a network this small. Transformers have `train` instead.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "linear": lambda value: value}


class Replicas(nn.Module):
    """Stacks of linear layers with an activation between them.

    Args:
        widths: of the input, of every hidden layer, of the output.
        act: "tanh", "relu" or "linear".
        seeds: one for each network, which alone decides its weights: LeCun normal, biases 0.

    Raises:
        ValueError: an unknown activation.
    """

    def __init__(self, widths: Sequence[int], act: str, seeds: Sequence[int]) -> None:
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f"{act!r} is no activation of replicas; allowed are {', '.join(ACTIVATIONS)}.")
        self.act, self.widths = act, tuple(widths)
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        pairs = list(zip(widths, widths[1:], strict=False))
        self.weights = nn.ParameterList(
            torch.stack([torch.randn(a, b, generator=draw) * a**-0.5 for draw in draws]) for a, b in pairs
        )
        self.biases = nn.ParameterList(torch.zeros(len(draws), 1, b) for _, b in pairs)

    def layers(self, x: Tensor) -> list[Tensor]:
        """What each layer says, [count, B, width]: hidden ones behind the activation, the last without it.

        Args:
            x: [B, inputs], the same for all, or [count, B, inputs].
        """
        value = x.expand(len(self.weights[0]), *x.shape) if x.ndim == 2 else x
        found = []
        for at, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            value = torch.baddbmm(bias, value, weight)
            if at < len(self.weights) - 1:
                value = ACTIVATIONS[self.act](value)
            found.append(value)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """[count, B, outputs]."""
        return self.layers(x)[-1]

    def slopes(self) -> list[Tensor]:
        """The gradient of each layer's weights and biases, [count, numbers] each."""
        return [
            torch.cat([w.grad.flatten(1), b.grad.flatten(1)], 1) for w, b in zip(self.weights, self.biases, strict=True)
        ]
