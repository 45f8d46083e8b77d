"""Faster matrix products while nothing is differentiated.

PyTorch hands float32 products on a CPU to BLAS. Where that is MKL and the processor is not Intel's, AVX-512 lies idle;
oneDNN, which comes with PyTorch too, uses it: on an AMD Zen 5 core twice the rate, with rounding of the same size.

bfloat16 is twice as fast again, and too coarse for small effects. But a layer is linear: W x = W b + W (x - b), with b
what entered it in the unchanged run. W b is remembered exactly, and only the difference is rounded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

DTYPES = ("float32", "bfloat16")


@dataclass
class Products:
    """The linear layers of a model while `fast_matmul` has them: exact, unless a run is remembered.

    Attributes:
        dtype: "bfloat16" lets later runs round their difference from a remembered one.
        runs: by layer, what entered and left it in the remembered run, with the tensors' version counters.
    """

    dtype: str
    runs: "dict[nn.Module, tuple[Tensor, Tensor, int, int]]" = field(default_factory=dict)
    _remembering: bool = False
    _last: "tuple[Tensor, Tensor, int, Tensor] | None" = None

    @contextmanager
    def remember(self) -> Iterator[None]:
        """Remember the run inside this block, in place of an earlier one."""
        self.forget()
        self._remembering = self.dtype == "bfloat16"
        try:
            yield
        finally:
            self._remembering = False

    def forget(self) -> None:
        """Be exact from now on."""
        self.runs.clear()
        self._last = None

    def forward(self, module: nn.Module, exact: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """What stands in for the forward method of a layer."""
        if self.dtype == "float32":
            return exact
        weight = module.weight.detach()
        rounded = (weight if type(module) is nn.Linear else weight.t()).bfloat16().contiguous()

        def run(x: Tensor) -> Tensor:
            base, out, *versions = self.runs.get(module, (None, None))
            if self._remembering or base is None or out is None:
                result = exact(x)
                if self._remembering:
                    self.runs[module] = (x, result, _version(x), _version(result))
                return result
            # A value that was changed in place afterwards is no longer what was remembered.
            if [_version(base), _version(out)] != versions or x.shape[1:] != base.shape[1:] or len(x) % len(base):
                return exact(x)
            return (F.linear(self._minus(x, base), rounded) + out).flatten(0, 1)

        return run

    def _minus(self, x: Tensor, base: Tensor) -> Tensor:
        # Queries, keys and values are made of one input: its difference is made once.
        last = self._last
        if last is None or last[0] is not x or last[1] is not base or last[2] != _version(x):
            last = self._last = (x, base, _version(x), (x.unflatten(0, (-1, len(base))) - base).bfloat16())
        return last[3]


@contextmanager
def fast_matmul(model: PreTrainedModel, dtype: str = "float32") -> Iterator[Products]:
    """Inside the block the model's linear layers use the fastest kernel of that precision; only without gradients.

    Args:
        dtype: "float32" computes what the model computes; so does "bfloat16" until a run is remembered.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"{dtype!r} is not a precision for matrix products: {' or '.join(DTYPES)}.")
    products = Products(dtype)
    changed: list[nn.Module] = []
    try:
        for module in model.modules():
            if plain(module) and (dtype == "bfloat16" or (type(module) is nn.Linear and offered(module.weight))):
                module.forward = products.forward(module, _exact(module))
                changed.append(module)
        yield products
    finally:
        products.forget()
        for module in changed:
            del module.forward


def offered(weight: Tensor) -> bool:
    """Whether oneDNN computes this float32 product, and no slower than BLAS: a CPU with AVX-512."""
    return (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _version(value: Tensor) -> int:
    """How often a tensor was changed in place, where that is counted."""
    return 0 if value.is_inference() else value._version


def plain(module: nn.Module) -> bool:
    """A linear layer as the library ships it, in float32: not quantised, wrapped or already taken over."""
    if type(module) not in (nn.Linear, Conv1D) or "forward" in vars(module):
        return False
    return module.weight.dtype == torch.float32 and module.weight.layout == torch.strided


def _exact(module: nn.Module) -> Callable[[Tensor], Tensor]:
    if type(module) is not nn.Linear or not offered(module.weight):
        return module.forward
    weight, bias, product = module.weight.detach(), module.bias, torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, weight, bias, "none", [], "")
