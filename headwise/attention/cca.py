"""Core Context Aware Transformers for Long Context Language Modeling. Chen et al., 2024. arXiv:2412.12465

Row s083 of the mission. For models trained or tuned so. The paper pools what comes into the key projection; here keys
are pooled after it, and after their rotation, so that one rule fits every model.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headwise.mixing import AttentionMethod, Note, per_head, quiet


@dataclass(frozen=True)
class CCA(AttentionMethod):
    """Far tokens are seen as one core token a group, near ones as they are, all in one softmax.

    A core token is the mean of the keys, and of the values, of its group, weighted by the attention that the last token
    of the group pays to them. Query heads that share a KV head share core tokens, by the mean of their last queries.

    Notes: "kept", how many keys the last query sees, as a share of all.

    Fields:
        group: tokens of a group; 1 is plain attention.
        window: latest tokens that every query sees as they are; more, up to the edge of a group.
        block: queries that are computed together; another size gives the same z.
    """

    row: ClassVar[str] = "s083"
    resumes: ClassVar[bool] = False
    group: int = 16
    window: int = 64
    block: int = 128

    def __post_init__(self) -> None:
        if self.group < 1 or self.window < 1 or self.block < 1:
            raise ValueError(f"group {self.group}, window {self.window} and block {self.block} must be at least 1.")

    def mix(self, q: Tensor, k: Tensor, v: Tensor, scale: float, note: Note = quiet) -> Tensor:
        """Give z [B, H, T, dv]; each block of queries meets core tokens, then the tokens from its first window on."""
        length = q.shape[2]
        weights = self._pooling(q, k, scale)
        core_k, core_v = (self._pooled(weights, x) for x in (k, v))
        parts, places = [], torch.arange(length, device=q.device)
        for start in range(0, length, self.block):
            stop = min(start + self.block, length)
            at = places[start:stop, None]
            near, far = int(self._edge(places[start])), int(self._edge(places[stop - 1])) // self.group
            columns = places[near:stop]
            mask = torch.cat(
                [
                    places[:far] < self._edge(at) // self.group,
                    (columns >= self._edge(at)) & (columns <= at),
                ],
                1,
            )
            keys, values = (
                torch.cat([core[:, :, :far], own[:, :, near:stop]], 2) for core, own in ((core_k, k), (core_v, v))
            )
            parts.append(
                scaled_dot_product_attention(q[:, :, start:stop], keys, values, mask, scale=scale, enable_gqa=True)
            )
        edge = int(self._edge(places[-1]))
        note("kept", torch.full(q.shape[:2], (edge // self.group + length - edge) / length))
        return torch.cat(parts, 2)

    def pattern(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """What a core token is given, shared out to the tokens that it was pooled from."""
        length, heads = q.shape[2], q.shape[1]
        weights = self._pooling(q, k, scale)
        shares = torch.zeros(*weights.shape[:3], length, device=q.device)
        for number in range(weights.shape[2]):
            shares[:, :, number, number * self.group : (number + 1) * self.group] = weights[:, :, number]
        cores = shares.to(k.dtype) @ k[:, :, :length]
        places = torch.arange(length, device=q.device)
        edge = self._edge(places[:, None])
        seen = torch.cat(
            [places[: cores.shape[2]] < edge // self.group, (places >= edge) & (places <= places[:, None])], 1
        )
        scores = (q @ per_head(torch.cat([cores, k], 2), heads).transpose(2, 3)).float() * scale
        outer = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        far, near = outer.split([cores.shape[2], length], -1)
        return far @ per_head(shares, heads) + near

    def _edge(self, at: Tensor) -> Tensor:
        """The first token that a query sees as it is: at least a window back, where a group begins."""
        return (at - self.window + 1).clamp(min=0) // self.group * self.group

    def _pooling(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """[B, Hkv, groups, group] weights of the tokens of every whole group."""
        kv, count = k.shape[1], k.shape[2] // self.group
        ends = q[:, :, self.group - 1 :: self.group][:, :, :count]
        ends = ends.unflatten(1, (kv, -1)).mean(2)
        members = k[:, :, : count * self.group].unflatten(2, (count, self.group))
        return (torch.einsum("bhnd,bhngd->bhng", ends, members).float() * scale).softmax(-1)

    def _pooled(self, weights: Tensor, x: Tensor) -> Tensor:
        """Core keys or values [B, Hkv, groups, d]."""
        members = x[:, :, : weights.shape[2] * self.group].unflatten(2, weights.shape[2:])
        return torch.einsum("bhng,bhngd->bhnd", weights.to(x.dtype), members)
