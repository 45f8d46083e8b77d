"""A few queries over many keys on a processor, with the keys in pieces, so that every thread has the same work.

C of our own reads where there is a compiler (headwise/compiled.py). PyTorch, which does elsewhere, gives whole heads to
its threads, so that three KV heads on two threads take as long as four, and one as long as two. Pieces of one head are
read by several threads; what they give is weighed by the sums of their softmax.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from headwise import compiled
from headwise.matmul import blas_lags

# Whether three queries are read faster with a fourth, empty one: so it is where BLAS lags.
FOURTH = blas_lags()
# Keys of a piece at least. PyTorch's kernel reads 512 at one time; where BLAS keeps up, short pieces do not pay.
LEAST = 512 if blas_lags() else 2048


def read(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention over all keys: q [B, H, Q, d], k [B, H, K, d] and v [B, H, K, dv] -> z [B, H, Q, dv]."""
    if compiled.serves(q, k, v):
        return compiled.read(q, k, v, scale)
    if FOURTH and q.shape[2] == 3 and q.device.type == "cpu" and k.shape[2] >= LEAST:
        return read(pad(q, (0, 0, 0, 1)), k, v, scale)[:, :, :3]
    count = pieces(q, k, v, torch.get_num_threads())
    return scaled_dot_product_attention(q, k, v, scale=scale) if count == 1 else read_in(count, q, k, v, scale)


def pieces(q: Tensor, k: Tensor, v: Tensor, threads: int) -> int:
    """In how many pieces keys are best read; 1 where all threads have as many heads, or where pieces cannot be had."""
    heads = k.shape[0] * k.shape[1]
    slopes = torch.is_grad_enabled() and any(one.requires_grad for one in (q, k, v))
    if q.device.type != "cpu" or slopes or q.shape[3] != v.shape[3]:
        return 1
    return compiled.pieces(heads, k.shape[2], threads, LEAST)


def read_in(count: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """`read` with the keys in so many pieces of one length, and one more for the few that are left."""
    batch, heads, keys, size = k.shape
    each, many = keys // count, q.reshape(batch * heads, 1, -1, size)
    z, logs = _sums(many.expand(-1, count, -1, -1), *(_cut(one, 0, count, each) for one in (k, v)), scale)
    if count * each < keys:
        rest = _sums(many, *(_cut(one, count * each, 1, keys - count * each) for one in (k, v)), scale)
        z, logs = torch.cat((z, rest[0]), 1), torch.cat((logs, rest[1]), 1)
    return (z * logs.softmax(1)[..., None].to(z.dtype)).sum(1).view(batch, heads, -1, size)


def _cut(x: Tensor, start: int, count: int, each: int) -> Tensor:
    """[B, H, K, d] -> [B * H, count, each, d], a view where x lies in a buffer."""
    return x[:, :, start : start + count * each].unflatten(2, (count, each)).flatten(0, 1)


def _sums(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """What each piece gives, and the logarithm of the sum of its softmax."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
