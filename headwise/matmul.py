"""Faster matrix products while nothing is differentiated.

PyTorch hands float32 products on a CPU to BLAS. Where that is MKL and the processor is not Intel's, AVX-512 lies idle;
oneDNN, which comes with PyTorch too, uses it: on an AMD Zen 5 core twice the rate, with rounding of the same size.
One token, and up to four, are another matter: they take as long as the weights take to be read. There MKL reads them at
full speed where weights come first and vectors second, and a third as fast the other way round, as PyTorch has it. On
Intel's processors PyTorch's own choice is the fastest for any number of rows, and everything is left to it.

bfloat16 is twice as fast again, and too coarse for small effects. But a layer is linear: W x = W b + W (x - b), with b
what entered it in the unchanged run. W b is remembered exactly, and only the difference is rounded.
"""

import platform
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

DTYPES = ("float32", "bfloat16")
# Rows up to which it pays that weights come first. A run of so few rows is then rounded otherwise than a longer one, so
# that generation has it, and runs that are held against each other have not.
FEW = 4


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
def fast_matmul(model: PreTrainedModel, dtype: str = "float32", few: int = 0) -> Iterator[Products]:
    """Inside the block the model's linear layers use the fastest kernel of that precision; only without gradients.

    Args:
        dtype: "float32" computes what the model computes; so does "bfloat16" until a run is remembered.
        few: rows up to which weights come first; `FEW` for generation.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"{dtype!r} is not a precision for matrix products: {' or '.join(DTYPES)}.")
    products = Products(dtype)
    layers = [one for one in model.modules() if plain(one)]
    if dtype == "bfloat16":
        leave = stand_in(
            {one: products.forward(one, Quick(one, few) if _helped(one) else one.forward) for one in layers}
        )
    else:
        leave = quick(model, few)
    try:
        yield products
    finally:
        products.forget()
        leave()


class Quick:
    """Stands in for the forward method of a float32 linear layer: the same product, by the fastest kernel for its rows.

    Where there is something to differentiate, or the layer was moved or converted meanwhile, it is the layer's own; and
    while a model is compiled, as compilers have kernels of their own.
    """

    def __init__(self, layer: nn.Linear, few: int = FEW) -> None:
        most = max(2, torch.get_num_threads())
        self.layer, self.few = layer, few
        self.pieces = max(n for n in range(1, most + 1) if layer.out_features % n == 0)

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply [..., D] -> [..., out]."""
        weight, bias = self.layer.weight, self.layer.bias
        slopes = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        other = x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not _here(weight)
        if slopes or other or torch.compiler.is_compiling() or not x.numel():
            return F.linear(x, weight, bias)
        rows = x.numel() // x.shape[-1]
        if rows > self.few:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        # Kernels for three vectors are slower than those for four.
        wide = F.pad(x.reshape(1, rows, -1), (0, 0, 0, int(rows == 3))).expand(self.pieces, -1, -1)
        out = torch.bmm(weight.view(self.pieces, -1, weight.shape[1]), wide.transpose(1, 2))
        if rows > 1:
            out = out.flatten(0, 1)[:, :rows].t().contiguous()
        out = out.view(*x.shape[:-1], -1)
        return out if bias is None else out + bias


def quick(model: PreTrainedModel, few: int = FEW) -> Callable[[], None]:
    """From now on the model's float32 linear layers multiply by `Quick`, where BLAS lags; calling the result ends it.

    Layers that something else has taken over are left to it.
    """
    return stand_in({one: Quick(one, few) for one in model.modules() if _helped(one) and "forward" not in vars(one)})


# Forward methods that no longer stand in for anything, so that nobody gives them back.
_over: "weakref.WeakSet[Callable]" = weakref.WeakSet()


def stand_in(forwards: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Callable[[], None]:
    """Give layers another forward method; calling the result gives back what they had, in whatever order that is."""
    before = {layer: vars(layer).get("forward") for layer in forwards}
    for layer, forward in forwards.items():
        layer.forward = forward

    def leave() -> None:
        for layer, forward in forwards.items():
            _over.add(forward)
            if vars(layer).get("forward") is forward:
                del layer.forward
                earlier = before[layer]
                if earlier is not None and earlier not in _over:
                    layer.forward = earlier

    return leave


@cache
def blas_lags() -> bool:
    """Whether BLAS falls behind this processor: MKL does, where the processor is not Intel's."""
    info = Path("/proc/cpuinfo")
    maker = info.read_text() if info.exists() else platform.processor()
    return torch.backends.mkl.is_available() and "GenuineIntel" not in maker


def offered(weight: Tensor) -> bool:
    """Whether oneDNN computes this float32 product with AVX-512."""
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
    """A linear layer as the library ships it, in float32: not quantised, wrapped or taken over by others."""
    ours = isinstance(vars(module).get("forward"), Quick | None)
    return type(module) in (nn.Linear, Conv1D) and ours and _plain_weight(module.weight)


def _here(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.is_contiguous() and _plain_weight(weight)


def _plain_weight(weight: Tensor) -> bool:
    return type(weight) in (nn.Parameter, Tensor) and weight.dtype == torch.float32 and weight.layout == torch.strided


def _helped(module: nn.Module) -> bool:
    return type(module) is nn.Linear and plain(module) and offered(module.weight) and blas_lags()
