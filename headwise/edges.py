"""Where the edges of a model begin and end, and the modules at which what is read along one edge can be changed.

The residual stream is a sum: what entered the first block, plus what every head and every MLP wrote. So the input of
each reader is a sum over its edges. A norm stands between: an input is changed in front of it, and the model's own
module computes the norm.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwise.anatomy import anatomy
from headwise.direct import predicts
from headwise.graph import Edge, read_at, written_at
from headwise.probe import overheard
from headwise.site import head
from headwise.weights import Weights


@dataclass(frozen=True)
class Part:
    """One block, as edges see it.

    Attributes:
        before: the norm whose output queries, keys and values are made of.
        out: the output projection, whose input is what its heads write.
        mlp: the module whose output is added to the residual stream; `mid`: the norm before it, whose input it reads.
        parallel: whether the MLP reads the same residual stream as the heads beside it.
        readers: places of this block's inputs in `Edges.targets`, by "q", "k", "v" and "mlp".
        heads, mlp_at: places of its heads and its MLP in `Edges.sources`.
    """

    number: int
    before: nn.Module
    out: nn.Module
    mlp: nn.Module | None
    mid: nn.Module | None
    parallel: bool
    readers: dict[str, range]
    heads: range
    mlp_at: int | None


class Edges:
    """All edges of a model.

    Attributes:
        sources: "embed", then every head and MLP in the order in which they write.
        targets: the inputs of every block, "L5.H1.q", "L5.G0.k", "L5.G0.v" and "L5.mlp" in that order; then "logits".
        exists: [targets, sources] true where the target reads the source.
        parts: the blocks. final: the norm before the unembedding.
        heads: by layer, the number of query heads and of KV heads.

    Raises:
        ValueError: the model's residual stream is not the plain sum of what its heads and MLPs write.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        predicts(model, "A circuit")
        self.body = anatomy(model)
        self.weights = Weights(model)
        self.heads = {n: (self.body.heads(n), self.body.kv_heads(n)) for n in self.weights.layers}
        self.sources, self.targets = ["embed"], []
        seen = _Seen(model, self.weights)
        self.parts = [self._part(seen, number) for number in self.weights.layers]
        self.targets.append("logits")
        self.final = seen.final
        written = torch.tensor([written_at(source) for source in self.sources])
        self.exists = written < torch.tensor([read_at(target) for target in self.targets])[:, None]
        for part in self.parts:
            if part.parallel:
                self.exists[part.readers["mlp"].start, part.heads.start : part.heads.stop] = False
        self.source_at = {source: i for i, source in enumerate(self.sources)}
        self.target_at = {target: i for i, target in enumerate(self.targets)}

    def _part(self, seen: "_Seen", number: int) -> Part:
        layer, weights = self.body.layer(number), self.weights
        before, kind = weights.pre_norm(number), self.body.model_type
        if before is None or weights.post_norm(number) is not None or layer.out is None:
            raise ValueError(
                f"Layer {number} of this {kind} has no norm before its attention, or one behind it; edges are known "
                "for blocks that read through a norm and write straight to the residual stream."
            )
        heads, kv_heads = self.heads[number]
        readers: dict[str, range] = {}
        for side, letter, count in (("q", "H", heads), ("k", "G", kv_heads), ("v", "G", kv_heads)):
            weights.door(side, number)
            readers[side] = self._more(self.targets, [f"L{number}.{letter}{i}.{side}" for i in range(count)])
        written = self._more(self.sources, [head(number, i) for i in range(heads)])
        if layer.mlp is None:
            return Part(number, before.module, layer.out, None, None, False, readers, written, None)
        mid, parallel = seen.norm_of_mlp(number, before.module)
        readers["mlp"] = self._more(self.targets, [f"L{number}.mlp"])
        mlp_at = self._more(self.sources, [f"L{number}.mlp"]).start
        return Part(number, before.module, layer.out, layer.mlp, mid, parallel, readers, written, mlp_at)

    @staticmethod
    def _more(names: list[str], new: list[str]) -> range:
        names.extend(new)
        return range(len(names) - len(new), len(names))

    def all(self) -> list[Edge]:
        """Every edge, by target and then by source."""
        return [(self.sources[u], self.targets[c]) for c, u in self.exists.nonzero().tolist()]

    def place(self, edge: Edge) -> tuple[int, int]:
        """Places of an edge's target and source.

        Raises:
            ValueError: this model has no such edge.
        """
        source, target = edge
        c, u = self.target_at.get(target, -1), self.source_at.get(source, -1)
        if c < 0 or u < 0 or not self.exists[c, u]:
            raise ValueError(
                f"This {self.body.model_type} has no edge from {source} to {target}; its edges go from "
                f"{self.sources[0]} to {self.sources[-1]}, and from {self.targets[0]} to {self.targets[-1]}."
            )
        return c, u

    def maker(self, side: str, layer: int, unit: int) -> Tensor:
        """[D, d] what makes the query of a head, or the key or value of a KV head, from the normed residual stream."""
        if side == "q":
            return self.weights.q(layer, unit)
        heads, kv_heads = self.heads[layer]
        return (self.weights.k if side == "k" else self.weights.v)(layer, unit * (heads // kv_heads))


class _Seen:
    """One watched pass: which norm feeds which MLP, and whether the residual stream is the sum that edges assume."""

    def __init__(self, model: PreTrainedModel, weights: Weights) -> None:
        self.body, self.given, self.wrote = weights.body, {}, {}
        self.norms = [m for m in model.modules() if "Norm" in type(m).__name__]
        layers = [self.body.layer(n) for n in weights.layers]
        self.blocks = self.body.blocks[""]
        watched = [*self.norms, *(m for one in layers for m in (one.out, one.mlp)), *self.blocks.values()]
        overheard(model, (m for m in dict.fromkeys(watched) if m is not None), self._note, with_kwargs=True)
        if weights.final is None:
            raise ValueError(f"This {self.body.model_type} has no norm before its unembedding; a circuit needs one.")
        self.final = weights.final.module
        writers = [m for one in layers for m in (one.out, one.mlp) if m is not None]
        self._check_sum(writers)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        given = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
        while isinstance(output, (tuple, list)):
            output = output[0]
        self.given[module], self.wrote[module] = given, output

    def _check_sum(self, writers: list[nn.Module]) -> None:
        start = self.given[self.blocks[min(self.blocks)]]
        end = self.given.get(self.final)
        total = start.float()
        for module in writers:
            total = total + self.wrote[module].reshape(start.shape).float()
        apart = float("inf") if end is None else float((total - end.float()).abs().max() / end.float().abs().max())
        limit = 1e-3 if start.dtype in (torch.float32, torch.float64) else 5e-2
        if not apart <= limit:
            raise ValueError(
                f"The residual stream of this {self.body.model_type} is not the sum of its embedding, heads and MLPs "
                f"(relative difference {apart:.1e}), so its edges cannot be told apart."
            )

    def norm_of_mlp(self, number: int, before: nn.Module) -> tuple[nn.Module, bool]:
        """The norm before a layer's MLP, and whether it reads what the block was given.

        Raises:
            ValueError: there is none of its own.
        """
        layer = self.body.layer(number)
        entry = self.given[layer.mlp]
        found = layer.mid if not layer.post_norm and layer.mid in self.norms else None
        if found is None:
            found = next((m for m in self.norms if _same(self.wrote.get(m), entry)), None)
        if found is None or found is before:
            raise ValueError(
                f"The MLP of layer {number} of this {self.body.model_type} has no norm of its own, so what it reads "
                "cannot be changed apart from what the heads beside it read."
            )
        given, start = self.given[found], self.given[self.blocks[number]]
        return found, given.shape == start.shape and bool(torch.equal(given, start))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and (a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape))


def before_input(hooks: ExitStack, module: nn.Module, see: Callable[[Tensor], Any], rows: int) -> None:
    """Show what enters a module as [rows, T, D]; what `see` gives, if anything, takes its place."""

    def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        name = next(iter(kwargs), "")
        value = args[0] if args else kwargs[name]
        new = see(value.view(rows, -1, value.shape[-1]) if value.ndim == 2 else value)
        if new is None:
            return None
        new = new.view(value.shape)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, name: new})

    hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def after_output(hooks: ExitStack, module: nn.Module, see: Callable[[Tensor], Any], rows: int) -> None:
    """Show what a module gives as [rows, T, D]; what `see` gives, if anything, takes its place."""

    def hook(_: nn.Module, args: tuple, output: Any) -> Any:
        value = output[0] if isinstance(output, (tuple, list)) else output
        new = see(value.view(rows, -1, value.shape[-1]) if value.ndim == 2 else value)
        if new is None:
            return None
        return (new.view(value.shape), *output[1:]) if isinstance(output, (tuple, list)) else new.view(value.shape)

    hooks.callback(module.register_forward_hook(hook).remove)
