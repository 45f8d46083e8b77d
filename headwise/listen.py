"""Call handlers with every value that passes a site of a running model, and leave no trace.

Attention is entered by transformers' own door: an attention and a mask function under two names for each
implementation. `headwise_open_*` computes scores and pattern in the open; `headwise_fast_*` hands q, k, v to the
implementation that the model had (SDPA stays SDPA) and looks only at what goes in and comes out. All else is hooks.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from headwise.anatomy import Anatomy, anatomy
from headwise.attend import attend_openly
from headwise.probe import Layer, evaluating, implementation, probe_inputs
from headwise.site import Site, time_axis

OPEN, FAST = "headwise_open_", "headwise_fast_"
IN_ATTENTION = ("q", "k", "v", "scores", "pattern", "z")


@dataclass(frozen=True, eq=False)
class Call:
    """The call of a layer's attention function that gave a z.

    Attributes:
        mask: what it was given: [B or 1, 1 or H, Tq, Tk], boolean or additive, None where it is causal by itself.
        length, width: Tq and Tk.
        again: from another mask to the z [B, Tq, H, dv] that the same queries, keys and values give under it; a second
            argument [K] names the columns of keys that the mask is of, where it is not of all.
    """

    mask: Any
    length: int
    width: int
    again: Callable[..., Tensor]


@dataclass(frozen=True)
class Place:
    """Where and when a value passes by.

    Attributes:
        site: the concrete site, with its layer.
        offset: column of the whole sequence at which axis T of the value starts (above 0 with a past in a KV cache).
        prompt: number of columns of the first forward pass; negative positions count from its end.
        keys: for scores, pattern and z, the column at which the key axis starts (above 0 in a sliding cache).
        call: for z inside attention, the call that gave it.
    """

    site: Site
    offset: int
    prompt: int
    keys: int = 0
    call: Call | None = field(default=None, compare=False, repr=False)

    def columns(self, positions: "list[int] | None", length: int) -> list[int] | None:
        """Positions of the whole sequence as indices into this value's axis T of the given length; None = all."""
        if positions is None:
            return None
        absolute = [p + self.prompt if p < 0 else p for p in positions]
        if any(p < 0 for p in absolute):
            raise ValueError(
                f"{self.site}: position {min(positions)} is before the start of a prompt of {self.prompt}."
            )
        # Columns beyond this pass may still come while tokens are generated.
        return [p - self.offset for p in absolute if 0 <= p - self.offset < length]


Handler = Callable[[Tensor, Place], Tensor | None]


@dataclass
class _Session:
    """All that is listened to on one model now. Lives from the first tap or do entered until the last one left."""

    listeners: dict[nn.Module, list[tuple[Site, Handler]]] = field(default_factory=dict)
    offset: int = 0
    prompt: int = 0
    rows: int = 1
    explicit: int = 0

    def place(self, site: Site, length: int, width: int = 0) -> Place:
        """The place of a value with `length` columns of its own, read with `width` keys (attention sites only)."""
        if site.stack == "enc" or (site.stack == "cross" and site.kind in ("k", "v", "k_pre")):
            return Place(site, 0, width or length)
        # A sliding cache holds only the last keys; a static one has room that is not yet filled.
        first = 0 if site.stack == "cross" else max(0, self.offset + length - width)
        prompt = self.prompt or self.offset + length
        return Place(site, first, prompt) if site.kind in ("k", "v") else Place(site, self.offset, prompt, first)

    def run(
        self, module: nn.Module, kind: str, value: Tensor, length: int, width: int, call: Call | None = None
    ) -> Tensor:
        """Pass a value by every handler of this module and kind, in the order in which they were entered."""
        for site, handler in self.listeners.get(module, ()):
            if site.kind == kind:
                new = handler(value, replace(self.place(site, length, width), call=call))
                value = value if new is None else new
        return value

    def open(self, module: nn.Module) -> bool:
        """Whether scores or pattern of this module are asked for."""
        return any(site.kind in ("scores", "pattern") for site, _ in self.listeners.get(module, ()))


_sessions: "weakref.WeakKeyDictionary[PreTrainedModel, _Session]" = weakref.WeakKeyDictionary()
_by_module: "weakref.WeakKeyDictionary[nn.Module, _Session]" = weakref.WeakKeyDictionary()
_error: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[float, float]]" = weakref.WeakKeyDictionary()


def _attend(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: object,
) -> tuple:
    """The registered attention function. Past `original`, the signature is transformers' own."""
    session = _by_module.get(module) or _Session()
    at = {"length": query.shape[2], "width": key.shape[2]}
    query = session.run(module, "q", query, **at)
    key = session.run(module, "k", key, **at)
    value = session.run(module, "v", value, **at)
    if original == "eager":
        fused = own_eager(module)
    else:
        # Under an open mask only SDPA is known to do as the model's own implementation would.
        fused = ALL_ATTENTION_FUNCTIONS[original] if not session.explicit or original == "sdpa" else None
    if session.open(module) or fused is None:
        see = partial(session.run, module, **at)
        z, pattern = attend_openly(module, query, key, value, attention_mask, see, options)
    else:
        z, pattern = fused(module, query, key, value, attention_mask, **options)

    def again(mask: Tensor, columns: Tensor | None = None) -> Tensor:
        k, v = (key, value) if columns is None else (key.index_select(2, columns), value.index_select(2, columns))
        # Implementations that take no mask of this form are left for attention in the open.
        if fused is None or original not in ("sdpa", "eager"):
            return attend_openly(module, query, k, v, mask, lambda _, same: same, options)[0]
        return fused(module, query, k, v, mask, **options)[0]

    return session.run(module, "z", z, **at, call=Call(attention_mask, **at, again=again)), pattern


def own_eager(module: nn.Module) -> Callable | None:
    """The eager attention function that stands in the type's own file, None where there are none or several."""
    file = vars(sys.modules[type(module).__module__])
    found = [value for name, value in file.items() if name.endswith("eager_attention_forward")]
    return file.get("eager_attention_forward", found[0] if len(found) == 1 else None)


def _renamed(prefix: str, name: str) -> str:
    """The name under which a model of this implementation is entered, registered on first use."""
    original = name.removeprefix(OPEN).removeprefix(FAST)
    if prefix + original not in ALL_ATTENTION_FUNCTIONS:
        mask = eager_mask if prefix == OPEN else ALL_MASK_ATTENTION_FUNCTIONS[original]
        AttentionInterface.register(prefix + original, partial(_attend, original))
        AttentionMaskInterface.register(prefix + original, mask)
    return prefix + original


def _note_offset(session: _Session, model: PreTrainedModel) -> Callable:
    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        past = kwargs.get("past_key_values")
        session.offset = int(past.get_seq_length()) if hasattr(past, "get_seq_length") else 0
        name = "decoder_input_ids" if model.config.is_encoder_decoder else model.main_input_name
        given = kwargs.get(name)
        given = kwargs.get("inputs_embeds") if given is None else given
        given = args[0] if given is None and args and not model.config.is_encoder_decoder else given
        if not isinstance(given, Tensor):
            return
        session.rows = given.shape[0]
        if session.offset == 0 or session.prompt == 0:
            session.prompt = session.offset + given.shape[1] if given.ndim in (2, 3) else 0

    return before


@contextmanager
def listen(model: PreTrainedModel, wanted: "list[tuple[Site, Handler]]") -> Iterator[None]:
    """Call each handler with every value that passes its site; what it returns, if anything, takes the value's place.

    Handlers run in the order in which their blocks were entered: a tap entered after a do sees what the do wrote.

    Raises:
        ValueError: a site that this model does not offer, or a model whose attention this version cannot reproduce.
    """
    body = anatomy(model)
    entered, opened = _self_check(model, body)
    limit = 1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2
    for error, kinds in ((entered, IN_ATTENTION), (opened, ("scores", "pattern"))):
        if not error <= limit and any(site.kind in kinds for site, _ in wanted):
            raise ValueError(
                f"{type(model).__name__} computes attention in a way that headwise does not reproduce (relative error "
                f"{error:.1e}, allowed {limit:.0e}); its {', '.join(kinds)} would be wrong, so they are refused. "
                "A model opened with attn_implementation='eager' may be read."
            )
    with ExitStack() as stack:
        session = _enter(model, body, stack)
        inner: list[tuple[nn.Module, tuple[Site, Handler]]] = []
        for site, handler in wanted:
            layer = None if site.kind in ("resid_pre", "resid_post") else body.layer(site.layer, site.stack)
            if layer is not None and layer.interface and site.kind in IN_ATTENTION:
                inner.append((layer.attention, (site, handler)))
            else:
                stack.enter_context(_hook(body, layer, site, handler, session))
        opened = any(site.kind in ("scores", "pattern") for _, (site, _) in inner)
        for module, entry in inner:
            session.listeners.setdefault(module, []).append(entry)
        session.explicit += opened
        if inner:
            rename = partial(_renamed, OPEN if session.explicit else FAST)
            stack.enter_context(implementation(model, rename))
        try:
            yield
        finally:
            session.explicit -= opened
            for module, entry in inner:
                session.listeners[module].remove(entry)


def _enter(model: PreTrainedModel, body: Anatomy, stack: ExitStack) -> _Session:
    session = _sessions.get(model)
    if session is None:
        session = _sessions[model] = _Session()
        for layer in body.by_place.values():
            _by_module[layer.attention] = session
        # Callers enter at the model or at its base, and OPT passes its base by.
        for entry in dict.fromkeys((model, model.base_model)):
            hook = entry.register_forward_pre_hook(_note_offset(session, model), with_kwargs=True)
            stack.callback(hook.remove)
        stack.callback(_forget, model, body)
    return session


def _forget(model: PreTrainedModel, body: Anatomy) -> None:
    _sessions.pop(model, None)
    for layer in body.by_place.values():
        _by_module.pop(layer.attention, None)


@contextmanager
def _hook(body: Anatomy, layer: Layer | None, site: Site, handler: Handler, session: _Session) -> Iterator[None]:
    """A forward hook for one site outside the attention function."""
    carried: list[Tensor] = []

    def look(value: Tensor) -> Tensor | None:
        return _as_site(value, site, layer, lambda v: handler(v, session.place(site, v.shape[time_axis(site)])))

    # Not by calling itself: a closure that holds itself keeps every captured value until the garbage is collected.
    def see(value: Tensor) -> Tensor | None:
        if value.ndim == 2 and layer is not None and layer.flat:
            new = look(value.unflatten(0, (session.rows, -1)))
            return None if new is None else new.flatten(0, 1)
        return look(value)

    def on_input(_: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), "")
        value = args[0] if args else kwargs[name]
        carried.clear()
        new = see(value)
        if new is None or new is value:
            return None
        if site.kind == "resid_mid":
            carried.append(new - value)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, name: new})

    def on_output(_: nn.Module, args: tuple, output: Any) -> Any:
        new = see(output[0] if isinstance(output, (tuple, list)) else output)
        return None if new is None else _with_first(output, new)

    def carry(_: nn.Module, args: tuple, output: Any) -> Any:
        """What was written at the input of the MLP's norm belongs to the residual stream too."""
        if not carried:
            return None
        value = output[0] if isinstance(output, (tuple, list)) else output
        return _with_first(output, value + carried.pop().view_as(value))

    block = body.blocks[site.stack][site.layer]
    module, before = _door(block, layer, site.kind)
    with ExitStack() as hooks:
        if before:
            hooks.callback(module.register_forward_pre_hook(on_input, with_kwargs=True).remove)
        else:
            hooks.callback(module.register_forward_hook(on_output).remove)
        if before and site.kind == "resid_mid":
            hooks.callback(block.register_forward_hook(carry, prepend=True).remove)
        yield


def _with_first(output: Any, value: Tensor) -> Any:
    """What a module gave, with its first tensor exchanged."""
    if isinstance(output, list):
        return [value, *output[1:]]
    return (value, *output[1:]) if isinstance(output, tuple) else value


def _door(block: nn.Module, layer: Layer | None, kind: str) -> tuple[Any, bool]:
    """The module at which a kind of value passes, and whether as its input."""
    if layer is None:
        return block, kind == "resid_pre"
    return {
        "z": (layer.out, True),
        "neurons": (layer.down, True),
        "resid_mid": (layer.mid, not layer.post_norm),
        "attn": (layer.out, False),
        "mlp": (layer.mlp, False),
        "q_pre": (layer.q_raw, False),
        "k_pre": (layer.k_raw, False),
    }[kind]


def _as_site(value: Tensor, site: Site, layer: Layer | None, see: Callable[[Tensor], Tensor | None]) -> Tensor | None:
    """Show what a module takes or gives in the shape of its site, and give back in the old shape.

    z comes as [B, T, H*d], is shown as [B, T, H, d]; q_pre and k_pre come as [B, T, H*d], [B, T, H, d] or [B, H, T, d],
    are shown as [B, H, T, d].
    """
    if site.kind == "z":
        new = see(value.unflatten(-1, (layer.heads, -1)))
        return None if new is None else new.flatten(-2)
    if site.kind not in ("q_pre", "k_pre") or (value.ndim == 4 and layer.heads_first):
        return see(value)
    flat = value.ndim == 3
    new = see((value.unflatten(-1, (-1, layer.head_dim)) if flat else value).transpose(1, 2))
    if new is None:
        return None
    return new.transpose(1, 2).flatten(-2) if flat else new.transpose(1, 2)


def _self_check(model: PreTrainedModel, body: Anatomy) -> tuple[float, float]:
    """Once a model: how far the model, entered and in the open, is from itself, relative to its largest values.

    Three passes over a few tokens, one row padded: as the model is; entered, which must give the same; and in the open,
    where each layer gets the queries, keys and values of the second pass and must give its z. Comparing layer by layer
    keeps rounding from growing on its way, as it does where a router of experts tips over.
    """
    layers = [layer for layer in body.by_place.values() if layer.interface]
    if model in _error or not layers:
        return _error.get(model, (0.0, 0.0))
    inputs = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in probe_inputs(model).items()}
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, :2] = 0
    seen: dict[Site, Tensor] = {}
    errors: list[float] = []

    def apart(own: Tensor, ours: Tensor, stack: str) -> float:
        mask = inputs.get("attention_mask")
        if mask is not None and (stack == "enc" or not model.config.is_encoder_decoder) and own.ndim > 2:
            own, ours = own[mask.bool()], ours[mask.bool()]
        return float((own - ours).abs().max().float() / own.abs().max().float().clamp_min(1e-6))

    def note(value: Tensor, place: Place) -> None:
        seen[place.site] = value

    def again(value: Tensor, place: Place) -> Tensor:
        if place.site.kind == "z":
            errors.append(apart(seen[place.site], value, place.site.stack))
        return seen[place.site]

    def run(prefix: str, handler: Handler, more: tuple[str, ...]) -> Tensor:
        session = _Session(explicit=int(prefix == OPEN))
        for layer in layers:
            here = [Site(layer.number, kind, stack=layer.stack) for kind in ("q", "k", "v", "z")]
            session.listeners[layer.attention] = [(site, handler) for site in here]
            session.listeners[layer.attention] += [(replace(here[0], kind=kind), lambda *_: None) for kind in more]
            _by_module[layer.attention] = session
        try:
            with implementation(model, partial(_renamed, prefix)):
                return model(**inputs)[0]
        finally:
            _forget(model, body)

    with evaluating(model):
        plain = model(**inputs)[0]
        entered = run(FAST, note, ())
        run(OPEN, again, ("pattern",))
        _error[model] = apart(plain, entered, ""), max(errors)
    return _error[model]
