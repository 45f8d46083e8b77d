"""Faster matrix products while nothing is differentiated.

PyTorch hands float32 products on a CPU to BLAS. Where that is MKL and the processor is not Intel's, AVX-512 lies idle;
oneDNN, which comes with PyTorch too, uses it: on an AMD Zen 5 core twice the rate, with rounding of the same size.
bfloat16 products are rounded to 8 bits before and after, and summed in float32: twice the rate again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

DTYPES = ("float32", "bfloat16")


@contextmanager
def fast_matmul(model: PreTrainedModel, dtype: str = "float32") -> Iterator[None]:
    """Inside the block the model's linear layers use the fastest kernel of that precision; only without gradients.

    Args:
        dtype: "float32" computes what the model computes. "bfloat16" rounds what enters and leaves linear layers; the
            residual stream, norms, softmax and logits stay in float32, so that small effects are not drowned.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"{dtype!r} is not a precision for matrix products: {' or '.join(DTYPES)}.")
    head = model.get_output_embeddings()
    changed: list[nn.Module] = []
    try:
        for module in model.modules():
            if not _plain(module):
                continue
            if dtype == "bfloat16" and module is not head:
                module.forward = _in_bfloat16(module)
            elif type(module) is nn.Linear and offered(module.weight):
                module.forward = _in_onednn(module)
            else:
                continue
            changed.append(module)
        yield
    finally:
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


def _plain(module: nn.Module) -> bool:
    """A linear layer as the library ships it, in float32: not quantised, wrapped or already taken over."""
    if type(module) not in (nn.Linear, Conv1D) or "forward" in vars(module):
        return False
    return module.weight.dtype == torch.float32 and module.weight.layout == torch.strided


def _in_onednn(module: nn.Module) -> Callable[[Tensor], Tensor]:
    weight, bias, product = module.weight.detach(), module.bias, torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, weight, bias, "none", [], "")


def _in_bfloat16(module: nn.Module) -> Callable[[Tensor], Tensor]:
    weight = module.weight.detach()
    weight = (weight if type(module) is nn.Linear else weight.t()).bfloat16().contiguous()
    bias = None if module.bias is None else module.bias.detach().bfloat16()
    return lambda x: F.linear(x.bfloat16(), weight, bias).to(x.dtype)
