"""Read and write values at sites of a model that is running, and leave no trace.

Attention is entered by transformers' own door: an attention function and a mask function, registered once under two
names. `headwise` computes scores and pattern in the open; `headwise_fast` hands q, k, v to the implementation the model
had (SDPA stays SDPA) and looks only at what goes in and what comes out. Everything else is a forward hook.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from headwise.anatomy import Anatomy, Layer, anatomy, implementation, probe_inputs
from headwise.site import Site
from headwise.task import Batch

OPEN, FAST = "headwise", "headwise_fast"


@dataclass(frozen=True)
class Place:
    """Where and when a value passes by.

    Attributes:
        site: the concrete site, with its layer.
        offset: column of the whole sequence at which axis T of the value starts (above 0 when a KV cache holds the past).
        prompt: number of columns of the first forward pass; negative positions count from its end.
    """

    site: Site
    offset: int
    prompt: int

    def columns(self, positions: "list[int] | None", length: int) -> list[int] | None:
        """Positions of the whole sequence as indices into this value's axis T of the given length; None = all."""
        if positions is None:
            return None
        absolute = [p + self.prompt if p < 0 else p for p in positions]
        if any(p < 0 for p in absolute):
            raise ValueError(f"{self.site}: position {min(positions)} lies before the start of a prompt of {self.prompt}.")
        # Columns beyond this pass may still come while tokens are generated.
        return [p - self.offset for p in absolute if 0 <= p - self.offset < length]


Handler = Callable[[Tensor, Place], Tensor | None]


@dataclass
class _Session:
    """All that is listened to on one model now. Lives from the first tap or do entered until the last one left."""

    original: str
    listeners: dict[nn.Module, list[tuple[Site, Handler]]] = field(default_factory=dict)
    offset: int = 0
    prompt: int = 0
    explicit: int = 0

    def place(self, site: Site, length: int, key_length: int | None = None) -> Place:
        if site.stack in ("enc", "cross") and site.kind in ("k", "v"):
            return Place(site, 0, length)
        if site.stack == "enc":
            return Place(site, 0, length)
        if key_length is not None:
            # A sliding cache holds only the last keys; a static one has room that is not yet filled.
            return Place(site, max(0, self.offset + length - key_length), self.prompt)
        return Place(site, self.offset, self.prompt or length)

    def run(self, module: nn.Module, kind: str, value: Tensor, length: int) -> Tensor:
        """Pass a value by every handler of this module and kind, in the order in which they were entered."""
        for site, handler in self.listeners.get(module, ()):
            if site.kind == kind:
                new = handler(value, self.place(site, length, value.shape[2] if kind in ("k", "v") else None))
                value = value if new is None else new
        return value

    def open(self, module: nn.Module) -> bool:
        """Whether scores or pattern of this module are asked for."""
        return any(site.kind in ("scores", "pattern") for site, _ in self.listeners.get(module, ()))


_sessions: "weakref.WeakKeyDictionary[PreTrainedModel, _Session]" = weakref.WeakKeyDictionary()
_by_module: "weakref.WeakKeyDictionary[nn.Module, _Session]" = weakref.WeakKeyDictionary()
_checked: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()


def attend_openly(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, session: "_Session | None", options: dict
) -> tuple[Tensor, Tensor]:
    """Attention with scores and pattern in the open, the naive twin of every fused implementation.

    Args:
        query: [B, H, Tq, d]; key [B, Hkv, Tk, d]; value [B, Hkv, Tk, dv]; mask additive or boolean, [B or 1, 1 or H, Tq, Tk].
        options: what the model passes along: scaling, softcap, position_bias, s_aux, dropout, is_causal.

    Returns:
        z [B, Tq, H, dv] and pattern [B, H, Tq, Tk].
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = options.get("scaling")
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if options.get("softcap") is not None:
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    if options.get("position_bias") is not None:
        scores = scores + options["position_bias"]
    scores = _masked(scores, mask, module, options)
    length = query.shape[2]
    if session is not None:
        scores = session.run(module, "scores", scores, length)
    sinks = options.get("s_aux")
    sinks = getattr(module, "sinks", None) if sinks is None else sinks
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(len(scores), -1, length, 1).to(scores.dtype)
        pattern = torch.cat([scores, column], -1).softmax(-1, dtype=torch.float32)[..., :-1].to(value.dtype)
    else:
        pattern = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    if module.training and options.get("dropout"):
        pattern = nn.functional.dropout(pattern, options["dropout"])
    if session is not None:
        pattern = session.run(module, "pattern", pattern, length)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


def _masked(scores: Tensor, mask: Tensor | None, module: nn.Module, options: dict) -> Tensor:
    lowest = torch.finfo(scores.dtype).min
    length, keys = scores.shape[-2:]
    if mask is None:
        causal = options.get("is_causal")
        if length > 1 and (getattr(module, "is_causal", False) if causal is None else causal):
            seen = torch.ones(length, keys, dtype=torch.bool, device=scores.device).tril(keys - length)
            return scores.masked_fill(~seen, lowest)
        return scores
    mask = mask[..., :keys]
    return scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: object) -> tuple:
    """The registered attention function. The signature is transformers' own."""
    session = _by_module[module]
    length = query.shape[2]
    query = session.run(module, "q", query, length)
    key = session.run(module, "k", key, length)
    value = session.run(module, "v", value, length)
    if session.open(module) or session.original == "eager":
        z, pattern = attend_openly(module, query, key, value, attention_mask, session, options)
    else:
        fused = ALL_ATTENTION_FUNCTIONS["sdpa" if session.explicit else session.original]
        z, pattern = fused(module, query, key, value, attention_mask, **options)
    return session.run(module, "z", z, length), pattern


def _register(original: str) -> tuple[str, str]:
    """The two names under which this implementation's model is entered, registered on first use."""
    fast = f"{FAST}_{original}"
    if OPEN not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(OPEN, _attend)
        AttentionMaskInterface.register(OPEN, eager_mask)
    if fast not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(fast, _attend)
        AttentionMaskInterface.register(fast, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return OPEN, fast


def _note_offset(session: _Session, model: PreTrainedModel) -> Callable:
    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        past = kwargs.get("past_key_values")
        past = getattr(past, "self_attention_cache", past)
        session.offset = int(past.get_seq_length()) if past is not None and hasattr(past, "get_seq_length") else 0
        if session.offset == 0:
            name = "decoder_input_ids" if model.config.is_encoder_decoder else model.main_input_name
            given = kwargs.get(name)
            given = kwargs.get("inputs_embeds") if given is None else given
            given = args[0] if given is None and args and not model.config.is_encoder_decoder else given
            session.prompt = given.shape[1] if isinstance(given, Tensor) and given.ndim in (2, 3) else 0

    return before


@contextmanager
def listen(model: PreTrainedModel, wanted: "list[tuple[Site, Handler]]") -> Iterator[None]:
    """Call each handler with every value that passes its site; what it returns, if anything, takes the value's place.

    Handlers run in the order in which their blocks were entered: a tap entered after a do sees what the do wrote.

    Raises:
        ValueError: a site that this model does not offer, or a model whose attention this version cannot reproduce.
    """
    body = anatomy(model)
    _self_check(model, body)
    with ExitStack() as stack:
        session = _enter(model, stack)
        inner: list[tuple[nn.Module, tuple[Site, Handler]]] = []
        for site, handler in wanted:
            layer = None if site.kind in ("resid_pre", "resid_post") else body.layer(site.layer, site.stack)
            if layer is not None and layer.interface and site.kind in ("q", "k", "v", "scores", "pattern", "z"):
                inner.append((layer.attention, (site, handler)))
            else:
                stack.enter_context(_hook(body, layer, site, handler, session))
        for module, entry in inner:
            session.listeners.setdefault(module, []).append(entry)
            _by_module[module] = session
        opened = any(entry[0].kind in ("scores", "pattern") for _, entry in inner)
        session.explicit += opened
        if any(layer.interface for layer in body.by_place.values()) and (inner or session.listeners):
            slow, fast = _register(session.original)
            for layer in body.by_place.values():
                _by_module[layer.attention] = session
            stack.enter_context(implementation(model, slow if session.explicit or session.original == "eager" else fast))
        try:
            yield
        finally:
            session.explicit -= opened
            for module, entry in inner:
                session.listeners[module].remove(entry)


def _enter(model: PreTrainedModel, stack: ExitStack) -> _Session:
    session = _sessions.get(model)
    if session is None:
        session = _Session(original=model.config._attn_implementation or "eager")
        _sessions[model] = session
        hook = model.base_model.register_forward_pre_hook(_note_offset(session, model), with_kwargs=True)
        stack.callback(hook.remove)
        stack.callback(_forget, model, session)
    return session


def _forget(model: PreTrainedModel, session: _Session) -> None:
    _sessions.pop(model, None)
    for module in [m for m, s in _by_module.items() if s is session]:
        del _by_module[module]


@contextmanager
def _hook(body: Anatomy, layer: Layer | None, site: Site, handler: Handler, session: _Session) -> Iterator[None]:
    """A forward hook for one site outside the attention function."""
    kind = site.kind

    def see(value: Tensor) -> Tensor | None:
        if kind in ("q_pre", "k_pre"):
            return _see_heads(value, layer.head_dim, lambda v: handler(v, session.place(site, v.shape[2])))
        if kind == "z":
            flat = value.unflatten(-1, (layer.heads, -1))
            new = handler(flat, session.place(site, value.shape[1]))
            return None if new is None else new.flatten(-2)
        return handler(value, session.place(site, value.shape[1]))

    def on_input(_: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if args:
            new = see(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        new = see(kwargs[name])
        return None if new is None else (args, {**kwargs, name: new})

    def on_output(_: nn.Module, args: tuple, output: object) -> object | None:
        value = output[0] if isinstance(output, tuple) else output
        new = see(value)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    block = body.blocks[site.stack][site.layer]
    at_input = {"resid_pre": block, "resid_mid": layer and layer.mid, "neurons": layer and layer.down, "z": layer and layer.out}
    at_output = {
        "resid_post": block,
        "attn": layer and layer.out,
        "mlp": layer and layer.mlp,
        "q_pre": layer and layer.q_raw,
        "k_pre": layer and layer.k_raw,
    }
    if kind in at_input:
        hook = at_input[kind].register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        hook = at_output[kind].register_forward_hook(on_output)
    try:
        yield
    finally:
        hook.remove()


def _see_heads(value: Tensor, head_dim: int, see: Callable[[Tensor], Tensor | None]) -> Tensor | None:
    """Show a projection's output, [B, T, H*d] or [B, T, H, d] or [B, H, T, d], as [B, H, T, d]."""
    if value.ndim == 3:
        new = see(value.unflatten(-1, (-1, head_dim)).transpose(1, 2))
        return None if new is None else new.transpose(1, 2).flatten(-2)
    new = see(value.transpose(1, 2))
    return None if new is None else new.transpose(1, 2)


def _self_check(model: PreTrainedModel, body: Anatomy) -> None:
    """Once a model: attention in the open must give what the model's own attention gives."""
    if model in _checked or not any(layer.interface for layer in body.by_place.values()):
        return
    inputs = probe_inputs(model)
    training = model.training
    model.eval()
    session = _Session(original="eager")
    try:
        with torch.no_grad():
            own = model(**inputs)[0]
            _register("eager")
            for layer in body.by_place.values():
                _by_module[layer.attention] = session
            with implementation(model, OPEN):
                ours = model(**inputs)[0]
    finally:
        model.train(training)
        for layer in body.by_place.values():
            _by_module.pop(layer.attention, None)
    scale = own.float().abs().max().clamp_min(1e-6)
    error = float((own.float() - ours.float()).abs().max() / scale)
    limit = 1e-4 if own.dtype in (torch.float32, torch.float64) else 5e-2
    if not error <= limit:
        raise ValueError(
            f"{type(model).__name__} computes attention in a way that headwise does not reproduce (relative error {error:.1e}); "
            "its patterns would be wrong, so they are refused."
        )
    _checked.add(model)


class Tap:
    """Values captured while a model ran; see `tap`."""

    def __init__(self, sites: list[Site]) -> None:
        self._values: dict[Site, list[Tensor]] = {site: [] for site in sites}

    def __getitem__(self, address: "str | Site") -> Tensor:
        """The value of the last forward pass at a site; a head's own slice when the address names one."""
        site = Site.parse(address)
        values = self._all(site)
        if not values:
            raise ValueError(f"{address} was not reached: no forward pass ran inside the tap.")
        value = values[-1]
        exact = site in self._values
        if not exact and site.index is not None:
            value = value.select(2 if site.kind in ("z", "neurons") else 1, site.index)
        return value

    def _all(self, site: Site) -> list[Tensor]:
        for key in (site, site.whole):
            if key in self._values:
                return self._values[key]
        have = ", ".join(map(str, list(self._values)[:4]))
        raise ValueError(f"{site} was not tapped; this tap reads {have}{' ...' if len(self._values) > 4 else ''}.")

    def every(self, address: "str | Site") -> list[Tensor]:
        """The values of all forward passes, for a tap made with `every=True`."""
        return list(self._all(Site.parse(address)))

    def by_layer(self, kind: str, stack: str = "") -> dict[int, Tensor]:
        """The values of one kind by real layer number."""
        return {s.layer: v[-1] for s, v in self._values.items() if s.kind == kind and s.stack == stack and v}

    def stack(self, kind: str, stack: str = "") -> Tensor:
        """The values of one kind with a first axis over the tapped layers. Raises ValueError when their shapes differ."""
        values = self.by_layer(kind, stack)
        if len({v.shape for v in values.values()}) != 1:
            raise ValueError(f"{kind} has {len(values)} layers of different shapes here; use by_layer({kind!r}).")
        return torch.stack(list(values.values()))


@contextmanager
def tap(
    model: PreTrainedModel,
    *sites: "str | Site",
    positions: list[int] | None = None,
    rows: list[int] | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    grad: bool = False,
    every: bool = False,
) -> "Iterator[Tap]":
    """Read values at sites while the model runs inside the block.

    Shapes: z [B, T, H, d]; q [B, H, T, d]; k, v [B, Hkv, T, d]; scores, pattern [B, H, Tq, Tk]; resid_pre, resid_mid,
    resid_post, attn, mlp [B, T, D]; neurons [B, T, F]. z, q, k, v leave SDPA in place; scores and pattern need softmax in
    the open, in their layers only.

    Args:
        sites: addresses such as "z" (all layers), "L5.pattern", "L9.H6.z", "L3.mlp@-1".
        positions: only these columns (query columns for scores and pattern).
        rows: only these prompts.
        reduce: applied to each value as it passes, so that the whole is never held.
        grad: keep the values attached to the graph (then rows, positions and heads must be all of them).
        every: keep every forward pass rather than the last.

    Raises:
        ValueError: a site that this model does not offer.
    """
    body = anatomy(model)
    chosen = [site for text in sites for site in body.resolve(text)]
    if not chosen:
        raise ValueError("A tap needs at least one site, for example 'z' or 'L5.pattern'.")
    taken = Tap(chosen)

    def reader(site: Site) -> Handler:
        def read(value: Tensor, place: Place) -> None:
            kept = value if grad else value.detach()
            kept = _select(kept, site, place, rows, positions)
            kept = kept if reduce is None else reduce(kept)
            store = taken._values[site]
            if not every:
                store.clear()
            store.append(kept)

        return read

    with listen(model, [(site, reader(site)) for site in chosen]):
        yield taken


def _select(value: Tensor, site: Site, place: Place, rows: list[int] | None, positions: list[int] | None) -> Tensor:
    if rows is not None:
        value = value[rows]
    axis = 1 if site.kind == "z" or value.ndim == 3 else 2
    wanted = [site.position] if site.position is not None else positions
    columns = place.columns(wanted, value.shape[axis])
    if columns is not None:
        value = value.index_select(axis, torch.tensor(columns, device=value.device, dtype=torch.long))
    if site.index is not None:
        value = value.select(2 if site.kind in ("z", "neurons") else 1, site.index)
    return value


def per_row(
    model: PreTrainedModel,
    batch: Batch,
    site: str,
    reduce: Callable[[Tensor], Tensor],
    rows: int = 8,
) -> dict[int, Tensor]:
    """One number per prompt and head: runs the batch in parts and reduces each layer's value while it passes.

    Args:
        site: for example "pattern".
        reduce: from a value such as pattern [b, H, Tq, Tk] to [b, H].

    Returns:
        {layer: [B, H]} on the CPU in float32.
    """
    kind, stack = Site.parse(site).kind, Site.parse(site).stack
    parts: dict[int, list[Tensor]] = {}
    for part in batch.chunks(rows):
        with torch.no_grad(), tap(model, site, reduce=reduce) as t:
            model.base_model(**part.to(model.device).inputs)
        for layer, value in t.by_layer(kind, stack).items():
            parts.setdefault(layer, []).append(value.float().cpu())
    return {layer: torch.cat(values) for layer, values in parts.items()}
