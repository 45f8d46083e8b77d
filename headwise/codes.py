"""Keys and values in few bits, each token by itself, so that tokens can be appended, dropped and taken back.

Scales, rounding and its undoing are torchao's (pip install headwise[quantised]); here two codes are packed into a byte.
"""

import math
from types import ModuleType

import torch
from torch import Tensor

from headwise.buffer import Codec

GROUPS = {8: 64, 4: 32}


def primitives() -> ModuleType:
    """The functions of torchao. Raises ImportError with a sentence where it is not installed."""
    try:
        from torchao.quantization import quant_primitives  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("A quantised cache needs torchao: pip install headwise[quantised]") from error
    return quant_primitives


class Codes(Codec):
    """8 bits for a value, symmetric, with a scale for up to 64 channels; or 4 bits with scale and zero for up to 32."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.tools = primitives()

    def __deepcopy__(self, _: dict) -> "Codes":
        return self

    def _blocks(self, size: int) -> tuple[int, ...]:
        return (1, 1, 1, math.gcd(size, GROUPS[self.bits]))

    def _range(self) -> dict[str, int]:
        return {"quant_min": -127, "quant_max": 127} if self.bits == 8 else {"quant_min": 0, "quant_max": 15}

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Values [B, H, Q, d] -> codes and scales, and zeros where there are 4 bits."""
        blocks, dtype = self._blocks(x.shape[3]), torch.int8 if self.bits == 8 else torch.uint8
        kind = self.tools.MappingType.SYMMETRIC if self.bits == 8 else self.tools.MappingType.ASYMMETRIC
        scale, zero = self.tools.choose_qparams_affine(
            x, kind, blocks, dtype, **self._range(), scale_dtype=x.dtype, zero_point_dtype=torch.int8
        )
        codes = self.tools.quantize_affine(x, blocks, scale, zero, dtype, **self._range())
        shape = (*x.shape[:3], -1)
        if self.bits == 8:
            return codes, scale.view(shape)
        low, high = codes.chunk(2, 3)
        return low | high << 4, scale.view(shape), zero.view(shape)

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        """[B, H, Q, d] in the type that the scales have."""
        codes, scale = parts[:2]
        if self.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], 3)
        zero = parts[2] if self.bits == 4 else torch.zeros_like(scale, dtype=torch.int8)
        blocks = self._blocks(codes.shape[3])
        return self.tools.dequantize_affine(
            codes, blocks, scale, zero, codes.dtype, **self._range(), output_dtype=scale.dtype
        )
