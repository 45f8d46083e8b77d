"""Weights laid out once for products of a few tokens.

Reading one token costs what reading the weights costs. Reading the ten or twenty of a draft should cost no more, yet
PyTorch's float32 products take two to three times as long, and oneDNN spends nearly half of its time on laying the
weights out anew. Laid out beforehand they are read once, whatever the number of tokens up to a dozen. That takes a
second copy of the weights, and rounding is of the same size as that of any other kernel.
"""

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from headwise.matmul import blas_lags, offered, plain, stand_in

ROWS = 16
# Rows that BLAS reads the weights for as fast as memory gives them, where it does not lag.
AS_IT_IS = 3


class Packed:
    """A context manager inside which the linear layers of a model multiply by packed weights, without gradients.

    The copy is made at once and kept, so that the block can be entered many times; a weight that was changed since is
    packed again on entry.

    Args:
        model: its plain float32 linear layers are packed; all others stay as they are.

    Attributes:
        bytes: held by the second copy of the weights.

    Raises:
        ValueError: the model is not on a CPU with AVX-512, or has no plain float32 linear layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers = [one for one in model.modules() if type(one) is nn.Linear and plain(one) and offered(one.weight)]
        if not self._layers:
            raise ValueError(
                f"{type(model).__name__} on {model.device} in {model.dtype} has no products to pack; allowed are "
                "float32 linear layers on a CPU with AVX-512."
            )
        self._packs: dict[nn.Linear, tuple[tuple[int, int], Tensor]] = {}
        self._entered = 0
        self._pack()

    @property
    def bytes(self) -> int:
        """Of the packed weights."""
        return sum(layer.weight.numel() * layer.weight.element_size() for layer in self._layers)

    def _pack(self) -> None:
        with torch.no_grad():
            for layer in self._layers:
                now = (layer.weight.data_ptr(), layer.weight._version)
                if layer not in self._packs or self._packs[layer][0] != now:
                    laid = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)
                    self._packs[layer] = (now, laid)

    def __enter__(self) -> "Packed":
        """Take the layers over. A layer that something else has taken over meanwhile is left to it."""
        self._entered += 1
        if self._entered == 1:
            self._pack()
            free = [layer for layer in self._layers if plain(layer)]
            self._leave = stand_in({layer: _product(layer, self._packs[layer][1]) for layer in free})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hand them back."""
        self._entered -= 1
        if not self._entered:
            self._leave()


def _product(layer: nn.Linear, packed: Tensor) -> Callable[[Tensor], Tensor]:
    product, alone = torch.ops.mkldnn._linear_pointwise, 0 if blas_lags() else AS_IT_IS

    def run(x: Tensor) -> Tensor:
        if x.numel() <= alone * x.shape[-1]:
            return F.linear(x, layer.weight, layer.bias)
        return product(x, packed, layer.bias, "none", [], "")

    return run
