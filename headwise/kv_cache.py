"""A key-value cache whose KV heads are each kept in their own way.

A layer takes the new keys and values of a forward pass, and lets its stores read and keep them once attention runs
(headwise/attach.py leads it there). It reports its logical length, so that masks and positions are the model's own.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from headwise.anatomy import anatomy, nearest_unit
from headwise.mask_reader import MaskReader
from headwise.method import Method
from headwise.rotary import Rotate, rotation
from headwise.store import Full, Store, Turn

# The layer whose update came last in this thread, until its attention takes it.
handed = threading.local()


@dataclass(frozen=True)
class CacheMethod(Method):
    """Base of the cache room: which keys and values exist."""

    def store(self, reserve: int = 0) -> Store:
        """What some KV heads of one layer remember; `reserve` is the final length where it is known, else 0."""
        raise TypeError(f"{type(self).__name__} does not say what it stores.")

    def build(self, model: PreTrainedModel, heads: "list[str] | None" = None, reserve: int = 0) -> "KVCache":
        """A cache for `past_key_values`: this method for the given KV heads ("L5.G0"; None is all), the rest full.

        The model's attention must be entered first (headwise/attach.py): `caching(model)` or `attach(model, ...)`.
        """
        return KVCache(model, dict.fromkeys(kv_units(model) if heads is None else heads, self), reserve)


@dataclass
class _Part:
    """The KV heads of one layer that are treated alike.

    Attributes:
        kv: their numbers, as a slice where they are evenly spaced, so that taking them copies nothing.
        heads: the numbers of their query heads.
    """

    method: CacheMethod
    kv: "slice | Tensor"
    heads: Tensor
    store: Store


class KVLayer(CacheLayerMixin):
    """One layer of a `KVCache`: stores for its KV heads, and how many tokens it has seen."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, number: int, methods: list[CacheMethod], masks: MaskReader, rotate: Callable[[], Rotate | None]):
        super().__init__()
        self.number = number
        self.methods = methods
        self.tokens = 0
        self.reserve = 0
        self.last = False
        self.record_past = False
        self.parts: list[_Part] = []
        self._masks, self._rotate = masks, rotate
        self._new: tuple[Tensor, Tensor] | None = None
        # Puts the query heads of all parts back in order, where they are not.
        self._back: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the stores, now that shapes are known. key_states [B, H, Q, d]."""
        if key_states.shape[1] != len(self.methods):
            raise ValueError(
                f"Layer {self.number} has {key_states.shape[1]} KV heads; the cache was made for {len(self.methods)}."
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def _make_parts(self, groups: int, device: torch.device) -> None:
        order: list[int] = []
        for method in dict.fromkeys(self.methods):
            numbers = [i for i, one in enumerate(self.methods) if one == method]
            heads = [i * groups + j for i in numbers for j in range(groups)]
            store = method.store(self.reserve)
            if self.record_past:
                store.record()
            kv = _evenly(numbers) or torch.tensor(numbers, device=device)
            self.parts.append(_Part(method, kv, torch.tensor(heads, device=device), store))
            order += heads
        if order != sorted(order):
            self._back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor]:
        """Take the new keys and values [B, H, Q, d] until this layer's attention runs; they come back as they are."""
        if self._new is not None:
            self._new = None
            raise RuntimeError(
                f"Layer {self.number} of this cache was written twice without being read: the model's attention does "
                "not go through it. Use headwise.attach(model, ...), or caching(model) around the calls."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._new = (key_states, value_states)
        handed.layer = weakref.ref(self)
        return key_states, value_states

    def holds(self, key: Tensor) -> bool:
        """Whether these are the keys that this layer waits to have read."""
        return self._new is not None and self._new[0] is key

    def attend(self, module: nn.Module, q: Tensor, mask: Tensor | None, scale: float | None, options: dict) -> Tensor:
        """What attention gives, z [B, Q, Hq, dv], for the tokens that came last by `update`. q [B, Hq, Q, d]."""
        if self._new is None:
            raise RuntimeError(f"Layer {self.number} of this cache has nothing new to read.")
        k, v = self._new
        self._new = None
        batch, heads, length, _ = q.shape
        if not self.parts:
            self._make_parts(heads // k.shape[1], q.device)
        pads, rest = self._masks.of(mask, self.tokens, length, batch)
        said = {name: options[name] for name in ("softcap", "s_aux") if options.get(name) is not None}
        if self.last:
            self._masks.forget()
        turn = Turn(self.tokens, pads, rest, scale, said or None, module, self._rotate)
        self.tokens += length
        if len(self.parts) == 1:
            return self.parts[0].store.attend(q, k, v, turn).transpose(1, 2).contiguous()
        groups = heads // k.shape[1]
        found = []
        for part in self.parts:
            mine = (_of_groups(q, part.kv, groups), k[:, part.kv], v[:, part.kv])
            found.append(part.store.attend(*mine, turn.of_heads(part.heads)).transpose(1, 2))
        z = torch.cat(found, 2)
        return z if self._back is None else z[:, :, self._back]

    def take(self, keys: Tensor, values: Tensor, groups: int) -> None:
        """Remember the first tokens of a text whose attention was computed elsewhere: [B, H, T, d], without padding."""
        if self.tokens:
            raise ValueError(
                f"Layer {self.number} holds {self.tokens} tokens already; only an empty cache takes others."
            )
        self.lazy_initialization(keys, values)
        self._make_parts(groups, keys.device)
        for part in self.parts:
            part.store.remember(keys[:, part.kv], values[:, part.kv], Turn(0))
        self.tokens = keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns of the mask, the first one's number): always the logical length."""
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen so far, dropped ones included."""
        return self.tokens

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def activate_past_recording(self) -> None:
        """From now on turns can be taken back by `crop`."""
        self.record_past = True
        for part in self.parts:
            part.store.record()

    def end_past_recording(self) -> None:
        """From now on turns stay, and nothing more is held for taking them back."""
        self.record_past = False
        for part in self.parts:
            part.store.settle()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove tokens; 0 commits what was recorded.

        Raises:
            ValueError: a positive number, or more than was recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to take back as a negative one.")
        # transformers 5.17 hands over a tensor, which later additions would change in place.
        tokens = min(-int(tokens_to_remove), self.tokens)
        for part in self.parts:
            part.store.crop(tokens)
        self.tokens -= tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        for part in self.parts:
            part.store.pick(indices.to(part.heads.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        for part in self.parts:
            first = next(part.store.tensors(), None)
            if first is not None:
                part.store.pick(torch.arange(first.shape[0], device=part.heads.device).repeat_interleave(repeats))

    def reset(self) -> None:
        """Hold nothing."""
        self.tokens, self._new = 0, None
        for part in self.parts:
            part.store.clear()

    def offload(self) -> None:
        """Nothing to do: a store decides by itself where its tensors live."""

    def prefetch(self) -> None:
        """Nothing to do."""

    def offloaded(self) -> Iterator[Tensor]:
        """Those of the tensors that were sent to host memory."""
        for part in self.parts:
            yield from part.store.offloaded()

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is held for this layer's tokens."""
        for part in self.parts:
            yield from part.store.tensors()
        yield from self._new or ()


class KVCache(Cache):
    """A transformers `Cache` whose full-attention layers keep each KV head in its own way.

    Sliding, linear and other layers are those of the model's own `DynamicCache`.

    Args:
        treatments: {"L5.G0": cache method}; KV heads that are not named keep everything.
        reserve: final length where it is known, so that buffers never grow; 0 where it is not.

    Raises:
        ValueError: a KV head that the model does not have in a full-attention layer.
    """

    def __init__(self, model: PreTrainedModel, treatments: Mapping[str, CacheMethod], reserve: int = 0) -> None:
        full = _full_layers(model)
        units = _units(model, full)
        for unit in treatments:
            if unit not in units:
                raise ValueError(
                    f"{unit} is no KV head whose cache can be chosen in this {model.config.model_type}; "
                    f"there are {len(units)}, {units[0]} to {units[-1]}.{nearest_unit(unit, units)}"
                )
        masks, found = MaskReader(), _Lazy(weakref.ref(model))
        layers: list = list(_own_layers(model))
        for number, count in full.items():
            methods = [treatments.get(f"L{number}.G{i}", _EVERYTHING) for i in range(count)]
            layers[number] = KVLayer(number, methods, masks, found)
            layers[number].reserve = reserve
        layers[max(full)].last = True
        super().__init__(layers=layers)

    def take(self, model: PreTrainedModel, other: DynamicCache) -> None:
        """Keep of a cache that keeps everything of rows without padding what this one would have kept of them.

        Raises:
            ValueError: this cache holds tokens already, or it would have read the context otherwise (see `openings`).
        """
        body, length = anatomy(model), other.get_seq_length()
        if length not in self.openings(length):
            raise ValueError(
                f"This cache would have read these {length} tokens otherwise: some of its heads see less than all, or "
                "choose by queries. Read the text through it."
            )
        for layer, own in zip(self.layers, other.layers, strict=True):
            layer.take(own.keys, own.values, body.heads(layer.number) // own.keys.shape[1])

    def openings(self, length: int) -> range:
        """How many first tokens of a context of `length`, read at once, may come by `take`, and all is as if read."""
        found = [range(length + 1)]
        for layer in self.layers:
            methods = dict.fromkeys(layer.methods) if isinstance(layer, KVLayer) else ()
            found += [one.store().openings(length) for one in methods] or [range(0)]
        return range(max(one.start for one in found), min(one.stop for one in found))

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the cache keeps alive, sliding and linear layers included."""
        for layer in self.layers:
            if isinstance(layer, KVLayer):
                yield from layer.tensors()
            else:
                yield from _tensors_in(vars(layer).values())

    def bytes(self) -> int:
        """Bytes of the memory behind the tensors, each piece counted once; buffers with their reserve."""
        return _bytes(self.tensors())

    def offloaded_bytes(self) -> int:
        """Bytes of what methods such as `infllm` sent to host memory; `bytes` counts them too."""
        return _bytes(one for layer in self.layers if isinstance(layer, KVLayer) for one in layer.offloaded())

    def resident_bytes(self) -> int:
        """Bytes of what stays where the model runs."""
        return self.bytes() - self.offloaded_bytes()


@dataclass
class _Lazy:
    """The rotation of a model, found when it is first asked for."""

    model: "weakref.ref[PreTrainedModel]"
    found: "list[Rotate | None]" = field(default_factory=list)

    def __call__(self) -> Rotate | None:
        model = self.model()
        if not self.found and model is not None:
            self.found.append(rotation(model))
        return self.found[0] if self.found else None


@dataclass(frozen=True)
class _Everything(CacheMethod):
    """What KV heads that nothing is said of keep: all."""

    def store(self, reserve: int = 0) -> Store:
        return Full(reserve)


_EVERYTHING = _Everything()


def _evenly(numbers: list[int]) -> slice | None:
    """The slice that takes ascending numbers, or None where they are not evenly spaced."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    run = range(numbers[0], numbers[-1] + 1, step)
    return slice(run.start, run.stop, run.step) if list(run) == numbers else None


def _of_groups(q: Tensor, kv: "slice | Tensor", groups: int) -> Tensor:
    """The query heads [B, H*G, Q, d] of some KV heads."""
    if isinstance(kv, slice) and kv.step == 1:
        return q[:, kv.start * groups : kv.stop * groups]
    return q.unflatten(1, (-1, groups))[:, kv].flatten(1, 2)


def _bytes(tensors: Iterator[Tensor]) -> int:
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def _tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors_in(value.values())


def _own_layers(model: PreTrainedModel) -> list:
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{model.config.model_type} is an encoder-decoder; headwise caches are for decoder-only models."
        )
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    return layers or [DynamicLayer() for _ in range(config.num_hidden_layers)]


def _full_layers(model: PreTrainedModel) -> dict[int, int]:
    """{layer: KV heads} of the layers whose cache holds every token."""
    body = anatomy(model)
    own = _own_layers(model)
    return {
        number: body.kv_heads(number)
        for number in body.layers
        if number < len(own) and type(own[number]) is DynamicLayer and body.layer(number).interface
    }


def kv_units(model: PreTrainedModel) -> list[str]:
    """The KV heads whose cache can be chosen, as "L5.G0": those of full-attention layers.

    Raises:
        ValueError: the model has none.
    """
    return _units(model, _full_layers(model))


def _units(model: PreTrainedModel, full: Mapping[int, int]) -> list[str]:
    units = [f"L{number}.G{i}" for number, count in full.items() for i in range(count)]
    if not units:
        raise ValueError(
            f"This {model.config.model_type} has no full-attention layer that calls transformers' attention interface, "
            "so headwise has no cache for it."
        )
    return units
