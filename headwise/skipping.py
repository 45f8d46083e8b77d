"""Blocks that are left out of a run: the residual stream passes them by, and the model is as it was afterwards.

Nothing is computed by anybody else's code. A block's `forward` is replaced for a time; whoever calls the model, caches
and generation included, need not know.

How a left-out block and the KV cache agree. A block that every token passes by keeps nothing: its cache layer stays
empty. A block that only some tokens pass by keeps the keys and values of all of them, for later tokens look at them:
those of a token that has left are made from the state with which it left.
"""

import time
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from headwise.anatomy import anatomy
from headwise.drafting import Stats
from headwise.probe import Layer, overheard
from headwise.verifying import Decoded, DecodeMethod

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

# Of a block's number, what went in and what came out [B, T, D]: true where a token leaves [B, T].
Decide = Callable[[int, Tensor, Tensor], Tensor]


@dataclass
class Depths:
    """How many blocks each token ran through: `told` has one [B, T] for each forward pass of a stack of `blocks`."""

    blocks: int
    told: list[Tensor] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean blocks a token; NaN before the first pass."""
        return float(torch.cat([one.flatten() for one in self.told]).float().mean()) if self.told else float("nan")

    @property
    def saved(self) -> float:
        """Share of blocks that were passed by, 0 to 1."""
        return 1 - self.mean / self.blocks


@dataclass(frozen=True)
class DepthMethod(DecodeMethod):
    """Base of decode methods by which tokens pass fewer blocks."""

    def generate(
        self, model: PreTrainedModel, ids: Tensor, streamer: "BaseStreamer | None" = None, **options: Any
    ) -> Decoded:
        """Generate from ids [B, T], padded on the left; `options` are those of `model.generate`."""
        stats, began = Stats(rows=len(ids)), time.perf_counter()
        with self.use(model) as depths:
            out = model.generate(ids, streamer=streamer, **options)
        said = out.shape[1] if model.config.is_encoder_decoder else out.shape[1] - ids.shape[1]
        stats.passes, stats.tokens = len(depths.told), len(ids) * said
        stats.seconds = time.perf_counter() - began
        return Decoded(out, stats)

    def use(self, model: PreTrainedModel) -> AbstractContextManager[Depths]:
        """Inside the block the model runs so, and tells how deep each token went."""
        raise TypeError(f"{type(self).__name__} does not say which blocks are left out.")


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block this module computes so. Hooks stay, blocks may stand inside each other."""
    own = vars(module)
    before = own.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


_plain: "weakref.WeakKeyDictionary[PreTrainedModel, str]" = weakref.WeakKeyDictionary()


def stack_blocks(model: PreTrainedModel, stack: str = "") -> dict[int, nn.Module]:
    """The blocks of a stack ("enc" for the encoder of an encoder-decoder) by number.

    Raises:
        ValueError: there is no such stack, or a block hands on more than the residual stream, as those of T5 do.
    """
    body = anatomy(model)
    if stack not in body.blocks:
        have = ", ".join(repr(name) for name in body.blocks if name != "cross")
        raise ValueError(f"This {body.model_type} has no stack {stack!r} of blocks; it has {have}.")
    if model not in _plain:
        found: list[str] = []

        def look(module: nn.Module, _: tuple, output: object) -> None:
            if not isinstance(output, Tensor):
                found.append(type(module).__name__)

        overheard(model, (block for stack in body.blocks.values() for block in stack.values()), look)
        _plain[model] = found[0] if found else ""
    if _plain[model]:
        raise ValueError(f"{_plain[model]} hands on more than the residual stream, so it cannot be passed by.")
    return dict(sorted(body.blocks[stack].items()))


def decodes(model: PreTrainedModel, stack: str = "") -> bool:
    """Whether this stack writes text, and so keeps keys and values."""
    return stack == "" and model.can_generate()


def must_run(model: PreTrainedModel, stack: str = "") -> list[int]:
    """The blocks whose cache says how long the text is: the first of each kind of attention."""
    numbers = list(stack_blocks(model, stack))
    if not decodes(model, stack):
        return []
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or [""] * len(numbers)
    return sorted({kinds.index(kind) for kind in kinds} | {anatomy(model).layers[0]})


@contextmanager
def skipping(model: PreTrainedModel, layers: Collection[int], stack: str = "") -> Iterator[Depths]:
    """Inside the block these blocks are passed by, with gradients through what stays.

    A KV cache that was filled here lacks their keys and values and is good here only. One that the whole model filled
    may be continued here, as drafting does, when what was added is taken back afterwards.

    Args:
        layers: numbers of blocks.
        stack: "" for the decoder (or the only stack), "enc" for an encoder before a decoder.

    Raises:
        ValueError: a block that does not exist, one that must run for the cache to know its length, or all blocks.
    """
    blocks = stack_blocks(model, stack)
    if strange := sorted(set(layers) - set(blocks)):
        near = min(blocks, key=lambda number: abs(number - strange[0]))
        raise ValueError(f"There is no block {strange[0]}; there are {len(blocks)}, the nearest is {near}.")
    if needed := sorted(set(layers) & set(must_run(model, stack))):
        raise ValueError(
            f"Block {needed[0]} cannot be passed by: its cache tells the model how long the text is. "
            f"Always run: {', '.join(map(str, must_run(model, stack)))}."
        )
    if not set(blocks) - set(layers):
        raise ValueError(f"All {len(blocks)} blocks were to be passed by; at least 1 must run.")
    depths = Depths(len(blocks))

    def tell(_: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = _hidden(args, kwargs)
        depths.told.append(torch.full(hidden.shape[:2], len(blocks) - len(set(layers)), device=hidden.device))

    first = min(set(blocks) - set(layers))
    hook = blocks[first].register_forward_pre_hook(tell, with_kwargs=True)
    try:
        with ExitStack() as entered:
            for number in set(layers):
                entered.enter_context(replaced(blocks[number], lambda *args, **kwargs: _hidden(args, kwargs)))
            yield depths
    finally:
        hook.remove()


@dataclass
class _Pass:
    """One forward pass: which tokens have left [B, T], and how deep each went [B, T]."""

    left: Tensor
    depth: Tensor


class _Leaving:
    """Blocks of a stack that tokens leave when `decide` says so."""

    def __init__(self, layers: "dict[int, Layer | None]", decide: Decide, depths: Depths) -> None:
        self.layers, self.decide, self.depths = layers, decide, depths
        self.first, self.last = min(layers), max(layers)
        self.now: _Pass | None = None

    def run(self, number: int, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        hidden = _hidden(args, kwargs)
        if number == self.first:
            shape, device = hidden.shape[:2], hidden.device
            self.now = _Pass(torch.zeros(shape, dtype=torch.bool, device=device), torch.zeros(shape, device=device))
        now = self.now
        if now is None:
            raise RuntimeError("The model did not run its blocks in order, so nothing is known of who has left.")
        if bool(now.left.all()):
            # Types hand the cache over by different names, or by place.
            if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
                self._keys_and_values(number, original, args, kwargs)
            new = hidden
        else:
            new = torch.where(now.left[..., None], hidden, original(*args, **kwargs))
            now.depth += ~now.left
            now.left = now.left | self.decide(number, hidden, new)
        if number == self.last:
            self.depths.told.append(now.depth)
            self.now = None
        return new

    def _keys_and_values(self, number: int, original: Callable[..., Tensor], args: tuple, kwargs: dict) -> None:
        """Let the cache have its keys and values, and leave the dear rest out."""
        layer, width = self.layers[number], _hidden(args, kwargs).shape[-1]

        def nothing(x: Tensor, *_: Any, **__: Any) -> Tensor:
            return x.new_zeros(*x.shape[:-1], width)

        with ExitStack() as quiet:
            if layer is not None and layer.out is not None:
                quiet.enter_context(replaced(layer.out, nothing))
            if layer is not None and layer.mlp is not None and layer.down is not None:
                quiet.enter_context(replaced(layer.mlp, nothing))
            original(*args, **kwargs)


@contextmanager
def exiting(model: PreTrainedModel, decide: Decide, stack: str = "") -> Iterator[Depths]:
    """Inside the block a token leaves the stack where `decide` says so: its state passes the later blocks by.

    Tokens of one forward pass leave each by itself, and a text gives the same read at once or token by token. A block
    is left out when all tokens of the pass have left; before that it runs for all of them.

    Args:
        decide: is told a block's number, what went in and what came out [B, T, D]; true where a token leaves [B, T].
        stack: as in `skipping`.

    Raises:
        ValueError: there is no such stack, or its blocks cannot be passed by.
    """
    blocks, places = stack_blocks(model, stack), anatomy(model).by_place
    depths = Depths(len(blocks))
    leaving = _Leaving({number: places.get((stack, number)) for number in blocks}, decide, depths)
    with ExitStack() as entered:
        for number, block in blocks.items():
            entered.enter_context(replaced(block, partial(leaving.run, number, block.forward)))
        yield depths


def _hidden(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
