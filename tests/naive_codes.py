"""The naive twin of those functions of torchao that headwise calls, for machines on which it is not installed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor


@contextmanager
def where_torchao_is_missing() -> Iterator[None]:
    """Inside, these functions take the place of torchao's, unless it is installed."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("torchao") is None:
            patch.setattr("headwise.codes.primitives", lambda: sys.modules[__name__])
        yield


class MappingType(Enum):
    SYMMETRIC = 1
    ASYMMETRIC = 2


def choose_qparams_affine(x: Tensor, kind, blocks, dtype, quant_min, quant_max, *, scale_dtype, zero_point_dtype):
    groups = x.float().unflatten(-1, (-1, blocks[-1]))
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    tiny = torch.finfo(x.dtype).eps
    # By name, since torchao has an enumeration of its own.
    if kind.name == "SYMMETRIC":
        scale = (torch.maximum(-low, high) / ((quant_max - quant_min) / 2)).clamp_min(tiny)
        zero = torch.zeros_like(scale)
    else:
        scale = ((high - low) / (quant_max - quant_min)).clamp_min(tiny)
        zero = (quant_min - (low / scale).round()).clamp(quant_min, quant_max)
    return scale.to(scale_dtype), zero.to(zero_point_dtype)


def quantize_affine(x: Tensor, blocks, scale: Tensor, zero: Tensor, dtype, quant_min, quant_max) -> Tensor:
    groups = x.float().unflatten(-1, (-1, blocks[-1]))
    shape = groups.shape[:-1]
    codes = (groups / scale.view(shape)[..., None].float()).round() + zero.view(shape)[..., None]
    return codes.clamp(quant_min, quant_max).flatten(-2).to(dtype)


def dequantize_affine(codes: Tensor, blocks, scale: Tensor, zero: Tensor, dtype, quant_min, quant_max, *, output_dtype):
    groups = codes.float().unflatten(-1, (-1, blocks[-1]))
    shape = groups.shape[:-1]
    return ((groups - zero.view(shape)[..., None]) * scale.view(shape)[..., None].float()).flatten(-2).to(output_dtype)
