"""Queries, keys and values to attend with, and which of them stand under padding."""

import torch

from headwise.mixing import causal


def values(length: int, keys: int, rows: int = 2, heads: int = 4, kv: int = 2, seed: int = 0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, length, 8), (kv, keys, 8), (kv, keys, 6))
    return [(1.5 * torch.randn(rows, *size, generator=generator)).to(dtype).requires_grad_() for size in sizes]


def left_padded(pads: list[int], length: int, keys: int) -> torch.Tensor:
    return causal(length, keys) & (torch.arange(keys) >= torch.tensor(pads)[:, None, None, None])
